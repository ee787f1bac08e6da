"""What a command is pointed at: a run directory or one of its checkpoints; a config or a prepared folder."""

import argparse
from pathlib import Path

from trainer.checkpoint.run_dir import checkpoint_at, config_beside
from trainer.config.load import load_config
from trainer.errors import UserError


def find_target(target: Path) -> tuple[Path, Path]:
    """(resolved config, checkpoint) of a run directory's newest checkpoint, or of the checkpoint itself."""
    target = target.absolute()
    if not target.is_dir():
        raise UserError(f"{target}: no such folder; give a run directory or a checkpoint in it")
    checkpoint = checkpoint_at(target)
    if checkpoint is None:
        raise UserError(f"{target}: holds no complete checkpoint; give a run directory or a checkpoint in it")
    config = config_beside(checkpoint)
    if not config.is_file():
        raise UserError(f"{config}: missing; it is written when the run starts")
    return config, checkpoint


def add_prepared_target(parser: argparse.ArgumentParser) -> None:
    """A prepared data set, by its folder or by a config that names it."""
    parser.add_argument(
        "target", type=Path, metavar="CONFIG.yaml|PREPARED_DIR", help="a configuration, or a prepared folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the config's")


def find_prepared(arguments: argparse.Namespace) -> Path:
    """The prepared folder that `add_prepared_target`'s arguments mean; a config's other paths need not exist."""
    target: Path = arguments.target
    if not target.is_dir():
        return load_config(target, arguments.overrides, check_paths=False).data.prepared
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: only a config has values to replace; {target} is a folder")
    return target
