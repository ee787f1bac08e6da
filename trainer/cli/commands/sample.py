"""`sdxl-train sample RUN_DIR|CHECKPOINT`: draw images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.arguments import read_run
from trainer.cli.publish_arguments import add_weights_name
from trainer.cli.run_target import find_target
from trainer.cli.start_workers import start_workers
from trainer.config.schema import SamplesConfig
from trainer.config.sections.ema_config import LIVE
from trainer.publish.export_source import require_average


def main(argv: Sequence[str]) -> int:
    """Draw images with the weights of a run or checkpoint, by prompts or by captions of its data."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train sample",
        description=main.__doc__,
        epilog='example: sdxl-train sample runs/4x3090 --prompt "a red fox in snow" samples.guidance_scale=5',
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the run's")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/sample/CHECKPOINT[-NAME])")
    add_weights_name(parser)
    arguments = parser.parse_intermixed_args(argv)
    config_path, checkpoint = find_target(arguments.target)
    require_average(checkpoint, arguments.weights)
    named = checkpoint.name + (f"-{arguments.weights}" if arguments.weights != LIVE else "")
    out_dir = (arguments.out or config_path.parent / "sample" / named).absolute()
    config, _ = read_run(config_path, arguments.overrides)
    if arguments.prompt:
        # The run's count is of captions, which are not drawn now.
        count = SamplesConfig.model_fields["count"].default
        samples = config.samples.model_copy(update={"prompts": arguments.prompt, "count": count})
        config = config.model_copy(update={"samples": samples})
    options = {"weights": str(checkpoint), "average": arguments.weights, "out_dir": str(out_dir)}
    return start_workers("sample", config, out_dir, options)
