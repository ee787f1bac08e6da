"""Measure the data engine on a synthetic set: `python benchmarks/data_engine.py --dir /nvme/bench > table.md`.

Sets are made below --dir and deleted afterwards (--keep keeps them): at the default size, 12.4 million rows, they take
about 20 GB. Latents of the large set are holes in sparse files: memory and index do not depend on what is in them.
Memory is PSS: a page that several processes share counts once, divided among them.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from child_process import Child, Memory, tree_memory_mb
from killed_prepare import kill_prepare
from synthetic_set import write_metadata_file, write_npz_set, write_synthetic_set

from trainer.data.sampler import EpochPlan, Position, share, steps_per_epoch, with_global_batch
from trainer.data.store.snapshot import PreparedSet

ROWS = 12_446_670
GLOBAL_BATCH = 32
SEED = 1


@dataclass(frozen=True)
class Settings:
    """Sizes of the sets and of the runs over them."""

    folder: Path
    rows: int
    drive_rows: int
    npz_rows: int
    json_entries: int
    epoch_share: float
    """Share of an epoch that is read for the growth of memory."""
    epoch_ranks: int
    """How many of the ranks read it; they know nothing of each other."""
    ranks: int
    workers: int
    """Reader processes of each rank, where they are measured."""

    @property
    def small(self) -> bool:
        """Whether this is to see that the benchmark works."""
        return self.rows < 1_000_000

    @property
    def micro_batch(self) -> int:
        """Images per step of one rank."""
        return GLOBAL_BATCH // self.ranks


Row = tuple[str, str, str]
"""What, the figure to reach, what was measured."""


def main() -> None:
    """Make the sets, take all measurements, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the sets are made (default: the system's temporary folder)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the large set (default: {ROWS})")
    parser.add_argument("--epoch-share", type=float, default=1.0, help="how much of an epoch to read for its memory")
    parser.add_argument("--epoch-ranks", type=int, default=4, help="how many of the 4 ranks read it (default: 4)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these measurements alone")
    parser.add_argument("--keep", action="store_true", help="leave the sets where they are; the next run uses them")
    arguments = parser.parse_args()
    if arguments.keep and not arguments.dir:
        parser.error("--keep needs --dir")
    scale = min(1.0, arguments.rows / ROWS)
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    folder = arguments.dir if arguments.keep else Path(tempfile.mkdtemp(prefix="data-engine-", dir=arguments.dir))
    small = arguments.rows < 1_000_000  # to see that it works
    settings = Settings(
        folder=folder,
        rows=arguments.rows,
        drive_rows=1_000 if small else 16_384,
        npz_rows=300 if small else 6_144,
        json_entries=max(3_000, int(scale * ROWS / 10)),
        epoch_share=arguments.epoch_share,
        epoch_ranks=1 if small else arguments.epoch_ranks,
        ranks=1 if small else 4,
        workers=1 if small else 2,
    )
    try:
        print(f"{settings.rows:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start\n")
        print("| what | figure to reach | measured |\n|---|---|---|")
        for name in arguments.only or SECTIONS:
            begin = time.perf_counter()
            for row in SECTIONS[name](settings):
                print("| " + " | ".join(row) + " |", flush=True)
            print(f"{name}: {time.perf_counter() - begin:,.1f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def large_set(settings: Settings) -> Path:
    """All rows, with holes for latents."""
    return _made(settings.folder / "large", lambda path: write_synthetic_set(path, settings.rows, holes=True))


def drive_set(settings: Settings) -> Path:
    """Few rows, with latents of random numbers."""
    return _made(settings.folder / "drive", lambda path: write_synthetic_set(path, settings.drive_rows, holes=False))


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    if not (path / "CURRENT").exists() and not path.with_suffix(".json").exists():
        shutil.rmtree(path, ignore_errors=True)
        make(path)
    return path


def measure_open(settings: Settings) -> Iterator[Row]:
    """Open the set; go on in mid-epoch up to the first batch."""
    root = large_set(settings)
    manifest = root / "snapshots/000001.json"
    with Child("open", root=root) as child:
        opened = child.ask()
    told = f"{opened['seconds']:.3f} s, {opened['mb']:+.1f} MB, manifest {manifest.stat().st_size / 1e6:.2f} MB"
    yield "open the data set", "<= 0.5 s", told
    for workers in (0, settings.workers):
        with Child("resume", root=root, workers=workers) as child:
            first = child.ask()["seconds"]
        how = f"{workers} processes, their server running" if workers else "threads"
        yield f"mid-epoch resume to the first batch ({how})", "<= 1 s", f"{first:.3f} s"


def measure_plan(settings: Settings) -> Iterator[Row]:
    """Cost of the plan; how it mixes buckets."""
    rows = PreparedSet.open(large_set(settings)).rows_per_bucket("train")
    begin = time.perf_counter()
    plan = EpochPlan(rows, SEED, Position.start(len(rows), GLOBAL_BATCH))
    built = time.perf_counter() - begin
    steps = min(plan.num_steps, 100_000)
    begin = time.perf_counter()
    for t in range(steps):
        share(plan.step(t), 0, 4, GLOBAL_BATCH // 4, 1)
    per_step = (time.perf_counter() - begin) / steps
    yield "plan per step, a rank's share included", "<= 200 us", f"{per_step * 1e6:.0f} us (+ {built:.2f} s per epoch)"
    for seed in (SEED, SEED + 1):
        same, expected = _same_bucket(rows, seed)
        ratio = same / expected
        yield (
            f"P(same bucket as the step before), seed {seed}",
            "as independence predicts, within 5 %",
            f"{same:.4f}, predicted {expected:.4f} ({100 * (ratio - 1):+.1f} %)",
        )


def _same_bucket(rows: list[int], seed: int) -> tuple[float, float]:
    plan = EpochPlan(rows, seed, Position.start(len(rows), GLOBAL_BATCH))
    order = np.array([plan.step(t).bucket for t in range(plan.num_steps)])
    counts = np.bincount(order)
    expected = float((counts * (counts - 1)).sum() / (len(order) * (len(order) - 1)))
    return float(np.mean(order[1:] == order[:-1])), expected


def measure_exactness(settings: Settings) -> Iterator[Row]:
    """An epoch on 4, then 3, then 8 workers: count every row that any of them trains on."""
    rows = PreparedSet.open(large_set(settings)).rows_per_bucket("train")
    seen = [np.zeros(count, dtype=np.uint8) for count in rows]
    total = steps_per_epoch(rows, GLOBAL_BATCH)
    position, taken, padded = Position.start(len(rows), GLOBAL_BATCH), 0, 0
    for world, steps in ((4, total // 3), (3, total // 3), (8, None)):
        micro = 4 if world == 8 else 8
        position = with_global_batch(position, rows, SEED, world * micro)
        plan = EpochPlan(rows, SEED, position)
        last = plan.num_steps if steps is None else steps
        for t in range(position.step, last):
            step = plan.step(t)
            for rank in range(world):
                ((ids, weights),) = share(step, rank, world, micro, 1)
                np.add.at(seen[step.bucket], ids[weights > 0], 1)
            padded += bool((step.weights == 0).any())
            taken += 1
        position = plan.after(last - 1)
    lost = sum(int((count == 0).sum()) for count in seen)
    repeated = sum(int((count > 1).sum()) for count in seen)
    yield (
        f"an epoch of {sum(rows):,} rows on 4 -> 3 -> 8 workers",
        "0 lost, 0 repeated",
        f"{lost} lost, {repeated} repeated in {taken:,} steps, {padded} of them part-filled",
    )


def measure_memory(settings: Settings) -> Iterator[Row]:
    """PSS of the loaders of 4 ranks while they read an epoch, over that of processes that only import torch."""
    root = large_set(settings)
    target = "<= 40 MB, growth <= 5 MB"
    yield from _memory_of(settings, root, settings.epoch_share, "our shards, read by threads", target)


def measure_processes(settings: Settings) -> Iterator[Row]:
    """PSS of 4 ranks and their reader processes."""
    root = large_set(settings)
    share_of_epoch = 1.0 if settings.small else 0.02
    totals = _ranks_at_milestones(settings, root, share_of_epoch, settings.workers, settings.ranks)
    course = ", ".join(f"{total.pss:,.0f}" for total in totals)
    anonymous = ", ".join(f"{total.anonymous:,.0f}" for total in totals)
    flat = f"{course} MB (anonymous {anonymous}) at 5, 25, 50, 75, 100 % of {100 * share_of_epoch:.3g} % of an epoch"
    processes = f"{settings.ranks} ranks + {settings.ranks * settings.workers} worker processes"
    yield f"total PSS of {processes}, torch included", "<= 2 GB, flat", flat


def _memory_of(settings: Settings, root: Path, share_of_epoch: float, what: str, target: str) -> Iterator[Row]:
    count = settings.epoch_ranks
    bare = _bare_processes(count)
    totals = _ranks_at_milestones(settings, root, share_of_epoch, 0, count)
    course = ", ".join(f"{(total.pss - bare.pss) / count:.1f}" for total in totals)
    anonymous = ", ".join(f"{(total.anonymous - bare.anonymous) / count:.1f}" for total in totals)
    told = f"{course} MB (anonymous {anonymous}) at 5, 25, 50, 75, 100 % of that"
    told += f", over a bare process's {bare.pss / count:.0f} MB"
    which = f"{what}, {count} of {settings.ranks} ranks"
    yield f"loader's memory per rank, {which}, over {100 * share_of_epoch:.3g} % of an epoch", target, told


def _bare_processes(count: int) -> Memory:
    children = [Child("bare") for _ in range(count)]
    for child in children:
        child.ask()
    total = _total_memory(children)
    for child in children:
        child.end()
    return total


def _ranks_at_milestones(
    settings: Settings, root: Path, share_of_epoch: float, workers: int, count: int
) -> list[Memory]:
    """Memory of the first `count` ranks and their workers, at 5, 25, 50, 75, 100 % of the part of an epoch."""
    rows = PreparedSet.open(root).rows_per_bucket("train")
    steps = max(8, int(share_of_epoch * steps_per_epoch(rows, GLOBAL_BATCH)))
    milestones = sorted({max(1, int(steps * part)) for part in (0.05, 0.25, 0.5, 0.75, 1.0)})
    ranks = _start_ranks(settings, root, workers, milestones, count)
    found = []
    for _ in milestones:
        for child in ranks:
            child.ask()
        found.append(_total_memory(ranks))
        print(f"milestone {len(found)} of {len(milestones)}: {found[-1]}", file=sys.stderr)
        for child in ranks:
            child.go()
    for child in ranks:
        child.end()
    return found


def _total_memory(children: list[Child]) -> Memory:
    return sum((tree_memory_mb(child.pid) for child in children), Memory(0, 0))


def _start_ranks(settings: Settings, root: Path, workers: int, milestones: list[int], count: int) -> list[Child]:
    spec = {"root": root, "world": settings.ranks, "workers": workers, "micro_batch": settings.micro_batch}
    return [Child("rank", rank=rank, milestones=milestones, **spec) for rank in range(count)]


def measure_rates(settings: Settings) -> Iterator[Row]:
    """4 ranks read real latents from the drive, checksums and all; all see one shape in each step."""
    root = drive_set(settings)
    ranks = f"{settings.ranks} ranks"
    for workers, target in (
        (0, ">= 4,000/s, <= 250 us CPU each"),
        (settings.workers, "stated; aim <= 350 us CPU each"),
    ):
        told = _rate(settings, root, workers)
        yield f"latents of 128 KB with checksums, {ranks}, {_how(workers)}", target, told
    root = _made(settings.folder / "npz", lambda path: write_npz_set(path, settings.npz_rows))
    for workers in (0, settings.workers):
        told = _rate(settings, root, workers)
        yield f"kohya's .npz (fp32, 256 KB) where they lie, {ranks}, {_how(workers)}", ">= 1,000/s", told


def _how(workers: int) -> str:
    return f"{workers} processes each" if workers else "threads"


def _rate(settings: Settings, root: Path, workers: int) -> str:
    """The drive's cache is dropped before the first epoch; the second comes from memory."""
    for file in root.rglob("*.*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = PreparedSet.open(root).rows_per_bucket("train")
    epoch = steps_per_epoch(rows, GLOBAL_BATCH)
    ranks = _start_ranks(settings, root, workers, [2, epoch, 2 * epoch], settings.ranks)
    told = []
    before = [child.ask() for child in ranks]  # imports and the first batches are not the reading's
    for _ in range(2):
        begin = time.perf_counter()
        for child in ranks:
            child.go()
        after = [child.ask() for child in ranks]
        seconds = time.perf_counter() - begin
        count = sum(new["images"] - old["images"] for new, old in zip(after, before, strict=True))
        cpu = sum(new["cpu_s"] - old["cpu_s"] for new, old in zip(after, before, strict=True))
        told.append(f"{count / seconds:,.0f}/s, {1e6 * cpu / count:.0f} us CPU")
        before = after
    alike = len({rank["shapes"] for rank in before}) == 1
    bad = sum(rank["bad"] for rank in before)
    for child in ranks:
        child.end()
    notes = "" if alike and not bad else f"; {bad} BAD ROWS, SHAPES {'ALIKE' if alike else 'DIFFER'}"
    return f"cold {told[0]}; cached {told[1]}; one shape on all ranks in each of {2 * epoch:,} steps{notes}"


def measure_flips(settings: Settings) -> Iterator[Row]:
    """One bit at a time, anywhere in a shard: how many rows are found damaged."""
    root = settings.folder / "flips"
    shutil.rmtree(root, ignore_errors=True)
    write_synthetic_set(root, 200, holes=False, resolution=256)
    shard = max(root.glob("shards/*/*"), key=lambda path: path.stat().st_size)
    size, random = shard.stat().st_size, np.random.default_rng(0)
    rows = len(prepared_rows(root, shard))
    tries = 100 if settings.small else 1000
    found, most = 0, 0
    for offset, bit in zip(random.integers(4096, size, tries).tolist(), random.integers(0, 8, tries), strict=True):
        _flip(shard, offset, int(bit))
        damaged = prepared_rows(root, shard)
        _flip(shard, offset, int(bit))
        found += bool(damaged.sum())
        most = max(most, int(damaged.sum()))
    told = f"{found} of {tries} found, costing {most} of {rows} rows at most; reading went on"
    yield "one flipped bit anywhere in a shard's rows", "found, that row skipped, run goes on", told
    shutil.rmtree(root)


def prepared_rows(root: Path, shard: Path) -> np.ndarray:
    """Which rows of a shard cannot be read, bool [rows]."""
    prepared = PreparedSet.open(root)
    (summary,) = [s for s in prepared.shards("train") if s.name.endswith(shard.name)]
    return ~prepared.read_shard(summary, range(summary.rows)).ok


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def measure_in_place(settings: Settings) -> Iterator[Row]:
    """The same memory for rows that only refer to kohya's latents."""
    root = _made(settings.folder / "refs", lambda path: write_npz_set(path, settings.rows, shared=True))
    with Child("open", root=root) as child:
        told = child.ask()
    yield "open an in-place kohya index", "<= 0.5 s", f"{told['seconds']:.3f} s, {told['mb']:+.1f} MB"
    yield from _memory_of(settings, root, settings.epoch_share, "in-place kohya index, read by threads", "<= 60 MB")


def measure_indexing(settings: Settings) -> Iterator[Row]:
    """Peak memory of `prepare` over a metadata file, at three sizes."""
    told = []
    for part in (16, 4, 1):
        entries = settings.json_entries // part
        folder = settings.folder / "json"
        shutil.rmtree(folder, ignore_errors=True)
        size = write_metadata_file(folder, entries)
        with Child("index", folder=folder) as child:
            done = child.ask()
        assert done["images"] == entries, done
        told.append(f"{size / 1e9:.2f} GB: {done['peak_mb']:.0f} MB in {done['seconds']:.0f} s")
        print(told[-1], file=sys.stderr)
        shutil.rmtree(folder)
    yield "peak RSS of indexing a metadata JSON, by size", "<= 500 MB, flat", "; ".join(told)


def measure_kills(settings: Settings) -> Iterator[Row]:
    """`prepare` killed at random moments, on photographs."""
    kills, photos = (4, 60) if settings.small else (20, 1_500)
    told = kill_prepare(settings.folder / "killed", kills, photos)
    yield f"prepare killed (SIGKILL) at {kills} random moments", "the finished set identical, byte for byte", told


SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "open": measure_open,
    "plan": measure_plan,
    "memory": measure_memory,
    "processes": measure_processes,
    "in-place": measure_in_place,
    "indexing": measure_indexing,
    "kills": measure_kills,
    "rates": measure_rates,
    "exactness": measure_exactness,
    "flips": measure_flips,
}

if __name__ == "__main__":
    main()
