"""A tiny process that ends the workers, and all that they have started, when the launching process is killed.

It is run by path, knows nothing of the trainer, and reads `+PID` (a worker that leads its own process group) and
`-PID` (that group is gone) on standard input. End of input with groups left means that the parent was killed.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection

GRACE_S = 0.5


def end_groups(leaders: Collection[int], reap: Callable[[], None] = lambda: None) -> None:
    """Kill each worker and what is left of its children.

    The pause lets multiprocessing's resource tracker, which ignores SIGTERM, remove shared memory first. `reap` is
    called while the workers and their children die: unreaped ones would keep their group in existence.
    """
    for leader in leaders:
        _signal_group(leader, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(leader, signal.SIGKILL)
    reap()
    deadline = time.monotonic() + GRACE_S
    while any(_signal_group(leader, 0) for leader in leaders) and time.monotonic() < deadline:
        time.sleep(0.02)
        reap()
    for leader in leaders:
        _signal_group(leader, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> bool:
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main() -> None:
    """Read until the parent is gone, then end what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    leaders: set[int] = set()
    for line in sys.stdin:
        (leaders.add if line[0] == "+" else leaders.discard)(int(line[1:]))
    end_groups(leaders)


if __name__ == "__main__":
    main()
