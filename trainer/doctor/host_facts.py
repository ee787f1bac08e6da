"""Processor, memory, limits and PyTorch's build, as the kernel and the installed files tell them."""

import ast
import importlib.util
import os
import re
import resource
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.doctor.kernel_files import names_in, number_of, sizes_of, text_of
from trainer.host.cores import CacheDomain, read_domains
from trainer.host.process_memory import read_memory

_ROOT = Path("/")
_BUSY = 0.75  # of the hardware threads
_MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
_FULL = re.compile(r"^full .*avg60=([0-9.]+)", re.MULTILINE)
_RELEASE = re.compile(r"\d+(\.\d+)*")


@dataclass(frozen=True)
class ProcessorFacts:
    """The processor.

    Attributes:
        model: as it names itself; "" where the kernel does not tell.
        sockets: how many there are.
        nodes: NUMA nodes that have cores.
        domains: those of `read_domains`: cores that share a level-3 cache, of what this process may use.
        threads: hardware threads that this process may use.
        is_virtual: the kernel runs in a virtual machine, whose layout need not be that of the hardware.
        load: how many processes wanted to run, on average of the last minute, before anything was measured.
    """

    model: str
    sockets: int
    nodes: int
    domains: tuple[CacheDomain, ...]
    threads: int
    is_virtual: bool
    load: float

    @property
    def is_busy(self) -> bool:
        """Whether others compute as well, so that what is measured is what they leave."""
        return self.load > _BUSY * self.threads

    @property
    def cores(self) -> int:
        """Cores that this process may use; 0 where the kernel does not tell of cores."""
        return sum(len(domain.cores) for domain in self.domains)


@dataclass(frozen=True)
class MemoryFacts:
    """Memory in bytes; None where the kernel does not tell.

    Attributes:
        total, available: of the host, or of the container if that has a limit.
        swap_total, swap_used: of the host.
        stalled_percent: share of the last minute in which all that wanted to run waited for memory.
        shm_total, shm_free: of /dev/shm; None where there is none.
    """

    total: int | None
    available: int | None
    swap_total: int
    swap_used: int
    stalled_percent: float | None
    shm_total: int | None
    shm_free: int | None


@dataclass(frozen=True)
class LimitFacts:
    """Of this process, as a run would have them; None: no limit.

    Attributes:
        open_files: how many files it may have open.
        locked_bytes: memory that it may lock.
        has_rdma: there is a network adapter for which memory is locked.
    """

    open_files: int | None
    locked_bytes: int | None
    has_rdma: bool


@dataclass(frozen=True)
class SoftwareFacts:
    """What is installed.

    Attributes:
        kernel: its release, the numbers alone.
        torch: PyTorch's version; None: not installed.
        torch_cuda: the version of CUDA that it was built for; None: it was built for none.
    """

    kernel: str
    torch: str | None
    torch_cuda: str | None


def read_processor(allowed: Collection[int] | None = None, root: Path = _ROOT) -> ProcessorFacts:
    """The processor, of what this process may use.

    Args:
        allowed: numbers of hardware threads; None: as the kernel says of this process.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    told = text_of(root / "proc" / "cpuinfo") or ""
    model = _MODEL.search(told)
    cpus = root / "sys" / "devices" / "system" / "cpu"
    sockets = {number_of(cpus / f"cpu{cpu}" / "topology" / "physical_package_id") for cpu in allowed} - {None}
    nodes = root / "sys" / "devices" / "system" / "node"
    with_cores = [name for name in names_in(nodes) if name.startswith("node") and text_of(nodes / name / "cpulist")]
    return ProcessorFacts(
        model=model.group(1).strip() if model else "",
        sockets=max(1, len(sockets)),
        nodes=max(1, len(with_cores)),
        domains=tuple(read_domains(allowed, root / "sys")),
        threads=len(allowed),
        is_virtual=re.search(r"^flags\s*:.*\bhypervisor\b", told, re.MULTILINE) is not None,
        load=_load(root),
    )


def _load(root: Path) -> float:
    words = (text_of(root / "proc" / "loadavg") or "").split()
    try:
        return float(words[0]) if words else 0.0
    except ValueError:
        return 0.0


def read_host_memory(root: Path = _ROOT) -> MemoryFacts:
    """Memory, swap and shared memory now."""
    fields = sizes_of(root / "proc" / "meminfo")
    memory = read_memory((), root / "proc", root / "sys" / "fs" / "cgroup")
    stalled = _FULL.search(text_of(root / "proc" / "pressure" / "memory") or "")
    shm = _room(root / "dev" / "shm")
    swap = fields.get("SwapTotal", 0)
    return MemoryFacts(
        total=memory and memory.total,
        available=memory and memory.available,
        swap_total=swap,
        swap_used=swap - fields.get("SwapFree", 0),
        stalled_percent=float(stalled.group(1)) if stalled else None,
        shm_total=shm and shm[0],
        shm_free=shm and shm[1],
    )


def _room(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def read_limits(root: Path = _ROOT) -> LimitFacts:
    """The limits of this process."""
    files, locked = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = resource.RLIM_INFINITY
    return LimitFacts(
        open_files=None if files == unlimited else files,
        locked_bytes=None if locked == unlimited else locked,
        has_rdma=bool(names_in(root / "sys" / "class" / "infiniband")),
    )


def read_software() -> SoftwareFacts:
    """The kernel and PyTorch, which is not imported for it."""
    release = _RELEASE.match(os.uname().release)
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    return SoftwareFacts(release.group() if release else "", torch, _built_for() if torch else None)


def _built_for() -> str | None:
    """The `cuda` of torch/version.py, which holds plain assignments."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    for node in ast.parse(text_of(Path(found.origin).parent / "version.py") or "").body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node, ast.AnnAssign):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            return value if isinstance(value, str) else None
    return None
