"""Arguments that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model_files.examine.check import check_model
from trainer.model_files.run_model import RunModel
from trainer.model_files.tokenizer_files import require_whole_captions
from trainer.train.run_objective import chosen_prediction


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file"
    )


def read_run(path: Path, overrides: Sequence[str]) -> tuple[Config, RunModel]:
    """The checked configuration, and its model: looked into without loading it, or fetched from the hub."""
    require_whole_captions()
    config = load_config(path, overrides)
    place = config.model
    model = check_model(place.path, place.vae, place.tokenizer, place.text_projection)
    chosen_prediction(config.objective, model)
    return config, model
