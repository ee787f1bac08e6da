"""Arguments that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model.folder import check_model_folder


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file"
    )


def read_config(path: Path, overrides: Sequence[str]) -> Config:
    """The checked configuration; the model's folder is looked into as well, without loading anything."""
    config = load_config(path, overrides)
    check_model_folder(config.model.path, config.model.vae)
    return config
