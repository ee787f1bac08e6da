"""`sdxl-train eval RUN_DIR|CHECKPOINT`: how good are these weights?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.arguments import read_run
from trainer.cli.publish_arguments import add_weights_name
from trainer.cli.run_target import find_target
from trainer.cli.start_workers import start_workers
from trainer.config.sections.ema_config import LIVE
from trainer.publish.export_source import require_average


def main(argv: Sequence[str]) -> int:
    """Validation loss with fixed noise, a fixed-seed sample grid and the loss curve of a run or checkpoint."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train eval", description=main.__doc__, epilog="example: sdxl-train eval runs/4x3090"
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the run's")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/eval/CHECKPOINT[-NAME])")
    add_weights_name(parser)
    arguments = parser.parse_intermixed_args(argv)
    config_path, checkpoint = find_target(arguments.target)
    require_average(checkpoint, arguments.weights)
    named = checkpoint.name + (f"-{arguments.weights}" if arguments.weights != LIVE else "")
    out_dir = (arguments.out or config_path.parent / "eval" / named).absolute()
    config, _ = read_run(config_path, arguments.overrides)
    options = {"weights": str(checkpoint), "average": arguments.weights, "out_dir": str(out_dir)}
    return start_workers("evaluate", config, out_dir, options)
