"""A `python` whose `-m trainer` begins warm, for scripts that start it: torchrun's and SLURM's, on hosts of a test too.

What runs instead is a fork of this test process's template, in the namespaces of whoever asked. It ends with that, and
that with it.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.warm_processes import end_without_teardown, run_script
from trainer.parallel import worker

_CLIENT = Path(__file__).with_name("warm_client.py")
_SPACES = ("user", "mnt", "net", "uts", "pid")  # into that of users first, which lets this process into the others
_PR_SET_PDEATHSIG = 1
_LARGEST_MESSAGE = 1 << 20


@functools.cache
def warm_python() -> dict[str, str]:
    """Variables of an environment in which `python`, and the workers of torchrun, are such."""
    folder = Path(tempfile.mkdtemp())  # whose name is short, as a socket's must be
    atexit.register(shutil.rmtree, folder)
    with (folder / "log").open("wb") as log:
        server = run_script(__file__, [str(folder / "socket"), str(os.getpid())], os.environ, log)
    while not (folder / "socket").exists():
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {_CLIENT} {folder / "socket"} "$@"\n')
    python.chmod(0o755)
    return {"PYTHON_EXEC": str(python), "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def serve(place: str, parent: int) -> None:
    """Fork for each that asks, until the test process ends."""
    worker.die_with(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{place}.new")
        listener.listen(64)
        Path(f"{place}.new").rename(place)
        while True:
            asked, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                worker.set_process_attribute(_PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _stand_behind(asked)
            asked.close()


def _stand_behind(asked: socket.socket) -> NoReturn:
    """Run the command as a child, in the namespaces of whoever asked; pass signals on, and the code back."""
    data, handles, _, _ = socket.recv_fds(asked, _LARGEST_MESSAGE, 2)
    arguments, env, folder = json.loads(data)
    client, _, _ = struct.unpack("3i", asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    _enter(client)
    pid = os.fork()
    if pid == 0:
        worker.set_process_attribute(_PR_SET_PDEATHSIG, signal.SIGKILL)
        asked.close()
        _run(arguments, env, folder, handles)
    for handle in handles:
        os.close(handle)
    ended = os.pidfd_open(pid)
    while ended not in (ready := select.select([asked, ended], [], [])[0]):
        number = asked.recv(1) if ready else b""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number[0] if number else signal.SIGKILL)
        if not number:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        asked.send(str(code).encode())
    os._exit(0)


def _enter(client: int) -> None:
    """The namespaces of that process which are not this one's; that of processes is the next child's."""
    system = ctypes.CDLL(None, use_errno=True)
    paths = [Path(f"/proc/{client}/ns/{kind}") for kind in _SPACES]
    others = [path for path in paths if path.readlink() != Path(f"/proc/self/ns/{path.name}").readlink()]
    for handle in [os.open(path, os.O_RDONLY) for path in others]:
        if system.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)


def _run(arguments: Sequence[str], env: dict[str, str], folder: str, handles: Sequence[int]) -> NoReturn:
    for handle, place in zip(handles, (1, 2), strict=True):
        os.dup2(handle, place)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["trainer", *arguments]
    try:
        runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        end_without_teardown(int(ended.code or 0))
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
