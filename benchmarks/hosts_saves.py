"""Bytes that leave a host in a save to a disk of each host's own, for ddp and zero2, as a table.

    python benchmarks/hosts_saves.py [--megabytes 32]

The hosts are network namespaces on this machine (benchmarks/two_hosts.py), with two workers on each, over gloo. Bytes
are counted at the interface, headers included, less what an empty save takes. Linux only.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.two_hosts import said_by_workers
from trainer.checkpoint.saver import Folder, Saver
from trainer.checkpoint.write import TensorFile
from trainer.disks.run_disks import Disks, disks_of
from trainer.parallel.comm import init_comm, sum_floats
from trainer.parallel.environment import interface_towards
from trainer.parallel.local_shard import Held, held

_WORLD, _MBIT = 4, 1000


def main() -> None:
    """Start workers and print the table; or be one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=32.0, help="of a checkpoint")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        be_worker(arguments.megabytes)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no host is left running
    print("| strategy | checkpoint, MB | leaves each host, MB |\n|---|---|---|")
    for row in measure(arguments.megabytes):
        print(f"| {row['strategy']} | {arguments.megabytes:g} | {round(row['megabytes'], 2) + 0.0:.2f} |")


def measure(megabytes: float) -> list[dict[str, Any]]:
    """What rank 0 found."""
    with tempfile.TemporaryDirectory() as disks:
        return said_by_workers(_MBIT, __file__, ["--megabytes", str(megabytes)], {"DISKS": disks})


def be_worker(megabytes: float) -> None:
    """Save in each way, and on rank 0 print what it sent."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(os.environ["MASTER_ADDR"]) or "lo"
    comm = init_comm()
    disks, rows = disks_of(comm, local=True), []
    weights = torch.ones(4096, int(megabytes * 1e6 / 4 / 4096))
    each = len(weights) // _WORLD
    first = comm.rank * each
    share = Held(weights[first : first + each], first, tuple(weights.shape), True, weights.dtype)
    disk = Path(os.environ["DISKS"]) / str(disks.mine)
    nothing = save(disks, disk / "none", {"weights": held(weights[:0])})
    for strategy, part in (("ddp", held(weights)), ("zero2", share)):
        sent = save(disks, disk / strategy, {"weights": part})
        rows.append({"strategy": strategy, "megabytes": (sent - nothing) / 1e6})
    if comm.rank == 0:
        print(json.dumps(rows), flush=True)
    sum_floats(comm, [0.0])
    os._exit(0)


def save(disks: Disks, path: Path, tensors: dict[str, Held]) -> int:
    """Bytes that have left this host."""
    saver = Saver(disks.comm.rank, disks.comm.world, "t", disks.comm.device, None, disks)
    sum_floats(disks.comm, [0.0])
    before = sent_bytes()
    saver.begin([Folder(path, [TensorFile("unet/w.safetensors", tensors, {})], {})])
    if (reason := saver.finish(partial(sum_floats, disks.comm))) is not None:
        raise reason
    return sent_bytes() - before


def sent_bytes() -> int:
    """What has left this host by its link."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return sum(int(line.partition(":")[2].split()[8]) for line in lines if line.strip().startswith("eth-"))


if __name__ == "__main__":
    main()
