"""`sdxl-train sample RUN_DIR|CHECKPOINT`: draw images; or one sheet of those that the training has drawn."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.arguments import read_run
from trainer.cli.publish_arguments import add_weights_name
from trainer.cli.run_target import find_target
from trainer.cli.start_workers import start_workers
from trainer.config.schema import SamplesConfig
from trainer.config.sections.ema_config import LIVE
from trainer.errors import UserError
from trainer.evaluate.drawing.places import BY_HAND, SAMPLES
from trainer.publish.export_source import require_average

_EXAMPLES = """\
examples:
  sdxl-train sample runs/foxes --prompt "a red fox in snow" samples.guidance_scale=5
      writes runs/foxes/samples/drawn/step-00001000/, and a sheet beside it
  sdxl-train sample runs/foxes --prompt-file prompts.txt samples.sampler=dpmpp_2m samples.schedule=karras
      a prompt a line, with flags such as --w 832 --h 1216 --d 7; kohya's .json and .toml as well
  sdxl-train sample runs/foxes --timeline
      writes runs/foxes/samples/timeline.png: what the training has drawn, prompts below each other, steps beside
"""


def main(argv: Sequence[str]) -> int:
    """Draw images with the weights of a run or checkpoint, by prompts or by captions of its data."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train sample",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the run's")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="prompts: .txt, .json or .toml as kohya's scripts take them"
    )
    parser.add_argument("--timeline", action="store_true", help="one sheet of what the training has drawn so far")
    parser.add_argument("--out", type=Path, help=f"where to write (default: RUN_DIR/{SAMPLES}/{BY_HAND})")
    add_weights_name(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.timeline:
        return _timeline(arguments)
    config_path, checkpoint = find_target(arguments.target)
    require_average(checkpoint, arguments.weights)
    out_dir = (arguments.out or config_path.parent / SAMPLES / BY_HAND).absolute()
    config, _ = read_run(config_path, [*arguments.overrides, *_prompts(arguments.prompt, arguments.prompt_file)])
    options = {"weights": str(checkpoint), "average": arguments.weights, "out_dir": str(out_dir)}
    return start_workers("sample", config, out_dir, options)


def _prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Overrides that put these in place of the run's prompts, if there are any."""
    if not prompts and file is None:
        return []
    # The run's count is of captions, which are not drawn now.
    values = {"prompts": prompts, "images": [], "prompt_file": None if file is None else str(file)}
    values |= {"count": SamplesConfig.model_fields["count"].default}
    return [f"samples.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


def _timeline(arguments: argparse.Namespace) -> int:
    """Of what is drawn already, in this process: no model is loaded."""
    from trainer.evaluate.drawing.timeline import timeline_sheet

    idle = {"--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file, "overrides": arguments.overrides}
    if given := [name for name, value in idle.items() if value]:
        raise UserError(f"--timeline with {', '.join(given)}: has no effect; it shows what the training has drawn")
    target: Path = arguments.target.absolute()
    run_dir = target if (target / SAMPLES).is_dir() else target.parent.parent  # of a checkpoint
    if not (run_dir / SAMPLES).is_dir():
        raise UserError(f"{target}: no run directory with samples; samples.every_steps draws while a run trains")
    average = "" if arguments.weights == LIVE else arguments.weights
    print(f"wrote {timeline_sheet(run_dir / SAMPLES, run_dir.name, average, arguments.out)}")
    return 0
