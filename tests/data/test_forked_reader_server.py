"""The readers' server as a fork of the process that has imported what readers need."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="forks, as the launcher's workers")]
LONG_S = 120
SCRIPT = """
import os, sys
import trainer.data.loader, trainer.data.images, trainer.model.text
import trainer.data.reader_processes as readers

mark = bytes(range(256)) * 4096 * 64  # 64 MB that a server of its own would not have

def begin():
    os.close(int(sys.argv[1]))

def fill(buffer, request):
    buffer.fill_(request % 251)
    return os.getpid(), len(mark)

if __name__ == "__main__":
    readers.fork_reader_server(begin)
    results = readers.ReaderProcesses(fill, range(1000), 64, workers=2, prefetch=4)
    for buffer, (pid, size) in results:
        print(int(buffer[0]), pid, size, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def process(tmp_path: Path) -> "Iterator[tuple[subprocess.Popen[str], int]]":
    """A process with two readers, and the readable end of a pipe that its server was told to close."""
    (tmp_path / "script.py").write_text(SCRIPT)
    reading, writing = os.pipe()
    command = [sys.executable, str(tmp_path / "script.py"), str(writing)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(writing,), start_new_session=True
    ) as child:
        os.close(writing)
        yield child, reading
        os.close(reading)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _answer(child: "subprocess.Popen[str]") -> list[int]:
    assert child.stdin and child.stdout
    answer = [int(word) for word in child.stdout.readline().split()]
    print(file=child.stdin, flush=True)
    return answer


def _private_mb(process: psutil.Process) -> float:
    return process.memory_full_info().uss / 1e6


def test_readers_are_forks_with_their_workers_memory(process: "tuple[subprocess.Popen[str], int]") -> None:
    child, _ = process
    answers = [_answer(child) for _ in range(20)]
    assert [number for number, _, _ in answers] == list(range(20))
    readers = {psutil.Process(pid) for _, pid, _ in answers}
    assert len(readers) == 2
    (server,) = {reader.parent() for reader in readers}
    assert server is not None and server.ppid() == child.pid
    assert server.cmdline() == psutil.Process(child.pid).cmdline(), "a program of its own: not a fork"
    # Each has imported all that, 400 MB with the mark, and holds little of it for itself.
    assert _private_mb(server) < 60 and all(_private_mb(reader) < 100 for reader in readers)


def test_all_end_when_their_worker_is_killed(process: "tuple[subprocess.Popen[str], int]") -> None:
    child, _ = process
    _answer(child)
    others = psutil.Process(child.pid).children(recursive=True)
    assert len(others) == 4  # the library's tracker of resources, the server and two readers
    child.kill()
    _, alive = psutil.wait_procs(others, timeout=LONG_S)
    assert not alive


def test_what_the_server_is_to_close_is_open_in_the_worker_alone(process: "tuple[subprocess.Popen[str], int]") -> None:
    child, pipe = process
    _answer(child)
    others = [each.pid for each in psutil.Process(child.pid).children(recursive=True)]
    name = Path(f"/proc/self/fd/{pipe}").readlink()
    assert [pid for pid in (child.pid, *others) if name in _files(pid)] == [child.pid]


def _files(pid: int) -> list[Path]:
    found = list[Path]()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(handle.readlink())
    return found


def test_readers_go_on_without_their_server(process: "tuple[subprocess.Popen[str], int]") -> None:
    child, _ = process
    _, pid, _ = _answer(child)
    server = psutil.Process(pid).parent()
    assert server is not None
    server.kill()
    assert [_answer(child)[0] for _ in range(30)] == list(range(1, 31))
