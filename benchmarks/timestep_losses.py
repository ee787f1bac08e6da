"""What the record of training loss by timestep costs a step: `python benchmarks/timestep_losses.py [--workers N]`.

CPU microseconds of one worker, medians: of the sums themselves, of the record, and of the step's exchange over gloo
with and without their 16 numbers; of a step of 16 images in four micro-batches on each worker.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from trainer.measure.timestep_losses import PARTS, TimestepLosses, sums_by_timestep
from trainer.parallel.comm import Comm, sum_floats

MICRO_BATCHES, IMAGES = 4, 4
ROUNDS, TIMES = 15, 200
OWN = 5  # numbers that travel anyway, at least


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="of the exchange (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    positions = [torch.rand(IMAGES, dtype=torch.float64) for _ in range(MICRO_BATCHES)]
    losses, ones = torch.rand(MICRO_BATCHES * IMAGES, dtype=torch.float64), torch.ones(MICRO_BATCHES * IMAGES)
    gathered, sums = TimestepLosses(), sums_by_timestep(positions, losses, ones, ones)

    def record() -> None:
        gathered.add(sums)
        gathered.take()

    print("| what | CPU us a step |\n|---|---|")
    summed_us, taken_us = in_turns(lambda: sums_by_timestep(positions, losses, ones, ones), record)
    print(f"| sums of a worker's {len(losses)} images | {summed_us:.0f} |")
    print(f"| taken in, and a record of every 400 images | {taken_us:.0f} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(exchange, (arguments.workers, folder), arguments.workers)


def exchange(rank: int, workers: int, folder: str) -> None:
    """One worker of the exchange; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=rank, world_size=workers)
    comm = Comm(rank, workers, rank, torch.device("cpu"))
    few, many = [1.0] * OWN, [1.0] * (OWN + 2 * PARTS)
    short, long = in_turns(lambda: sum_floats(comm, few), lambda: sum_floats(comm, many))
    if rank == 0:
        print(f"| exchange of {workers} workers, {OWN} numbers | {short:.0f} |")
        print(f"| exchange of {workers} workers, {OWN + 2 * PARTS} numbers | {long:.0f} |", flush=True)
    dist.destroy_process_group()


def in_turns(*works: Callable[[], object]) -> list[float]:
    """CPU microseconds of this process, of each; in turns."""
    rounds = [[cpu_us(work) for work in works] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def cpu_us(work: Callable[[], object]) -> float:
    """The mean of a round."""
    begin = time.process_time()
    for _ in range(TIMES):
        work()
    return 1e6 * (time.process_time() - begin) / TIMES


if __name__ == "__main__":
    main()
