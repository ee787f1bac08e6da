"""The fork server that readers and pools of processes are forks of, deaf to a Ctrl-C from its first instruction on.

All that start processes by it begin here: a server that anything else had started would be ended by a SIGTERM to the
process group, and so would a reader that has not yet run its first line.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

_HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def fork_server(preload: Sequence[str] = ()) -> ForkServerContext:
    """The context to start processes by, whose server is started where it is not running yet.

    A process that comes from it holds back SIGINT and SIGTERM until it calls `take_signals`.

    Args:
        preload: modules that the server imports once for all its forks, beside the caller; a server that is already
            running does not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # first, because it unblocks the signals that are blocked below
    # A blocked signal stays blocked in what is started.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def hold_signals() -> None:
    """Block SIGINT and SIGTERM in this thread and those that it starts, as a fork of our server does anyway."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)


def take_signals() -> None:
    """Let SIGINT and SIGTERM end this process again, those as well that came meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_SIGNALS)
