"""`sdxl-train ema RUN_DIR --length 0.05`: a running average of a length that the run did not keep."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.errors import UserError

_EXAMPLES = """\
examples:
  sdxl-train ema runs/foxes
      which power averages the run holds
  sdxl-train ema runs/foxes --length 0.05
      the average of length 0.05, as a folder that export, eval and sample take
  sdxl-train ema runs/foxes --length 0.03 --length 0.15 --step 4000 -o averages

when to use averages, and what a length is: docs/ema.md
"""


def main(argv: Sequence[str]) -> int:
    """Compute averages of other lengths from those of kind `power` that a run's snapshots and checkpoints hold."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train ema",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the run")
    parser.add_argument(
        "--length",
        type=float,
        action="append",
        default=[],
        help="share of the run, below 0.288; may be given several times (default: list what is there)",
    )
    parser.add_argument("--step", type=int, help="as it was after this step of the run (default: the last stored)")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="where to write (default: RUN_DIR/averages)")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.run.is_dir():
        raise UserError(f"{arguments.run}: no such folder; give a run directory")
    if not arguments.length:
        _list(arguments.run)
        return 0
    for length in arguments.length:
        _write(arguments.run, length, arguments.step, arguments.out)
    return 0


def _list(run_dir: Path) -> None:
    from trainer.publish.run_averages import kept_averages, nothing_kept

    kept = kept_averages(run_dir)
    if not kept:
        raise nothing_kept(run_dir)
    for length in sorted({each.sigma_rel for each in kept}):
        steps = [each.step for each in kept if each.sigma_rel == length]
        print(f"length {length:g}: stored at {len(steps)} steps, {', '.join(map(str, steps))}")


def _write(run_dir: Path, length: float, step: int | None, out_dir: Path | None) -> None:
    from trainer.publish.run_averages import check_files, plan_average, write_average

    plan = plan_average(run_dir, length, step)
    print(plan.describe())
    files = len({stored.path for each in plan.components for stored in each.used})
    for _ in tqdm(check_files(plan), desc="checking", total=files, unit="file", disable=None, dynamic_ncols=True):
        pass
    with tqdm(
        desc="writing", total=plan.total_bytes, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:

        def on_written(count: int) -> None:
            bar.update(count)

        written = write_average(plan, out_dir, on_written)
    print(f"wrote {written}")
