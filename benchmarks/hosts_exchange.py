"""Seconds of an exchange between four workers on two hosts that a slow link joins, by way, size and link, as a table.

    python benchmarks/hosts_exchange.py [--mbit 50,100,200] [--megabytes 4,16] [--json]

The hosts are network namespaces on this machine, whose link `tc tbf` limits (benchmarks/two_hosts.py), with two
workers on each, over gloo. "ring" is PyTorch's all-reduce, "shares" what `exchange.method` does with the same bytes:
each worker gets a share of all others', and sends its sum to all. Median of three, on the slowest worker. The link is
slow so that it, and not this machine, is what is timed. `--json` prints the rows for `scaling_points.py`. Linux only.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from benchmarks.two_hosts import said_by_workers
from trainer.parallel.environment import interface_towards

_WORLD, _TIMES = 4, 3


def main() -> None:
    """Start workers for each link and print the table; or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", default="50,100,200", help="of the link, each way")
    parser.add_argument("--megabytes", default="4,16", help="of what each worker has")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sizes = [float(size) for size in arguments.megabytes.split(",")]
    if "RANK" in os.environ:
        be_worker(sizes)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no host is left running
    rows: list[dict[str, Any]] = []
    print("| link, Mbit/s | way | MB | s |\n|---|---|---|---|")
    for mbit in map(int, arguments.mbit.split(",")):
        for row in measure(mbit, arguments.megabytes):
            rows.append({"mbit": mbit, **row})
            print(f"| {mbit:,} | {row['way']} | {row['megabytes']:g} | {row['seconds']:.2f} |", flush=True)
    if arguments.json:
        print(json.dumps(rows))


def measure(mbit: int, megabytes: str) -> list[dict[str, Any]]:
    """What rank 0 found over one link."""
    return said_by_workers(mbit, __file__, ["--megabytes", megabytes])


def be_worker(megabytes: list[float]) -> None:
    """Exchange in each way, and on rank 0 print how long it took."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(os.environ["MASTER_ADDR"]) or "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for size in megabytes:
        content = torch.ones(int(size * 1e6 / 4 / _WORLD) * _WORLD)
        for name, exchange in (("ring", dist.all_reduce), ("shares", exchange_shares)):
            seconds = []
            for _ in range(_TIMES):
                dist.barrier()
                begin = time.perf_counter()
                exchange(content)
                slowest = torch.tensor([time.perf_counter() - begin])
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                seconds.append(slowest.item())
            rows.append({"way": name, "megabytes": size, "seconds": median(seconds)})
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    os._exit(0)


def exchange_shares(content: torch.Tensor) -> None:
    """A share of everyone's to its owner, and the owner's sum to everyone."""
    received = torch.empty_like(content)
    dist.all_to_all_single(received, content)
    shares = [torch.empty(len(content) // _WORLD) for _ in range(_WORLD)]
    dist.all_gather(shares, received.view(_WORLD, -1).sum(0))


if __name__ == "__main__":
    main()
