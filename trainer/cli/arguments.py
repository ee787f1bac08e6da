"""Arguments that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.run_dir import CHECKPOINTS, RESOLVED_CONFIG
from trainer.config.load import load_config
from trainer.config.prompt_file import with_prompts_read
from trainer.config.schema import Config
from trainer.config.section_rules.rules_samples import require_sampler
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


def in_its_directory(config: Config, path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration; where it lies in a run directory, that is the run's, also if it was moved or copied."""
    home = path.absolute().parent
    said = any(override.partition("=")[0].strip() == "run.dir" for override in overrides)
    if said or path.name != RESOLVED_CONFIG or not (home / CHECKPOINTS).is_dir():
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": home})})


def read_run(path: Path, overrides: Sequence[str]) -> tuple[Config, RunModel]:
    """The checked configuration, into which its prompt file is read, and its model: looked into without loading it, or
    fetched from the hub."""
    require_whole_captions()
    config = with_prompts_read(in_its_directory(load_config(path, overrides), path, overrides))
    place = config.model
    model = check_model(place.path, place.vae, place.tokenizer, place.text_projection, config.limits.plain())
    require_sampler(config.samples, chosen_prediction(config.objective, model).kind)
    return config, model
