"""`sdxl-train merge A B --alpha 0.3 -o FILE`: the weighted sum of two models."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.publish_arguments import (
    add_description_arguments,
    add_out_arguments,
    add_weights_arguments,
    common_wishes,
    write_with_bar,
)
from trainer.errors import UserError
from trainer.publish.plan_export import Wish, prepare_merge

_EXAMPLES = """\
A and B are checkpoints, runs (their newest checkpoint), diffusers folders or single files, in any mix.
Blocks are named as in the single file: input_blocks.4, middle_block, output_blocks.0.1, out, or whole parts: unet,
text_encoder_1, text_encoder_2, vae. * stands for anything, and a later --block counts before an earlier one.
The VAE is A's unless a --block names it.

examples:
  sdxl-train merge sdxl-base.safetensors runs/foxes --alpha 0.3 -o mild.safetensors
      seven tenths of the base model, three tenths of what was trained
  sdxl-train merge old.safetensors new.safetensors --alpha 0.5 --block input_blocks=0 --block text_encoder_1=0 \\
      -o mixed.safetensors
"""


def main(argv: Sequence[str]) -> int:
    """Write A * (1 - alpha) + B * alpha, computed in fp32, as one file; tensor by tensor, in little memory."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train merge",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--alpha", required=True, metavar="SHARE", help="B's share, from 0 to 1")
    parser.add_argument(
        "--block", action="append", default=[], metavar="PATTERN=SHARE", help="B's share of some blocks; repeatable"
    )
    add_out_arguments(parser, "the file to write")
    add_weights_arguments(parser.add_argument_group("weights"))
    add_description_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    wish = Wish(**common_wishes(arguments))
    alpha, blocks = _share("--alpha", arguments.alpha), [_block(text) for text in arguments.block]
    write_with_bar(prepare_merge(arguments.a, arguments.b, alpha, blocks, wish), wish.out)
    return 0


def _block(text: str) -> tuple[str, float]:
    pattern, equals, share = text.rpartition("=")
    if not equals or not pattern:
        raise UserError(f"--block {text}: wanted PATTERN=SHARE, such as input_blocks.4=0.5")
    return pattern, _share(f"--block {pattern}", share)


def _share(option: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UserError(f"{option}: {text} must be a number from 0 to 1, the share of the second model")
    return share
