"""`sdxl-train adapter merge|extract|inspect`: LoRAs and their kin as files."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.cli.publish_arguments import (
    add_description_arguments,
    add_out_arguments,
    add_weights_arguments,
    add_weights_name,
    common_wishes,
    write_with_bar,
)
from trainer.errors import UserError, json_text

_EXAMPLES = """\
examples:
  sdxl-train adapter inspect fox.safetensors
      what it is: kind, ranks, alpha, layers, metadata
  sdxl-train adapter merge sdxl-base.safetensors fox.safetensors --strength 0.8 -o with-fox.safetensors
      a model with the adapter in its weights; a run with an adapter may stand in place of the file
  sdxl-train adapter extract sdxl-base.safetensors tuned.safetensors --rank 32 -o tuned-lora.safetensors
      a LoRA of what differs between two models

adapters and how to train them: docs/adapters.md
"""
_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_MOST_RANK = 1024


def main(argv: Sequence[str]) -> int:
    """Put an adapter into a model, make one of two models' difference, or say what an adapter's file is."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train adapter",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="merge|extract|inspect")
    _add_merge(commands.add_parser("merge", help="put an adapter into a model"))
    _add_extract(commands.add_parser("extract", help="make a LoRA of the difference of two models"))
    inspect = commands.add_parser("inspect", help="say what an adapter's file is")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    return {"merge": _merge, "extract": _extract, "inspect": _inspect}[arguments.command](arguments)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="a single file, diffusers folder, run or checkpoint")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a .safetensors file, or a run with an adapter")
    parser.add_argument("--strength", default="1", metavar="S", help="how many times it counts (default: 1)")
    add_out_arguments(parser, "the file or folder to write")
    parser.add_argument("--layout", choices=("single-file", "diffusers"), default="single-file")
    what = parser.add_argument_group("weights")
    add_weights_arguments(what, "same")
    add_weights_name(what)
    add_description_arguments(parser)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="what the tuned model was made of")
    parser.add_argument("tuned", type=Path, metavar="TUNED")
    parser.add_argument("--rank", type=int, default=32, help="of linear layers (default: 32)")
    parser.add_argument("--conv-rank", type=int, help="of convolutions as well (default: they are left out)")
    parser.add_argument("--no-text-encoders", action="store_true", help="leave them out")
    add_out_arguments(parser, "the file to write")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="fp16", help="default: fp16")
    add_description_arguments(parser)


def _merge(arguments: argparse.Namespace) -> int:
    from trainer.publish.adapter_merge import prepare_adapter_merge
    from trainer.publish.plan_export import Wish

    wish = Wish(**common_wishes(arguments), layout=arguments.layout, weights=arguments.weights)
    strength = _strength(arguments.strength)
    write_with_bar(prepare_adapter_merge(arguments.base, arguments.adapter, strength, wish), wish.out)
    return 0


def _strength(text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength) or abs(strength) > 100:
        raise UserError(f"--strength: {text} must be a number, such as 0.8")
    return strength


def _extract(arguments: argparse.Namespace) -> int:
    from trainer.model_files.tensor_file import torch_dtype
    from trainer.publish.adapter_extract import extract, plan_extract
    from trainer.publish.plan_export import Wish

    for option, rank in (("--rank", arguments.rank), ("--conv-rank", arguments.conv_rank)):
        if rank is not None and not 1 <= rank <= _MOST_RANK:
            raise UserError(f"{option}: {rank} must be from 1 to {_MOST_RANK}")
    arguments.vae_dtype = arguments.vae = None
    wish = Wish(**common_wishes(arguments))
    texts = not arguments.no_text_encoders
    plan = plan_extract(arguments.base, arguments.tuned, arguments.rank, arguments.conv_rank, texts, wish)
    with tqdm(
        desc="extracting", total=plan.elements, unit="", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:

        def show(count: int) -> None:
            bar.update(count)

        found = extract(plan, wish, torch_dtype(_DTYPES[arguments.dtype]), show)
    print(f"{found.changed:,} of {len(plan.layers):,} layers differ; the LoRA holds {found.share:.2%} of the change")
    print(f"wrote {wish.out} ({found.total_bytes / 1e6:,.1f} MB)")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from trainer.adapters.adapter_file import open_adapter
    from trainer.adapters.adapter_report import adapter_facts, describe_adapter

    file = open_adapter(arguments.file)
    if arguments.json:
        print(json_text(adapter_facts(file)))
        return 0
    for line in describe_adapter(file):
        print(line)
    return 0
