"""What `export` and `merge` have in common: where to write, in which dtypes, what is said of the file, the bar."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.model_files.modelspec import Description
from trainer.publish.plan_export import PreparedExport

_DTYPES = ("fp16", "bf16", "fp32")


def add_out_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Where to write; `out` is the help of it."""
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_weights_arguments(parser: argparse._ArgumentGroup, *more: str) -> None:
    """Dtypes (`more`: beside the usual ones) and the VAE."""
    as_stored = "same: as they are stored " if more else ""
    parser.add_argument("--dtype", choices=(*_DTYPES, *more), default="fp16", help=f"{as_stored}(default: fp16)")
    parser.add_argument(
        "--vae-dtype",
        choices=(*_DTYPES, *more),
        help="of the VAE, whose original overflows when run in fp16 (default: --dtype)",
    )
    parser.add_argument("--vae", type=Path, metavar="VAE", help="a VAE folder or file in place of the model's")


def add_weights_name(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which of a checkpoint's weights."""
    parser.add_argument(
        "--weights",
        default="live",
        metavar="NAME",
        help="live: those that train (default); or one of the run's averages, such as ema",
    )


def add_description_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person says about a model."""
    words = parser.add_argument_group("metadata")
    words.add_argument("--title", help="default: the file's name")
    for name in ("author", "description", "license"):
        words.add_argument(f"--{name}")
    words.add_argument("--tags", help="separated by commas")
    words.add_argument("--usage-hint", help="a short line, such as trigger words")
    words.add_argument("--trigger-phrase")
    words.add_argument("--thumbnail", type=Path, metavar="IMAGE", help="default: the run's newest samples, if any")


def _told_description(arguments: argparse.Namespace) -> Description:
    """What `add_description_arguments` read."""
    return Description(**{field.name: getattr(arguments, field.name, None) for field in fields(Description)})


def common_wishes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Wish` that these arguments give."""
    names = ("out", "overwrite", "dtype", "vae_dtype", "vae", "thumbnail")
    return {name: getattr(arguments, name) for name in names} | {"description": _told_description(arguments)}


def write_with_bar(prepared: PreparedExport, out: Path) -> None:
    """Write, showing how many GB are done."""
    with tqdm(
        desc="writing", total=prepared.total_bytes, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:

        def show(count: int) -> None:
            bar.update(count)

        prepared.write(show)
    for note in prepared.notes:
        print(note)
    print(f"wrote {prepared.place or out} ({prepared.total_bytes / 1e9:,.2f} GB)")
