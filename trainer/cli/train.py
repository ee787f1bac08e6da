"""`sdxl-train CONFIG.yaml`: check everything that can be checked at once, prepare what is missing, train."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.arguments import add_config_arguments, read_config
from trainer.cli.start import ensure_prepared, join_or_start
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.train.run_dir import list_checkpoints, only_writer


def main(argv: Sequence[str]) -> int:
    """Train from a config file."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train",
        description="Train from a config, or go on where its run stopped.",
        epilog="example: sdxl-train configs/4x3090.yaml optimizer.lr=1e-6 train.epochs=2",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="HOW",
        help="auto (default), true, false or a checkpoint's path; the same as run.resume=HOW",
    )
    arguments = parser.parse_args(argv)
    overrides = [*arguments.overrides, *([f"run.resume={arguments.resume}"] if arguments.resume else [])]
    config = read_config(arguments.config, overrides)
    _check_resume(config)
    return join_or_start("train", config, before=_prepare_run)


def _prepare_run(config: Config) -> None:
    ensure_prepared(config)


def _check_resume(config: Config) -> None:
    """Refuse at once what `run.resume` forbids."""
    run_dir, wish = config.run.dir, config.run.resume
    if isinstance(wish, str) and wish != "auto":
        if not Path(wish).is_dir():
            raise UserError(f"run.resume = {wish}: no such checkpoint folder; give auto, true, false or its path")
        return
    existing = list_checkpoints(run_dir)
    if wish is True and not existing:
        raise UserError(f"run.resume = true: there is no checkpoint in {run_dir}; auto starts fresh where there is none")
    if wish is False and existing:
        raise UserError(
            f"run.resume = false: {run_dir} already holds a run ({existing[-1].name}); "
            "choose another run.dir, delete it, or go on with run.resume=auto"
        )
