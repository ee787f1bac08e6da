"""`sdxl-train prepare CONFIG.yaml`: encode images into the prepared data set, new ones included."""

import argparse
from collections.abc import Sequence

from trainer.cli.arguments import add_config_arguments, read_config
from trainer.cli.start import prepare


def main(argv: Sequence[str]) -> int:
    """Encode the images of a config's sources with the VAE, on all workers. Can be stopped and run again at any time:
    it goes on with what is missing, and picks up new images."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train prepare",
        description=main.__doc__,
        epilog="example: sdxl-train prepare configs/4x3090.yaml data.prepared=/nvme/prepared",
    )
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return prepare(read_config(arguments.config, arguments.overrides))
