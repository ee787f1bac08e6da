"""`sdxl-train import FILE`: a command or settings of another trainer as a configuration."""

from collections.abc import Sequence

from trainer.cli.commands.import_kohya import import_settings


def main(argv: Sequence[str]) -> int:
    """Turn a command of kohya's or diffusers' SDXL scripts, or OneTrainer's settings, into a configuration."""
    return import_settings(argv, "import")
