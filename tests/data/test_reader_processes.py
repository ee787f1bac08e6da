"""Reader processes, whatever they read: their order, and that none of their ends is waited for in vain."""

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import pytest
from torch import Tensor

from trainer.data import reader_processes
from trainer.data.fork_server import fork_server, take_signals
from trainer.data.reader_processes import ReaderProcesses

pytestmark = pytest.mark.e2e
AT_ONCE_S = 60  # also on a busy machine; what waits for something in vain takes longer


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits until a reader is given up waits longer than any test allows."""
    monkeypatch.setattr(reader_processes, "_END_S", 4.0 * AT_ONCE_S)


def _numbered(buffer: Tensor, request: int) -> tuple[int, int]:
    """Later requests are answered sooner."""
    time.sleep(0.02 * (3 - request % 4))
    buffer.fill_(request)
    return request, os.getpid()


def _long_message(buffer: Tensor, request: int) -> bytes:
    """More than a socket takes at once, so that the reader stops in the middle of the message."""
    return bytes(4 << 20)


def _held_signals() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def _sleep(buffer: Tensor, request: float) -> float:
    time.sleep(request)
    return request


def _readers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.ppid() != os.getpid()]


def _take(results: ReaderProcesses) -> list[Any]:
    return [result for _, result in results]


def test_results_come_in_the_order_of_the_requests() -> None:
    results = ReaderProcesses(_numbered, range(20), 100, workers=2, prefetch=3)
    answers, processes = [], set()
    for buffer, (request, process) in results:
        assert buffer.shape == (128,) and (buffer == request).all()
        answers.append(request)
        processes.add(process)
    results.close()
    assert answers == list(range(20)) and len(processes) == 2
    assert not any(psutil.pid_exists(process) for process in processes)


def test_a_reader_that_dies_in_the_middle_of_a_message_is_not_waited_for() -> None:
    results = ReaderProcesses(_long_message, range(10), 100, workers=2, prefetch=2)
    readers = _readers()[-2:]
    deadline = time.monotonic() + AT_ONCE_S
    while any(reader.cpu_times().system + reader.cpu_times().user < 0.001 for reader in readers):
        assert time.monotonic() < deadline
    time.sleep(0.5)
    readers[0].kill()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"reader process {readers[0].pid} \(signal SIGKILL\) died"):
        _take(results)
    assert time.monotonic() - begin < AT_ONCE_S
    results.close()


def test_closing_does_not_wait_for_what_is_read_ahead() -> None:
    results = ReaderProcesses(_sleep, [0.0, 0.0, 600.0, 600.0], 100, workers=2, prefetch=2)
    next(iter(results))
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < AT_ONCE_S
    assert _take(results) == []


def test_readers_may_be_opened_and_closed_at_any_moment() -> None:
    for taken in range(6):
        results = ReaderProcesses(_numbered, range(1000), 1 << 16, workers=2, prefetch=2)
        for _ in range(taken % 4):
            next(results)
        begin = time.monotonic()
        results.close()
        assert time.monotonic() - begin < AT_ONCE_S


def test_forks_of_the_server_hold_signals_from_the_start_until_they_take_them() -> None:
    for begin, held in ((None, {signal.SIGINT, signal.SIGTERM}), (take_signals, set())):
        with ProcessPoolExecutor(1, fork_server(), begin) as pool:
            assert pool.submit(_held_signals).result() == held
    assert not _held_signals() & {signal.SIGINT, signal.SIGTERM}
