"""What each worker of `exchange` does: all-reduces of some sizes, and with cards, copies to them and between them."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from trainer.parallel.comm import Comm, broadcast_object, close, gather_objects, init_comm
from trainer.parallel.worker import run_worker

_MIB = 1 << 20
_WARM_UP = 2
_FEWEST, _MOST = 5, 500
_COPY_BYTES = 256 * _MIB
_COPY_S = 2.0  # long enough for a card to leave its power saving, and for its readings to be taken
_PROBE_BYTES = 16 * _MIB
_SLICE = 8  # exchanges between two looks at the clock
_BUDGET_S = 20.0  # of all sizes; larger ones are left out where they would take longer, as on a machine that is busy


def main() -> None:
    """Measure, as the arguments say; rank 0 writes what was found."""
    found, said, sizes, per_size_s, copies = json.loads(sys.argv[1])

    def body(stop_requested: Callable[[], bool]) -> None:
        comm = init_comm(timeout_s=60.0)
        record = _measure(comm, sizes, per_size_s, Path(said), copies=copies)
        if comm.rank == 0:
            Path(found).write_text(json.dumps(record))
        close(comm)

    run_worker(body)


def _measure(comm: Comm, sizes: Sequence[int], per_size_s: float, said: Path, *, copies: bool) -> dict[str, object]:
    def say(text: str) -> None:
        if comm.rank == 0:
            said.write_text(text)

    on_cards = comm.device.type == "cuda"
    cards: list[list[float]] = []
    if on_cards and copies:
        say("copying to the cards and back")
        gather_objects(comm, None)  # all at once, as in a run
        cards = gather_objects(comm, _copy_speeds(comm.device))
    between = copies and on_cards and comm.rank == 0 and torch.cuda.device_count() > 1
    arrived = _copies_between_cards() if between else None
    by_size: list[object] = []
    began, each_s, last = time.perf_counter(), 0.0, 0
    for size in sizes if comm.world > 1 else ():
        # By worker 0's word, or one would wait for exchanges that another has left out.
        expected_s = (_WARM_UP + _FEWEST) * each_s * size / max(last, 1)
        if broadcast_object(comm, time.perf_counter() - began + expected_s > _BUDGET_S):
            break
        say(f"all-reduce of {size // _MIB} MiB")
        times = _all_reduce(comm, size, per_size_s)
        by_size.append([size, gather_objects(comm, times)])
        each_s, last = sorted(times)[len(times) // 2], size
    version = ".".join(map(str, nccl.version())) if on_cards and dist.is_nccl_available() else ""
    return {"sizes": by_size, "cards": cards, "copies": arrived, "nccl": version}


def _all_reduce(comm: Comm, size: int, limit_s: float) -> list[float]:
    """Seconds of each exchange, as this worker saw them; as many by every worker."""
    # bf16 as gradients are; zeros stay zeros, however often they are added.
    tensor = torch.zeros(size // 2, dtype=torch.bfloat16, device=comm.device)
    for _ in range(_WARM_UP):
        _timed(comm, tensor)
    times: list[float] = []
    began, many = time.perf_counter(), _FEWEST
    while len(times) < _MOST:
        times += [_timed(comm, tensor) for _ in range(many)]
        passed_s = time.perf_counter() - began
        many = broadcast_object(comm, min(_SLICE, int((limit_s - passed_s) * len(times) / passed_s)))
        if many < 1:
            break
    return times


def _timed(comm: Comm, tensor: torch.Tensor) -> float:
    on_card = comm.device.type == "cuda"
    if not on_card:
        dist.barrier()  # processes on few cores are not where the others are; cards wait for each other anyway
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if on_card:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _copy_speeds(device: torch.device) -> list[float]:
    """Bytes a second to the card and back, from page-locked memory."""
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    speeds = []
    for target, source in ((card, host), (host, card)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < _COPY_S:
            for _ in range(4):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            count += 4
        speeds.append(count * _COPY_BYTES / (time.perf_counter() - start))
    return speeds


def _copies_between_cards() -> dict[str, bool]:
    """Whether data arrive as they were, of every pair that says it reads the other's memory.

    With an IOMMU that translates, or a patched driver, such copies may succeed and bring something else.
    """
    found = {}
    for one in range(torch.cuda.device_count()):
        for other in range(torch.cuda.device_count()):
            if one == other or not torch.cuda.can_device_access_peer(one, other):
                continue
            values = torch.randint(0, 256, (_PROBE_BYTES,), dtype=torch.uint8)
            arrived = values.to(f"cuda:{one}").to(f"cuda:{other}").cpu()
            found[f"{one} to {other}"] = bool(torch.equal(arrived, values))
    return found
