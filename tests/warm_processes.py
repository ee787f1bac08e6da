"""Processes that begin with the libraries imported: forks of one that has imported them for all of this test process.

Importing torch, diffusers and transformers takes seconds of CPU in each new process, most of what a short run takes. So
scripts of workers, whole commands, and templates of workers (`trainer/parallel/worker_template.py`, by which all of
this is forked) begin behind it. `typed` in `test_end_to_end.py` is for commands that are new processes throughout.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

from trainer.cli import keep_running
from trainer.parallel import worker
from trainer.parallel.worker_template import Adopted, WorkerTemplate, serve

ROOT = Path(__file__).parents[1]
_MODULES = (*dict.fromkeys(module for imports in keep_running._IMPORTS.values() for module in imports), __name__)
_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_LARGEST_MESSAGE = 1 << 20
_FOREVER_S = 1e9
_LONG_S = 800.0  # of a command; below that of a whole test (pyproject.toml)
_template: WorkerTemplate | None = None


class WarmProcess(Adopted):
    """A child that was forked so; as far as a `Popen` is needed."""

    def poll(self) -> int | None:
        try:
            return super().wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float = _FOREVER_S) -> int:
        return super().wait(timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run_script(path: str, arguments: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> WarmProcess:
    """`python PATH ARGUMENTS`, which computes with one thread; what it prints goes into `log`."""
    process, requests = _fork(["script", path, *arguments], env, log.fileno(), log.fileno())
    requests.close()
    return process


class WarmCommand(WarmProcess):
    """`python -W error -m trainer ARGUMENTS`, whose workers begin warm too."""

    def __init__(self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] = os.environ) -> None:
        self._printed = [os.memfd_create("printed") for _ in range(2)]
        process, requests = _fork(["command", *map(str, arguments)], env, *self._printed, cwd)
        requests.close()
        super().__init__(process.pid)

    def __enter__(self) -> "WarmCommand":
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is not None:
            self.kill()
        self.wait()
        for handle in self._printed:
            os.close(handle)

    def communicate(self, timeout: float = _FOREVER_S) -> tuple[str, str]:
        """Standard output and errors, when it has ended."""
        self.wait(timeout)
        output, errors = (os.pread(handle, os.fstat(handle).st_size, 0).decode() for handle in self._printed)
        return output, errors


def sdxl_train(
    *arguments: object, expect: int = 0, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; its exit code must be `expect`."""
    with WarmCommand(*arguments, cwd=cwd, env=env) as command:
        output, errors = command.communicate(timeout=_LONG_S)
    assert command.returncode == expect, f"exit code {command.returncode}\n{output}\n{errors}"
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess([*map(str, arguments)], expect, output, errors)


class WarmTemplate(WorkerTemplate):
    """A template of workers in this process's runs: a fork of ours."""

    def _begin(self, env: dict[str, str]) -> None:
        if env.get("OMP_NUM_THREADS") != "1":  # which has been read by what is imported
            super()._begin(env)
            return
        self._process, self._socket = _fork(["template", str(os.getpid()), *self._modules], env, 1, 2)  # type: ignore
        self._env = env
        worker.set_process_attribute(_SET_CHILD_SUBREAPER, 1)


def _fork(
    arguments: Sequence[str], env: Mapping[str, str], output: int, errors: int, cwd: Path | None = None
) -> tuple[WarmProcess, socket.socket]:
    """A child that does what `_begin` makes of the arguments, in this or another folder, and a socket to it."""
    global _template
    if _template is None:
        _template = WorkerTemplate(_MODULES, str(ROOT))
        atexit.register(_template.close)
    assert _template.await_ready(_template._env or {**os.environ, "OMP_NUM_THREADS": "1"}, lambda: False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"from {__name__} import _begin; _begin()"
    with theirs:
        # Only now: otherwise all that tests leave behind would become children of this process, and zombies.
        worker.set_process_attribute(_SET_CHILD_SUBREAPER, 1)
        forked = _template.fork([sys.executable, "-c", code, *arguments], env, None, theirs.fileno())
        worker.set_process_attribute(_SET_CHILD_SUBREAPER, 0)
    assert forked is not None
    socket.send_fds(ours, [os.fsencode(cwd or Path.cwd())], [output, errors])
    return WarmProcess(forked.pid), ours


def _begin() -> None:
    """The life of a fork: standard streams and folder as the test has them, and then what it is for."""
    requests = socket.socket(fileno=int(os.environ.pop(worker.STORE_FD)))
    folder, handles, _, _ = socket.recv_fds(requests, _LARGEST_MESSAGE, 2)
    for handle, place in zip(handles, (1, 2), strict=True):
        os.dup2(handle, place)
        os.close(handle)
    os.chdir(folder)
    purpose, *arguments = sys.argv[1:]
    if purpose == "template":
        _become_template(requests, *arguments)
    requests.close()
    if purpose == "script":
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
        end_without_teardown(0)
    _run_command(arguments)


def _become_template(requests: socket.socket, parent: str, *modules: str) -> NoReturn:
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = ["-c", str(requests.detach()), parent, *modules]
    serve()
    os._exit(0)


def _run_command(arguments: Sequence[str]) -> NoReturn:
    """As `python -W error -m trainer`; the template of its workers is forked before there can be any threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher, pid = os.getpid(), os.fork()
    if pid == 0:
        ours.close()
        worker.die_with(launcher)
        wish = theirs.recv(_LARGEST_MESSAGE)
        if not wish:
            os._exit(0)
        env, modules = json.loads(wish)
        os.environ.clear()
        os.environ.update(env)
        os.setsid()
        _become_template(theirs, str(launcher), *modules)
    theirs.close()
    spare = [(WarmProcess(pid), ours)]

    class SpareTemplate(WorkerTemplate):
        """The one that is there; more, if there must be, as they always are."""

        def _begin(self, env: dict[str, str]) -> None:
            if not spare or env.get("OMP_NUM_THREADS") != "1":
                super()._begin(env)
                return
            self._process, self._socket = spare.pop()  # type: ignore[assignment]
            self._socket.send(json.dumps([env, self._modules]).encode())  # type: ignore[union-attr]
            self._env = env
            worker.set_process_attribute(_SET_CHILD_SUBREAPER, 1)

    from trainer.cli.main import main

    keep_running.WorkerTemplate = SpareTemplate  # type: ignore[misc]
    warnings.simplefilter("error")
    sys.argv = ["sdxl-train", *arguments]
    try:
        code = main()
    except SystemExit as ended:  # of argparse
        code = int(ended.code or 0)
    end_without_teardown(code)


def end_without_teardown(code: int) -> NoReturn:
    """As an interpreter ends, but without taking all that is imported to pieces."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
