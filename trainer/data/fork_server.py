"""The fork server that readers and pools of processes are forks of, deaf to a Ctrl-C from its first instruction on.

All that start processes by it begin here: a server that anything else had started would be ended by a SIGTERM to the
process group, and so would a reader that has not yet run its first line.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

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


def fork_into_server(begin: Callable[[], None]) -> None:
    """Have a fork of this process as the server: all that is imported here comes with it, in the same memory.

    The library's own server imports anew: 150 MB and seconds of CPU for each worker. Does nothing where a server is
    running, on systems other than Linux, and with Python 3.14 and later, which hands its server a key. No thread may
    run here yet, and no device be in use.

    Args:
        begin: called in the server first; to close what nobody else may keep open.
    """
    server: Any = forkserver._forkserver
    if sys.platform != "linux" or sys.version_info >= (3, 14) or server._forkserver_pid is not None:
        return
    resource_tracker.ensure_running()
    address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            Path(address).chmod(0o600)
            listener.listen()
            alive_read, alive_write = os.pipe()  # its readable end wakes the server when all who could ask are gone
            pid = os.fork()
            if pid == 0:
                os.close(alive_write)
                _serve(listener, alive_read, begin)
            os.close(alive_read)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_write, pid


def _serve(listener: socket.socket, alive: int, begin: Callable[[], None]) -> NoReturn:
    """The server's life, without what its parent would do at its end."""
    code = 1
    try:
        begin()
        forkserver.main(listener.detach(), alive, [])
    except SystemExit:
        code = 0
    except BaseException:
        traceback.print_exc()  # nobody else would tell
    finally:
        os._exit(code)


def hold_signals() -> None:
    """Block SIGINT and SIGTERM in this thread and those that it starts, as a fork of our server does anyway."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)


def take_signals() -> None:
    """Let SIGINT and SIGTERM end this process again, those as well that came meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_SIGNALS)
