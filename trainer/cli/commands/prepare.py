"""`sdxl-train prepare CONFIG.yaml`: encode or index the sources into the prepared data set, new images included."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.prepare_set import PrepareWish, prepare, prepare_joined, tell_plan
from trainer.cli.start_workers import count_run_tags
from trainer.errors import UserError
from trainer.parallel.environment import joined_environment


def main(argv: Sequence[str]) -> int:
    """Encode the images of a config's sources with the VAE, on all workers; latents that are there already are only
    indexed. Can be stopped and run again at any time: it goes on with what is missing, and takes up what has changed.
    Captions, names and places of images change without encoding; what was removed leaves the set."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train prepare",
        description=main.__doc__,
        epilog="examples: sdxl-train prepare configs/4x3090.yaml data.prepared=/nvme/prepared; on several hosts that "
        "share the folder, torchrun --nnodes 2 ... -m trainer prepare CONFIG.yaml; on hosts that do not, --part 1/2 "
        "and --part 2/2, then --merge",
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
    parser.add_argument(
        "--prune",
        action="store_true",
        help="also give back the disk space of images that are gone: shards of which less than half counts are written "
        "anew, and what only older snapshots need is deleted",
    )
    parser.add_argument(
        "--look-again",
        action="store_true",
        help="look at every file; without it, metadata files, tars and parquet files of which neither size nor time "
        "has changed are taken for unchanged, with all that they describe",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what is new, changed, removed, renamed or left out and how long it would take; the prepared "
        "folder is not touched",
    )
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument(
        "--part", type=_part, metavar="K/N", help="write only the K-th of N parts of the set, on this host's drive"
    )
    hosts.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="take what is to be encoded from these prepared folders, which --part has written on other hosts",
    )
    gone = parser.add_mutually_exclusive_group()
    gone.add_argument(
        "--keep-removed",
        action="store_true",
        help="go on training on images that are not there any more, as they were prepared",
    )
    gone.add_argument(
        "--drop-removed",
        action="store_true",
        help="let all of them go, however many; otherwise more than 5 %% of a source at once is an error",
    )
    arguments = parser.parse_intermixed_args(argv)
    config, model = read_run(arguments.config, arguments.overrides)
    removed = "keep" if arguments.keep_removed else "drop" if arguments.drop_removed else "ask"
    merge, again = tuple(arguments.merge or ()), arguments.look_again
    wish = PrepareWish(arguments.repack, arguments.limit, removed, arguments.prune, arguments.part, merge, again)
    joined = joined_environment(os.environ)
    if arguments.dry_run:
        others = {"--repack": wish.repack, "--prune": wish.prune, "--part": wish.part, "--merge": wish.merge}
        if given := [name for name, value in others.items() if value]:
            parser.error(f"--dry-run tells nothing of {given[0]}; leave one of them out")
        if joined is not None:
            raise UserError("--dry-run is for one process: type it without torchrun or srun")
        return tell_plan(config, model, wish)
    if joined is not None:
        prepare_joined(config, model, wish, joined)
    code = prepare(config, model, wish)
    if code == 0 and wish.part is None:
        count_run_tags(config)
    return code


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no part such as 3/16")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)
