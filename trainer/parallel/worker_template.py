"""A process that has imported what workers need, and of which each worker is a fork. No torch on the launcher's side.

Importing costs seconds of CPU and hundreds of MB in each process that does it by itself. Forks share both, and those
that are started again after a fault begin at once. The kernel makes a fork the launching process's child (Linux only),
so that it is watched and ended as any other worker. A fork cannot use CUDA if what was imported has touched it: then
there is no template, whose context would take memory of a card besides, and a worker that finds so starts itself anew.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from trainer.package_files import UNASKED, hold_back
from trainer.parallel import worker

# What differs between two attempts of one command, and is read by nothing that the template has imported.
_OF_AN_ATTEMPT = {worker.ATTEMPT, worker.MEMORY_ATTEMPT, worker.RESTARTS}
# Asks the driver's library for management, which a fork may do, where `torch.cuda.is_available` would start CUDA.
_GENTLE_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_FORK_S = 600.0
_POLL_S = 0.05
_LARGEST_REQUEST = 1 << 20
_READY, _HAS_CUDA = b"ready", b"cuda"


@dataclass
class Adopted:
    """A worker that became our child after another process had forked it; as far as a `Popen` is needed."""

    pid: int
    returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """Reap it; returns its code, negative for a signal. TimeoutExpired if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            else:
                time.sleep(0.01)
        return self.returncode


class WorkerTemplate:
    """The template of one command's workers, over all their starts."""

    def __init__(self, modules: Sequence[str], path: str) -> None:
        """
        Args:
            modules: to be imported before the first fork.
            path: where the trainer lies.
        """
        self._modules, self._path = modules, path
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._env: dict[str, str] = {}
        self._is_ready = self._is_useless = False

    def __enter__(self) -> "WorkerTemplate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_id(self) -> int:
        """Of the template; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    def await_ready(self, env: Mapping[str, str], until: Callable[[], bool]) -> bool:
        """Have a template with this environment, which its forks share but for what they are given by `fork`.

        Returns:
            Whether there is one: not where it cannot be had, and not if `until` says so before.
        """
        if sys.platform != "linux" or self._is_useless:
            return False
        kept = {name: value for name, value in env.items() if name not in _OF_AN_ATTEMPT}
        if self._process is None or self._process.poll() is not None or kept != self._env:
            self.close()
            self._begin(kept)
        while not self._is_ready:
            answer = self._receive(_POLL_S)
            if answer == _HAS_CUDA:
                self._is_useless = True
                self.close()
            if until() or answer in (b"", _HAS_CUDA):
                return False
            self._is_ready = answer == _READY
        return True

    def _begin(self, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"import sys; sys.path[0] = {self._path!r}; from {__name__} import serve; serve()"
        _adopt_orphans(yes=True)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid()), *self._modules],
                env={**env, _GENTLE_CHECK: "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._socket, self._env = ours, env

    def fork(
        self, argv: Sequence[str], env: Mapping[str, str], log: int | None, listener: int | None
    ) -> Adopted | None:
        """Start a worker, in a session and process group of its own.

        Args:
            argv: [python, "-c", code, arguments...].
            log: file descriptor of its standard output and errors; None: this process's.
            listener: a socket for it, named by `worker.STORE_FD`.

        Returns:
            None if the template is gone.
        """
        assert self._socket is not None
        handles = [each for each in (log, listener) if each is not None]
        wish = {"argv": list(argv), "env": dict(env), "log": log is not None, "listener": listener is not None}
        with contextlib.suppress(OSError):
            socket.send_fds(self._socket, [json.dumps(wish).encode()], handles)
            # Long, as on a host that swaps: a fork whose number does not arrive is nobody's child, and keeps its card.
            if answer := self._receive(_FORK_S):
                return Adopted(int(answer))
        self.close()
        return None

    def _receive(self, timeout_s: float) -> bytes | None:
        """What the template says; b"" if it is gone, None if it has said nothing."""
        assert self._socket is not None
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        try:
            return self._socket.recv(64)
        except OSError:
            return b""

    def close(self) -> None:
        """End it; its forks go on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            _adopt_orphans(yes=False)
        self._process, self._socket, self._is_ready = None, None, False


def reap_group(leader: int) -> None:
    """Forget the dead of a worker's process group that came to us, for it had ended before them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-leader, os.WNOHANG)[0]:
            pass


def serve() -> None:
    """The template's own life: import, and fork until the launching process closes its end."""
    handle, parent = int(sys.argv[1]), int(sys.argv[2])
    worker.die_with(parent)
    hold_back(*UNASKED)
    with socket.socket(fileno=handle) as requests:
        for module in sys.argv[3:]:
            with contextlib.suppress(Exception):  # the worker will fail likewise, and say so
                importlib.import_module(module)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            requests.send(_HAS_CUDA)
            os._exit(0)
        gc.collect()
        gc.freeze()  # else the first collection would write to all pages, and they would be no longer shared
        requests.send(_READY)
        while True:
            data, handles, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 2)
            if not data:
                os._exit(0)
            wish = json.loads(data)
            pid = _fork_orphan()
            if pid == 0:
                requests.close()
                _become_worker(wish, handles, parent)
            for each in handles:
                os.close(each)
            requests.send(str(pid).encode())


def _fork_orphan() -> int:
    """Fork a grandchild, which becomes the launching process's child; 0 in it, its process id in this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        grandchild = os.fork()
        if grandchild:
            os.write(writing, array.array("q", [grandchild]).tobytes())
            os._exit(0)
        os.close(writing)
        return 0
    os.close(writing)
    os.waitpid(child, 0)
    (pid,) = array.array("q", os.read(reading, 8))
    os.close(reading)
    return pid


def _become_worker(wish: dict[str, object], handles: Sequence[int], parent: int) -> None:
    """Run the worker's code with its own arguments, environment and files; does not return."""
    os.setsid()
    deadline = time.monotonic() + 5.0
    while os.getppid() != parent and time.monotonic() < deadline:
        time.sleep(0.001)
    left, argv, env = list(handles), wish["argv"], wish["env"]
    assert isinstance(argv, list) and isinstance(env, dict)
    if wish["log"]:
        log = left.pop(0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    if wish["listener"]:
        env[worker.STORE_FD] = str(left[0])
    os.environ.clear()
    os.environ.update(env)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        for each in left:
            os.set_inheritable(each, True)
        os.execve(argv[0], argv, env)
    sys.argv = ["-c", *argv[3:]]
    exec(argv[2], {"__name__": "__main__"})
    os._exit(0)


def _adopt_orphans(*, yes: bool) -> None:
    worker.set_process_attribute(_SET_CHILD_SUBREAPER, int(yes))
