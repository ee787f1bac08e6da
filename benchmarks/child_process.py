"""Processes that the data engine's benchmark starts and looks at: each is one plain Python process with a task.

A task tells results as lines of JSON and waits after each for a line on its standard input.
"""

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil


class Child:
    """One task in a process of its own."""

    def __init__(self, task: str, **arguments: Any) -> None:
        command = [sys.executable, __file__, task, json.dumps(arguments, default=str)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def ask(self) -> dict[str, Any]:
        """The next result; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def told_more(self) -> bool:
        """Wait for a further result; False if the process ended without one."""
        assert self._process.stdout is not None
        return bool(self._process.stdout.readline())

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        self._process.kill()

    def go(self) -> None:
        """Let it go on after a result."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has told everything and ended
            print(file=self._process.stdin, flush=True)

    def end(self) -> None:
        """Let it end, and wait for that."""
        self._process.communicate()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.end()


class Memory(NamedTuple):
    """Megabytes of some processes."""

    pss: float
    """Proportional set size: a page that several processes share counts once, divided among them."""
    anonymous: float
    """Of these, what belongs to no file; the rest the kernel may take away, and does when its cache is full."""

    def __add__(self, other: "Memory") -> "Memory":  # type: ignore[override]
        return Memory(self.pss + other.pss, self.anonymous + other.anonymous)


def memory_mb(pid: int) -> Memory:
    """Of one process; 0 if it has ended."""
    sizes = {"Pss:": 0.0, "Pss_Anon:": 0.0}
    with contextlib.suppress(OSError):
        for name, *rest in map(str.split, Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()):
            if name in sizes:
                sizes[name] = int(rest[0]) / 1024
    return Memory(*sizes.values())


def tree_memory_mb(pid: int) -> Memory:
    """Of a process and all below it."""
    return sum((memory_mb(process.pid) for process in _tree(pid)), Memory(0, 0))


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _tree_cpu_s() -> float:
    total = 0.0
    for process in _tree(os.getpid()):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def _tell(**result: Any) -> None:
    print(json.dumps(result), flush=True)
    sys.stdin.readline()


def bare() -> None:
    """What every rank is without a loader."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    _tell()


def open_set(root: str) -> None:
    """Time and memory of opening a set."""
    from trainer.data.store.snapshot import PreparedSet

    gc.collect()
    before = memory_mb(os.getpid()).pss
    begin = time.perf_counter()
    prepared = PreparedSet.open(Path(root))
    seconds = time.perf_counter() - begin
    gc.collect()
    _tell(seconds=seconds, mb=memory_mb(os.getpid()).pss - before, buckets=len(prepared.buckets("train")))


def resume(root: str, workers: int) -> None:
    """From the middle of an epoch to the first batch, the set opened anew."""
    from synthetic_set import stand_in_tokens

    from trainer.data.loader import BatchReader, open_loader
    from trainer.data.reader_processes import start_reader_server
    from trainer.data.sampler import Position, steps_per_epoch
    from trainer.data.store.snapshot import PreparedSet

    if workers:  # as in training, where the server starts while the model is loaded
        import multiprocessing

        start_reader_server()
        warm = multiprocessing.get_context("forkserver").Process(target=gc.collect)
        warm.start()
        warm.join()
    rows = PreparedSet.open(Path(root)).rows_per_bucket("train")
    middle = replace(Position.start(len(rows), 32), step=steps_per_epoch(rows, 32) // 2)
    begin = time.perf_counter()
    reader = BatchReader(PreparedSet.open(Path(root)), "train", 1, stand_in_tokens)
    with open_loader(reader, middle, **_cut(0, 4, 8), workers=workers) as loader:
        batch = next(next(loader).batches)
        seconds = time.perf_counter() - begin
    _tell(seconds=seconds, images=len(batch.keys))


def _cut(rank: int, world: int, micro_batch: int) -> dict[str, Any]:
    cut = {"rank": rank, "world": world, "micro_batch": micro_batch, "accumulation": 1}
    return {**cut, "prefetch_batches": 4, "pin_memory": False}


def rank(root: str, rank: int, world: int, workers: int, micro_batch: int, milestones: list[int]) -> None:
    """One rank's loader from the start of an epoch, with a pause at each milestone (in steps)."""
    from synthetic_set import stand_in_tokens

    from trainer.data.loader import BatchReader, open_loader
    from trainer.data.sampler import Position
    from trainer.data.store.snapshot import PreparedSet

    prepared = PreparedSet.open(Path(root))
    position = Position.start(len(prepared.buckets("train")), world * micro_batch)
    reader = BatchReader(prepared, "train", 1, stand_in_tokens)
    shapes, images, bad, done = hashlib.blake2b(digest_size=8), 0, 0, 0
    with open_loader(reader, position, **_cut(rank, world, micro_batch), workers=workers) as loader:
        for step in loader:
            for batch in step.batches:
                assert batch.latents is not None
                shapes.update(str(tuple(batch.latents.shape)).encode())
                images += int(batch.weights.sum())
                bad += len(batch.problems)
            done += 1
            if done in milestones:
                batch = step = None  # the milestones are of the loader, not of a batch that is held
                _tell(images=images, bad=bad, cpu_s=_tree_cpu_s(), shapes=shapes.hexdigest())
            if done == milestones[-1]:
                return


def index(folder: str) -> None:
    """The whole of `prepare` for a metadata file and latents that are used in place."""
    from synthetic_set import metadata_settings

    from trainer.data.prepare.commit import commit
    from trainer.data.prepare.encode import encode_shards
    from trainer.data.prepare.stages import plan_prepare

    begin = time.perf_counter()
    settings = metadata_settings(Path(folder))
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, None)
    images = commit(settings.prepared).images
    _tell(images=images, peak_mb=_peak_rss_mb(), seconds=time.perf_counter() - begin)


def _peak_rss_mb() -> float:
    """Of this process since it was started; getrusage would count the process that it was forked from."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def prepare(photos: str, prepared: str) -> None:
    """The whole of `prepare` for a folder of photographs."""
    from synthetic_set import photo_settings, stand_in_vae

    from trainer.data.prepare.commit import commit
    from trainer.data.prepare.encode import encode_shards
    from trainer.data.prepare.stages import plan_prepare

    _tell()
    settings = photo_settings(Path(photos), Path(prepared))
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, stand_in_vae)
    _tell(images=commit(settings.prepared).images)


TASKS: dict[str, Callable[..., None]] = {
    "bare": bare,
    "open": open_set,
    "resume": resume,
    "rank": rank,
    "index": index,
    "prepare": prepare,
}


if __name__ == "__main__":
    TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
