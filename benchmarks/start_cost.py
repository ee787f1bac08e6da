"""What a start costs: CPU and wall seconds to the first step, of the command and after a worker was killed; and memory.

    python benchmarks/start_cost.py configs/tiny.yaml --workers 4 --readers 2

Memory is the proportional set size of all processes, in which what several share counts once. Values after the
configuration replace its own, as with `sdxl-train`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from child_process import tree_memory_mb

from trainer.parallel.worker import process_name

ROOT = Path(__file__).parent.parent
_LONG_S = 600.0


def wait_for_steps(run_dir: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the run's records hold so many lines."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + _LONG_S
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}")
        time.sleep(0.02)
    raise SystemExit(f"no step in {_LONG_S:.0f} s")


def wait_for_restart(run_dir: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until a step is taken after the line that tells of the fault."""
    events, metrics = run_dir / "events.txt", run_dir / "metrics.jsonl"
    while not (events.exists() and "starting again" in events.read_text()):
        time.sleep(0.02)
    size = metrics.stat().st_size
    while metrics.stat().st_size <= size:  # the records of steps to be taken anew are cut off first
        size = min(size, metrics.stat().st_size)
        assert process.poll() is None, "the run ended"
        time.sleep(0.02)


def tree(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The command and all that it has started."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Of processes that still run, and of their children that have ended."""
    total = 0.0
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=2, help="of each worker")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="start-cost-") as folder:
        run_dir = Path(folder) / "run"
        overrides = [
            f"run.dir={run_dir}",
            f"launch.workers={arguments.workers}",
            f"data.workers={arguments.readers}",
            "samples.every_steps=0",
            "validation.every_steps=0",
            "checkpoint.every_steps=2",
            "log.every_steps=1",
            *arguments.overrides,
        ]
        command, begin = [sys.executable, "-m", "trainer", str(arguments.config), *overrides], time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_steps(run_dir, 1, process)
            started, seconds = tree(process), time.monotonic() - begin
            cpu = cpu_seconds(started)
            print(f"first step after        {cpu:7.1f} CPU s {seconds:7.1f} s")
            while not list((run_dir / "checkpoints").glob("step-*/manifest.json")):
                time.sleep(0.05)
            time.sleep(2)
            found = tree(process)
            memory_gb = tree_memory_mb(process.pid).pss * (1 << 20) / 1e9
            print(f"memory (PSS)            {memory_gb:7.2f} GB in {len(found)} processes")
            victim = next(each for each in found if each.name() == process_name(arguments.workers - 1))
            before = cpu_seconds(found)
            victim.send_signal(signal.SIGKILL)
            begin = time.monotonic()
            wait_for_restart(run_dir, process)
            seconds = time.monotonic() - begin
            cpu = cpu_seconds(tree(process)) - before
            print(f"step after a kill after {cpu:7.1f} CPU s {seconds:7.1f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
