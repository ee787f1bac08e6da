"""What this host and its scheduler offer: GPUs, CPU cores, and a job that somebody else has started.

Nothing here imports torch: the command's parent process asks these questions before any worker exists.
"""

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from trainer.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
_PORT_BASE = 15000  # below Linux's range of ephemeral ports, which starts at 32768
_PORT_SPAN = 15000
_SIOCGIFADDR = 0x8915  # of Linux: an interface's IPv4 address


def detect_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One line for each NVIDIA GPU that workers may use; empty when there is none. Never raises.

    `CUDA_VISIBLE_DEVICES` chooses as CUDA does: the list ends at its first entry that names no GPU. The order
    is `nvidia-smi`'s (by PCI bus), which on hosts of mixed cards may differ from CUDA's.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return []
    listed = _nvidia_smi_lines()
    if visible is None:
        return [line for line in listed or [] if line.startswith("GPU ")]
    wanted = [entry.strip() for entry in visible.split(",")]
    if listed is None:
        # A container may carry the driver without its tool: then the variable is all there is to go by.
        return wanted if any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")) else []
    chosen: list[str] = []
    for entry in wanted:
        is_index = entry.isdecimal()
        matches = [line for line in listed if (line.startswith(f"GPU {int(entry)}:") if is_index else entry in line)]
        if not entry or not matches:
            break
        chosen.append(matches[0])
    return chosen


def _nvidia_smi_lines() -> list[str] | None:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=30)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.strip() for line in listing.stdout.splitlines() if line.strip()]
    # It may fail for one card that is gone, and still list the others.
    return lines if not listing.returncode else [line for line in lines if line.startswith("GPU ")]


def choose_workers(requested: int | None, gpus: Sequence[str]) -> tuple[int, bool]:
    """(number of workers, whether they use GPUs): one per GPU, or `requested` (default 1) workers on the CPU.

    Raises:
        UserError: more workers than GPUs; NCCL cannot share a GPU between two workers.
    """
    if not gpus:
        return requested or 1, False
    if requested is not None and requested > len(gpus):
        raise UserError(
            f"launch.workers: {requested} is more than this host's GPUs ({len(gpus)}). Give at most {len(gpus)}, "
            "or run on the CPU: CUDA_VISIBLE_DEVICES= sdxl-train ..."
        )
    return requested or len(gpus), True


def available_cores() -> int:
    """CPU cores that this process may use: its affinity mask, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def threads_per_worker(workers: int, configured: int | None, environ: Mapping[str, str] = os.environ) -> int:
    """OpenMP threads per worker: the configured number, else an exported `OMP_NUM_THREADS`, else cores / workers."""
    if configured is not None:
        return configured
    exported = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if exported.isdecimal() and int(exported) > 0:
        return int(exported)
    return max(1, available_cores() // workers)


def set_nccl(settings: Mapping[str, str], environ: MutableMapping[str, str]) -> list[str]:
    """Put NCCL's settings into `environ`, where it reads them when a group is opened; what the shell has said stays.

    Returns:
        `NAME=value` of all variables of NCCL, the shell's as well.
    """
    for name, value in settings.items():
        environ.setdefault(name, value)
    return [f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith("NCCL_")]


def joined_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The rank variables of a job that torchrun or `srun` has started, or None: then this command launches itself.

    Returns `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, to be put into
    `os.environ` before `trainer.parallel.comm.init_comm`.
    """
    if all(environ.get(name) for name in _TORCHRUN):
        rest = {
            "LOCAL_WORLD_SIZE": environ.get("LOCAL_WORLD_SIZE", "1"),
            "MASTER_PORT": environ.get("MASTER_PORT", "29500"),
        }
        return {name: environ[name] for name in _TORCHRUN} | rest
    return _slurm_environment(environ)


def interface_settings(joined: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For workers on several hosts, where nobody has chosen: the network interface that leads to rank 0's host.

    Left alone, gloo takes the address that the host's own name resolves to, which is the loopback's on many systems,
    and no other host finds it there.

    Args:
        joined: from `joined_environment`.
    """
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    if joined["WORLD_SIZE"] == joined["LOCAL_WORLD_SIZE"] or all(name in environ for name in names):
        return {}
    interface = interface_towards(joined["MASTER_ADDR"])
    if interface is None or interface == "lo":  # the name may be the loopback's here and another's elsewhere
        return {}
    return {name: interface for name in names if name not in environ}


def interface_towards(host: str) -> str | None:
    """Name of the network interface that has the IPv4 address from which packets go to `host`; None if unknown."""
    if sys.platform != "linux":
        return None
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, chooses a route
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # one without such an address
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == own:
                        return name
    except OSError:
        return None
    return None


def _slurm_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    # A batch script has rank variables too, but only what srun starts is in a step, and a shell that was opened
    # inside an allocation is a step of one task.
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    if not all(environ.get(name) for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")) or int(tasks) <= 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes and not environ.get("MASTER_ADDR"):
        raise UserError("SLURM_JOB_NODELIST is not set: export MASTER_ADDR=<host of task 0>")
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or tasks
    step, job = int(environ["SLURM_STEP_ID"]), int(environ.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(tasks_per_node, int(environ.get("SLURM_NODEID", "0")))),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_slurm_host(nodes),
        # 7919 is prime: neighbouring steps of neighbouring jobs on one host get different ports.
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_PORT_BASE + (job + 7919 * step) % _PORT_SPAN),
    }


def first_slurm_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `node[07-09,12],login1` gives `node07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""


def _tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Tasks on the `node`-th host, from SLURM's run lengths: `4(x2),3` is 4, 4 and 3."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1
