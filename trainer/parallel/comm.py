"""The worker's place among all workers, and the few small exchanges besides gradients.

`init_comm` builds the process group and hands process and device state to `accelerate.PartialState`. The small
collectives run on the CPU over gloo, also beside NCCL: they wait for no GPU, and an error of a peer raises here.
Objects travel as JSON, never pickled: the sockets know no password.
"""

import contextlib
import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.errors import UserError
from trainer.parallel import worker
from trainer.parallel.environment import threads_per_worker

DEFAULT_TIMEOUT_S = 600.0
_SAY_EVERY_S = 30.0  # that the first worker is still at it
# What makes PartialState open a group by itself, even for one process.
_GROUP_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Comm:
    """This worker: `rank` of `world` workers, `local_rank` on its host, computing on `device`.

    `timeout_s`: how long any collective waits for the slowest worker.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    timeout_s: float = DEFAULT_TIMEOUT_S


def init_comm(timeout_s: float = DEFAULT_TIMEOUT_S) -> Comm:
    """Join the other workers; alone, no process group is opened.

    Reads the environment that `trainer.parallel.launch`, torchrun or `joined_environment` (SLURM) has set. Sets the
    number of OpenMP threads.

    Args:
        timeout_s: how long any collective waits for the slowest worker.

    Raises:
        UserError: workers were started for GPUs that this PyTorch cannot use, or has no kernels for.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = init_device()
    if device.type == "cuda" and not check_cuda_p2p_ib_support():
        # Cards of the RTX 40 series say that they reach each other's memory, and until driver 550.40.07 they do not.
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    if world == 1:
        with _hidden(_GROUP_VARIABLES):
            state = PartialState(cpu=device.type == "cpu")
    else:
        _open_group(rank, world, device, timedelta(seconds=timeout_s))
        state = PartialState(cpu=device.type == "cpu")
    built_for = state.process_index, state.num_processes, torch.device(state.device or "cpu").type
    if built_for != (rank, world, device.type):
        raise RuntimeError(f"accelerate's state was set before init_comm: {state!r}")
    return Comm(rank, world, local_rank, device, timeout_s)


def init_device() -> torch.device:
    """This worker's device, with its number of OpenMP threads set; for work that needs no other worker."""
    threads = threads_per_worker(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), None)
    # PartialState warns and chooses a number of its own where this is unset.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return _device(int(os.environ.get("LOCAL_RANK", "0")))


def _device(local_rank: int) -> torch.device:
    wanted = os.environ.get(worker.DEVICE)
    if wanted == "cpu" or (wanted is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"this host has GPUs, but PyTorch {torch.__version__} cannot use them: install its CUDA build or a newer "
            "driver, or run on the CPU: CUDA_VISIBLE_DEVICES= sdxl-train ..."
        )
    # Schedulers may show each worker its own GPU only, as number 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    if torch.version.cuda is not None:  # ROCm names its architectures otherwise
        capability = torch.cuda.get_device_capability(device)
        require_kernels(torch.cuda.get_device_name(device), capability, torch.cuda.get_arch_list())
    torch.cuda.set_device(device)
    return device


def require_kernels(card: str, capability: tuple[int, int], arch_list: Sequence[str]) -> None:
    """Raise UserError where this PyTorch has no code that runs on the card: its first kernel would fail.

    Args:
        capability: the card's compute capability, major and minor.
        arch_list: from `torch.cuda.get_arch_list`, such as `["sm_75", "sm_86", "compute_120"]`.
    """
    codes = [code for arch in arch_list if (code := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch))]
    if not codes or any(_runs_on(code, capability) for code in codes):
        return
    mend = "a PyTorch build that has"
    if (5, 0) <= capability < (7, 5):
        # As torch/cuda/__init__.py of 2.13 lists its builds: those for CUDA 12.9 and later start at 7.5.
        mend = "PyTorch 2.13's build for CUDA 12.6 (cu126)"
    raise UserError(
        f"{card} has compute capability {capability[0]}.{capability[1]}, and PyTorch {torch.__version__} has kernels "
        f"for {', '.join(arch_list)} alone: install {mend}"
    )


def _runs_on(code: re.Match[str], capability: tuple[int, int]) -> bool:
    kind, major, minor, bound_to = code.groups()
    built_for = int(major), int(minor)
    if bound_to == "a":  # to the very architecture
        return built_for == capability
    if kind == "sm" or bound_to == "f":  # machine code, or PTX for a family
        return built_for[0] == capability[0] and built_for[1] <= capability[1]
    return built_for <= capability


def _open_group(rank: int, world: int, device: torch.device, timeout: timedelta) -> None:
    if worker.STORE_PORT in os.environ:
        attempt = os.environ[worker.ATTEMPT]
        # Rank 0 serves on the socket that the parent has bound.
        listen_fd = int(os.environ[worker.STORE_FD]) if rank == 0 else None
        port = int(os.environ[worker.STORE_PORT])
        store = TCPStore(
            "127.0.0.1", port, world, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listen_fd
        )
    else:
        # torchrun keeps one store over its restarts; without a prefix, workers would read dead workers' addresses.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, world = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    keep_group_alive()


def keep_group_alive(group: dist.ProcessGroup | None = None) -> None:
    """Let a process group's object, by default that of all, live as long as the process; call this once it is open.

    Whoever drops the last reference to a gloo group, such as DDP's reducer, waits for gloo's threads with the
    interpreter's lock in hand, while one of them that lets go of its last tensor waits for that lock: a deadlock, with
    torch 2.13 on busy cores within some hundred groups. `destroy_process_group` still ends the connections.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD if group is None else group))


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Without these environment variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def sum_floats(comm: Comm, values: list[float]) -> list[float]:
    """Sums over all workers, in float64 and bit for bit the same on each; every worker gives as many values."""
    if comm.world == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def barrier(comm: Comm) -> None:
    """Wait for all workers' Python code (not for their GPUs)."""
    sum_floats(comm, [0.0])


def gather_objects(comm: Comm, value: Any) -> list[Any]:
    """Every worker's `value`, by rank, on every worker. Values are what JSON can say; tuples become lists."""
    payload = json.dumps(value).encode()
    if comm.world == 1:
        return [json.loads(payload)]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(comm.world)]
    dist.all_gather(lengths, torch.tensor([len(payload)]))
    sizes = [int(length) for length in lengths]
    parts = [torch.zeros(max(sizes), dtype=torch.uint8) for _ in sizes]
    padded = payload.ljust(max(sizes))
    dist.all_gather(parts, torch.frombuffer(bytearray(padded), dtype=torch.uint8))
    return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def gather_tensors(comm: Comm, tensor: Tensor) -> Tensor:
    """Every worker's tensor, one after the other by rank along the first axis; all of one shape, on the CPU."""
    if comm.world == 1:
        return tensor
    as_bytes = tensor.contiguous().view(torch.uint8)  # gloo has not every dtype
    parts = [torch.empty_like(as_bytes) for _ in range(comm.world)]
    dist.all_gather(parts, as_bytes)
    return torch.cat(parts).view(tensor.dtype)


def broadcast_object(comm: Comm, value: Any = None, source: int = 0) -> Any:
    """Rank `source`'s `value` on every worker; what the others give is not looked at. Values as in `gather_objects`."""
    payload = json.dumps(value).encode() if comm.rank == source else b""
    if comm.world == 1:
        return json.loads(payload)
    length = torch.tensor([len(payload)])
    dist.broadcast(length, source)
    buffer = torch.zeros(int(length), dtype=torch.uint8)
    if comm.rank == source:
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(buffer, source)
    return json.loads(buffer.numpy().tobytes())


def done_by_first(comm: Comm, work: Callable[[], Any]) -> Any:
    """What rank 0's `work` returns, on every worker; it may take longer than an exchange waits for the slowest.

    Values as in `gather_objects`. The work is done in a thread, and what it raises is raised on rank 0.
    """
    if comm.world == 1:
        return broadcast_object(comm, work())
    if comm.rank:
        while not broadcast_object(comm):
            pass
        return broadcast_object(comm)
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work)
        while not broadcast_object(comm, bool(wait([doing], _SAY_EVERY_S).done)):
            pass
        return broadcast_object(comm, doing.result())


class FailedBeside(Exception):
    """Work beside the training failed on some worker; every worker raises it, so that none waits for another."""


@contextlib.contextmanager
def failing_together(comm: Comm) -> Iterator[None]:
    """Local work without exchanges; all workers leave it together, and fail if one of them did.

    Raises:
        FailedBeside: with the reasons of all that failed; the own error is its cause.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    reason = None if own is None else f"{type(own).__name__}: {own}"
    reasons = [said for said in gather_objects(comm, reason) if said is not None]
    if reasons:
        raise FailedBeside("; ".join(dict.fromkeys(reasons))) from own


def close(comm: Comm) -> None:
    """Leave together, at the end of a run that went well; a worker that failed just ends."""
    if comm.world > 1:
        barrier(comm)
        dist.destroy_process_group()
