"""`sdxl-train export CHECKPOINT -o FILE`: write a model as others read it."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from trainer.cli.publish_arguments import (
    add_description_arguments,
    add_out_arguments,
    add_weights_arguments,
    add_weights_name,
    common_wishes,
    write_with_bar,
)
from trainer.errors import UserError
from trainer.model_files.modelspec import Description
from trainer.publish.plan_export import Wish, prepare_export

_EXAMPLES = """\
examples:
  sdxl-train export runs/foxes -o foxes-v1.safetensors --title "Foxes v1" --author me
      the newest checkpoint of a run as one file with SDXL's original names, in fp16: for A1111, ComfyUI, Forge,
      InvokeAI and diffusers
  sdxl-train export runs/foxes/checkpoints/step-00002000 -o foxes.safetensors --dtype bf16 --vae sdxl-vae-fp16-fix
  sdxl-train export runs/foxes --weights ema -o foxes-ema.safetensors
      a running average that the run kept (docs/ema.md)
  sdxl-train export runs/foxes --layout diffusers -o foxes-v1
  sdxl-train export runs/fox-lora -o fox.safetensors
      a run with an adapter gives the adapter alone, with kohya's names; --layout peft gives a folder for PEFT
  sdxl-train export model.safetensors --dtype same --layout diffusers -o model

what publishing a model takes: docs/publish.md
"""


def main(argv: Sequence[str]) -> int:
    """Write a checkpoint or any SDXL as one file with the original key names, or as a diffusers folder."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train export",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    _refuse_idle_options(arguments)
    wish = Wish(
        **common_wishes(arguments),
        layout=arguments.layout,
        weights=arguments.weights,
        model=arguments.model,
        text_projection="kohya" if arguments.kohya_compat else "correct",
        source_projection="kohya" if arguments.from_kohya else "correct",
        tokenizer=arguments.tokenizer,
        prediction_type=arguments.prediction_type,
        ztsnr=arguments.ztsnr,
        with_thumbnail=not arguments.no_thumbnail,
        with_config=not arguments.no_config,
    )
    prepared = prepare_export(arguments.source, wish)
    write_with_bar(prepared, wish.out)
    return 0


def _refuse_idle_options(arguments: argparse.Namespace) -> None:
    """Options that would do nothing in the layout that is asked for."""
    of_file = ["kohya_compat", "thumbnail", "no_thumbnail", "no_config", *(field.name for field in fields(Description))]
    idle = ["tokenizer"] if arguments.layout == "single-file" else of_file
    for name in idle:
        if getattr(arguments, name, None):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: has no effect with --layout {arguments.layout}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, a run directory (its newest checkpoint), a diffusers folder or a .safetensors file",
    )
    add_out_arguments(parser, "the file or folder to write")
    parser.add_argument("--layout", choices=("single-file", "diffusers", "peft"), default="single-file")
    what = parser.add_argument_group("weights")
    add_weights_arguments(what, "same")
    add_weights_name(what)
    what.add_argument(
        "--model", type=Path, help="where the parts that were not trained come from (default: the run's model)"
    )
    what.add_argument(
        "--kohya-compat",
        action="store_true",
        help="text_projection as kohya's scripts keep it; only to go on training with them",
    )
    what.add_argument(
        "--from-kohya", action="store_true", help="the file that is read was saved by kohya's scripts: undo the above"
    )
    what.add_argument("--tokenizer", type=Path, metavar="DIR", help="for --layout diffusers; default: the model's")
    what.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction", "flow"),
        help="v_prediction sets the marker v_pred (default: what the model says)",
    )
    what.add_argument("--ztsnr", action="store_true", help="set the marker of zero terminal SNR")
    add_description_arguments(parser)
    parser.add_argument("--no-thumbnail", action="store_true")
    parser.add_argument("--no-config", action="store_true", help="leave the run's configuration out")
