"""Whether a checkpoint survives whatever happens while it is written: kills, and power cuts at every moment.

    python benchmarks/save_kills.py --kills 1000

*Kills*: a process saves one checkpoint after the other, from two threads as training does, and gets SIGKILL at a random
moment; then the newest checkpoint must be whole, and no older than the last one that was told to be saved.

*Power cuts*: every write, flush and rename of three saves is recorded. For each prefix of that list, the disk is built
anew as a power cut there may leave it: with all that was not flushed lost, kept, or lost at random; renames that were
not flushed done or not. Again the newest checkpoint must be whole, and the last flushed one or newer.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from trainer.checkpoint.resume_point import resume_newest
from trainer.checkpoint.run_dir import checkpoint_dir, checkpoint_step, prune_checkpoints
from trainer.checkpoint.saver import Folder, Saver
from trainer.checkpoint.write import OPTIMIZER, TensorFile
from trainer.parallel.local_shard import held

CPU = torch.device("cpu")
KEEP = 3


def folder_of(run_dir: Path, step: int, published: Callable[[], None]) -> Folder:
    """A small checkpoint whose values tell its step."""
    weights = {f"block{i}.weight": held(torch.full((200, 100 + i), float(step))) for i in range(4)}
    moments = {f"block{i}.weight.exp_avg": held(torch.full((200, 100 + i), float(-step))) for i in range(4)}
    files = [
        TensorFile("unet/diffusion_pytorch_model.safetensors", weights, {"config.json": "{}"}),
        TensorFile(OPTIMIZER, moments, {}),
    ]

    def then() -> None:
        published()
        prune_checkpoints(run_dir, KEEP)

    return Folder(checkpoint_dir(run_dir, step), files, {"step": step}, then)


def save(saver: Saver, run_dir: Path, step: int, published: Callable[[], None]) -> None:
    """As the loop does it: copies first, the rest beside."""
    saver.begin([folder_of(run_dir, step, published)])
    saver.wait_copied()
    if (reason := saver.finish(list)) is not None:
        raise reason


def newest_step(run_dir: Path) -> int:
    """Of the checkpoint that a run would go on from; 0 if there is none.

    Raises:
        AssertionError: the newest one is damaged.
    """
    told: list[str] = []
    found = resume_newest(run_dir, told.append)
    if told:
        raise AssertionError(told[0])
    return checkpoint_step(found) if found else 0


@dataclass
class Outcome:
    """What came of some cuts: how many of them, and those after which the newest checkpoint was unusable."""

    tried: int = 0
    unusable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def check(self, run_dir: Path, what: str, at_least: int) -> None:
        """Look at what is left."""
        self.tried += 1
        try:
            newest = newest_step(run_dir)
        except Exception as error:
            self.unusable.append(f"{what}: {error}")
        else:
            if newest < at_least:
                self.lost.append(f"{what}: step {newest} is the newest, step {at_least} was saved")


def kills(number: int, seed: int, folder: Path, show: bool = False) -> Outcome:
    """SIGKILL a saving process `number` times, in one run directory that grows older with each."""
    rng, outcome, run_dir = random.Random(seed), Outcome(), folder / "run"
    for index in tqdm(range(number), disable=None if show else True, unit="kill"):
        at_least = _killed_saver(run_dir, newest_step(run_dir), rng.uniform(0.002, 0.08))
        outcome.check(run_dir, f"kill {index}", at_least)
    return outcome


def _killed_saver(run_dir: Path, newest: int, after_s: float) -> int:
    """Let a process save from step `newest` + 1 on and kill it; the last step that it told to be saved."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:  # no pytest, no exit handlers: this process saves until it is killed
        try:
            saver, step = Saver(0, 1, f"{os.getpid()}", CPU, staging_bytes=1 << 20), newest
            os.write(writing, b"%d\n" % step)
            while True:
                step += 1
                save(saver, run_dir, step, lambda step=step: os.write(writing, b"%d\n" % step) and None)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        first = int(told.readline())
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the saver ended by itself"
        return max([first, *map(int, told)])


@dataclass(frozen=True)
class Operation:
    """What the disk was told: `kind` is mkdir, create, write, truncate, sync, rename, unlink, rmtree or told."""

    kind: str
    path: str
    data: Any = None


@contextmanager
def recorded(root: Path) -> Iterator[list[Operation]]:
    """What happens to files under `root` meanwhile, in order, by Python's own calls to the system."""
    log: list[Operation] = []
    names: dict[int, str] = {}
    real_open, real_pwrite, real_fsync, real_close = os.open, os.pwrite, os.fsync, os.close
    real_text, real_rename, real_mkdir, real_unlink = Path.write_text, Path.rename, Path.mkdir, Path.unlink
    real_rmtree = shutil.rmtree

    def ours(path: Any) -> str | None:
        path = Path(os.fspath(path)) if not isinstance(path, int) else None
        return path.relative_to(root).as_posix() if path and path.is_relative_to(root) else None

    def opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        descriptor = real_open(path, flags, *rest, **named)
        if (name := ours(path)) is not None:
            names[descriptor] = name
            if flags & os.O_CREAT:
                log.append(Operation("create", name))
        return descriptor

    def writing(descriptor: int, data: Any, offset: int) -> int:
        count = real_pwrite(descriptor, data, offset)
        if descriptor in names:
            log.append(Operation("write", names[descriptor], (offset, bytes(data[:count]))))
        return count

    def flushing(descriptor: int) -> None:
        real_fsync(descriptor)
        if descriptor in names:
            log.append(Operation("sync", names[descriptor]))

    def closing(descriptor: int) -> None:
        names.pop(descriptor, None)
        real_close(descriptor)

    def texting(path: Path, text: str, *rest: Any, **named: Any) -> int:
        done = real_text(path, text, *rest, **named)
        if (name := ours(path)) is not None:
            log.append(Operation("create", name))
            log.append(Operation("write", name, (0, text.encode())))
        return done

    def renaming(path: Path, to: Any) -> Path:
        done = real_rename(path, to)
        if (name := ours(path)) is not None:
            log.append(Operation("rename", name, ours(to)))
        return done

    def making(path: Path, *rest: Any, **named: Any) -> None:
        real_mkdir(path, *rest, **named)
        if (name := ours(path)) is not None:
            log.append(Operation("mkdir", name))

    def unlinking(path: Path, *rest: Any, **named: Any) -> None:
        real_unlink(path, *rest, **named)
        if (name := ours(path)) is not None:
            log.append(Operation("unlink", name))

    def removing(path: Any, *rest: Any, **named: Any) -> None:
        real_rmtree(path, *rest, **named)
        if (name := ours(path)) is not None:
            log.append(Operation("rmtree", name))

    patches = [
        patch.object(os, "open", opening),
        patch.object(os, "pwrite", writing),
        patch.object(os, "fsync", flushing),
        patch.object(os, "close", closing),
        patch.object(Path, "write_text", texting),
        patch.object(Path, "rename", renaming),
        patch.object(Path, "mkdir", making),
        patch.object(Path, "unlink", unlinking),
        patch.object(shutil, "rmtree", removing),
    ]
    for each in patches:
        each.start()
    try:
        yield log
    finally:
        for each in patches:
            each.stop()


class _File:
    """Contents as a running system sees them, and as they were when last flushed."""

    def __init__(self) -> None:
        self.live, self.flushed = bytearray(), b""


class _Folder:
    """Names of what is in it, likewise. What a name stands for keeps its own fate under any name."""

    def __init__(self) -> None:
        self.live: dict[str, _File | _Folder] = {}
        self.flushed: dict[str, _File | _Folder] = {}


class Disk:
    """A disk as a file system may leave it: contents survive if the file was flushed, names if their folder was."""

    def __init__(self, keeps: Callable[[], bool]) -> None:
        """`keeps`: whether something that was not flushed has come to the disk all the same."""
        self._keeps, self._root = keeps, _Folder()

    def _at(self, path: str) -> "_File | _Folder":
        node: _File | _Folder = self._root
        for name in Path(path).parts:
            assert isinstance(node, _Folder)
            node = node.live[name]
        return node

    def _holder(self, path: str) -> _Folder:
        holder = self._at(Path(path).parent.as_posix())
        assert isinstance(holder, _Folder)
        return holder

    def run(self, operation: Operation) -> None:
        """Do what a running system sees at once."""
        kind, path, data = operation.kind, operation.path, operation.data
        name = Path(path).name
        if kind in ("mkdir", "create") and path != ".":
            self._holder(path).live.setdefault(name, _Folder() if kind == "mkdir" else _File())
        elif kind == "write":
            file, (offset, added) = self._at(path), data
            assert isinstance(file, _File)
            file.live.extend(bytes(max(0, offset + len(added) - len(file.live))))
            file.live[offset : offset + len(added)] = added
        elif kind == "sync":
            node = self._at(path)
            if isinstance(node, _Folder):
                node.flushed = dict(node.live)
            else:
                node.flushed = bytes(node.live)
        elif kind == "rename":
            self._holder(data).live[Path(data).name] = self._holder(path).live.pop(name)
        elif kind in ("unlink", "rmtree"):
            self._holder(path).live.pop(name, None)

    def left(self, to: Path) -> None:
        """Build what is there after the power is back."""
        self._build(self._root, to)

    def _build(self, folder: _Folder, to: Path) -> None:
        to.mkdir(exist_ok=True)
        for name in sorted({*folder.live, *folder.flushed}):
            now, before = folder.live.get(name), folder.flushed.get(name)
            node = now if now is before or self._keeps() else before
            if isinstance(node, _Folder):
                self._build(node, to / name)
            elif node is not None:
                (to / name).write_bytes(bytes(node.live) if self._keeps() else node.flushed)


def power_cuts(seed: int, folder: Path, show: bool = False) -> Outcome:
    """Cut the power after each operation of four saves, the last of which prunes."""
    run_dir, saver = folder / "run", Saver(0, 1, "cut", CPU, staging_bytes=1 << 20)
    with recorded(run_dir) as log:
        run_dir.mkdir(parents=True)
        for step in range(1, KEEP + 2):
            save(saver, run_dir, step, lambda step=step: log.append(Operation("told", "", step)))
    rng, outcome = random.Random(seed), Outcome()
    fates: dict[str, Callable[[], bool]] = {
        "all lost": lambda: False,
        "all kept": lambda: True,
        "some lost": lambda: rng.random() < 0.5,
        "most kept": lambda: rng.random() < 0.9,
    }
    for end in tqdm(range(1, len(log) + 1), disable=None if show else True, unit="cut"):
        told = max([operation.data for operation in log[:end] if operation.kind == "told"], default=0)
        for fate, keeps in fates.items():
            disk = Disk(keeps)
            for operation in log[:end]:
                disk.run(operation)
            place = folder / "left"
            place.mkdir()
            disk.left(place)
            outcome.check(place, f"after {end} of {len(log)} operations ({log[end - 1].kind}), {fate}", told)
            shutil.rmtree(place)
    return outcome


def main() -> None:
    """Run both and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, outcome in (
            ("kills", kills(arguments.kills, arguments.seed, Path(folder) / "kills", show=True)),
            ("power cuts", power_cuts(arguments.seed, Path(folder) / "cuts", show=True)),
        ):
            for line in [*outcome.unusable, *outcome.lost][:10]:
                print(line)
            row = {
                "tried": outcome.tried,
                "newest unusable": len(outcome.unusable),
                "saved but lost": len(outcome.lost),
            }
            print(json.dumps({name: row}))


if __name__ == "__main__":
    main()
