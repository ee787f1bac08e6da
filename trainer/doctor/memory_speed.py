"""How fast the host's memory is copied by all of its cores at once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_BYTES = 64 << 20  # of each thread, at most: several times a level-3 cache
_MOST_BYTES = 1 << 30  # of all, source and target alike
_MOST_THREADS = 64
_WARM_S, _MEASURE_S = 0.3, 1.5


@dataclass(frozen=True)
class MemorySpeed:
    """Bytes read plus bytes written a second, as STREAM's copy counts them, by so many threads.

    In the time that each thread had a core: where others compute as well, it says what memory can, not what is left.
    """

    all_threads: float
    one_thread: float
    threads: int


def measure_memory(threads: int, tick: Callable[[str], None] = lambda told: None) -> MemorySpeed:
    """Copy arrays that no cache holds: by one thread, then by all.

    Args:
        threads: how many; more than 64 are not started.
        tick: told what is being done.
    """
    threads = max(1, min(threads, _MOST_THREADS))
    tick("copying memory")
    one = _copy(1)
    return MemorySpeed(_copy(threads) if threads > 1 else one, one, threads)


def _copy(threads: int) -> float:
    size = min(_BYTES, _MOST_BYTES // (2 * threads))
    rates, marks = [0.0] * threads, [0.0, 0.0]

    def begin() -> None:
        now = time.perf_counter()
        marks[:] = now + _WARM_S, now + _WARM_S + _MEASURE_S

    gate = threading.Barrier(threads, begin)

    def work(number: int) -> None:
        # Touched first by the thread that uses them, so that they lie in its node's memory.
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        gate.wait()
        while time.perf_counter() < marks[0]:
            np.copyto(target, source)  # without the interpreter's lock
        count, began = 0, time.thread_time()
        while time.perf_counter() < marks[1] or not count:
            np.copyto(target, source)
            count += 1
        rates[number] = 2 * size * count / (time.thread_time() - began)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
