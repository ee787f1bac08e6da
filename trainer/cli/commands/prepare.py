"""`sdxl-train prepare CONFIG.yaml`: encode or index the sources into the prepared data set, new images included."""

import argparse
from collections.abc import Sequence

from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.start_workers import count_run_tags, prepare


def main(argv: Sequence[str]) -> int:
    """Encode the images of a config's sources with the VAE, on all workers; latents that are there already are only
    indexed. Can be stopped and run again at any time: it goes on with what is missing, and picks up new images."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train prepare",
        description=main.__doc__,
        epilog="example: sdxl-train prepare configs/4x3090.yaml data.prepared=/nvme/prepared",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--repack",
        action="store_true",
        help="also convert latents that are used where they lie (.npz files, tars) into fp16 shards with checksums; "
        "half the bytes",
    )
    parser.add_argument(
        "--limit", type=_count, metavar="N", help="look at no more than the first N images that each source lists"
    )
    arguments = parser.parse_intermixed_args(argv)
    config, model = read_run(arguments.config, arguments.overrides)
    code = prepare(config, model, arguments.repack, arguments.limit)
    if code == 0:
        count_run_tags(config)
    return code


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)
