"""Several worker processes of a test: waited for as long as they work, however busy the machine is."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

IDLE_S = 180.0  # all of them together; who computes uses a processor, who waits in vain does not
_NOTICED_CPU_S = 0.5


def run_group(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Run them at once until all have ended; what they print goes into `folder`.

    None is left running, whatever happens.

    Raises:
        AssertionError: one of them failed, or they wait for each other in vain.
    """
    logs = [folder / f"worker-{rank}.log" for rank in range(len(commands))]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for command, environment, log in zip(commands, environments, logs, strict=True):
            with log.open("wb") as output:
                workers.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    # Who failed first has made the others fail, or was the reason to end them.
    codes = [worker.returncode for worker in workers]
    assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(log.read_text() for log in logs)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> None:
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
