"""How much memory the workers hold, with all that they have started, and how much the host has left. From /proc."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HostMemory:
    """Bytes at one moment.

    Attributes:
        available: that the host, or the container if that has a limit, can still give without swapping.
        total: of the host or the container.
        by_worker: of each worker with its reader processes; pages of files are not counted, for the kernel takes them
            back when it needs them.
    """

    available: int
    total: int
    by_worker: tuple[int, ...]


def read_memory(sessions: Collection[int], proc: Path = _PROC, cgroup: Path = _CGROUP) -> HostMemory | None:
    """The memory now; None where this system does not tell.

    Args:
        sessions: of each worker its process id, which all that it starts have as their session.
    """
    host = _fields(proc / "meminfo")
    if "MemAvailable" not in host:
        return None
    held = dict.fromkeys(sessions, 0)
    for process in proc.iterdir() if held else ():
        if process.name.isdecimal() and (session := _session(process)) in held:
            own = _fields(process / "status")
            held[session] += own.get("RssAnon", 0) + own.get("RssShmem", 0) * (int(process.name) == session)
    total, available = host["MemTotal"], host["MemAvailable"]
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None and limit < total:
        files = _cgroup_files(cgroup)
        total, available = limit, min(available, max(0, limit - used + files))
    return HostMemory(available, total, tuple(held.values()))


def _session(process: Path) -> int:
    try:
        return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[3])
    except (OSError, IndexError, ValueError):
        return -1  # it has just ended


def _fields(file: Path) -> dict[str, int]:
    """Lines like "RssAnon:  123 kB", in bytes."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = [line.split() for line in lines if line.endswith(" kB")]
    return {words[0].rstrip(":"): int(words[1]) * _KIB for words in pairs if len(words) == 3}


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cgroup_files(cgroup: Path) -> int:
    """Pages of files that are counted as used, and given back when somebody needs them."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
