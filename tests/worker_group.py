"""Several worker processes of a test: waited for as long as they work, however busy the machine is."""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.warm_processes import WarmProcess, run_script

IDLE_S = 180.0  # all of them together; who computes uses a processor, who waits in vain does not
_NOTICED_CPU_S = 0.5
_ROOT = Path(__file__).parents[1]


def worker_environments(world: int, on_each_host: int | None = None) -> list[dict[str, str]]:
    """Of so many workers on the CPU that meet at a free port, as torchrun tells them; they find what tests share.

    Args:
        on_each_host: how many of them call one host theirs; None: all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = on_each_host or world
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(here)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SDXL_TRAIN_DEVICE": "cpu", "PYTHONPATH": str(_ROOT)}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)} for rank in range(world)]


def run_group(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Run them at once until all have ended; what they print goes into `folder`.

    None is left running, whatever happens. A command is [python, script, arguments...], and begins with what takes long
    to import.

    Raises:
        AssertionError: one of them failed, or they wait for each other in vain.
    """
    logs = [folder / f"worker-{rank}.log" for rank in range(len(commands))]
    workers: list[WarmProcess] = []
    try:
        for command, environment, log in zip(commands, environments, logs, strict=True):
            python, script, *arguments = command
            assert python == sys.executable
            with log.open("wb") as output:
                workers.append(run_script(script, arguments, environment, output))
        _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    # Who failed first has made the others fail, or was the reason to end them.
    codes = [worker.returncode for worker in workers]
    assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(log.read_text() for log in logs)


def _wait(workers: Sequence[WarmProcess]) -> None:
    """Until all have ended, or one has failed."""
    used, since = 0.0, time.monotonic()
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or any(codes):
            return
        now = sum(_cpu_s(worker.pid) for worker in workers)
        if abs(now - used) > _NOTICED_CPU_S:  # less than before, where one has ended
            used, since = now, time.monotonic()
        assert time.monotonic() - since < IDLE_S, "the workers wait in vain"
        time.sleep(0.05)


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system
