"""Arguments that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.config.load import load_config
from trainer.config.schema import Config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file"
    )


def read_config(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration with absolute paths, so that workers and later resumes find them from anywhere."""
    config = load_config(path, overrides)
    return Config.model_validate(_absolute(config.model_dump()))


def _absolute(value: object) -> object:
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return value
