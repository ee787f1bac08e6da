"""What weights cost: `python benchmarks/loss_weights.py [--rows N]`, in CPU time, on a set with tags as real ones have.

Tags are drawn by Zipf's law from a million, some 30 an image. What is told of reading is by one thread, of latents of
64 px, so that next to nothing but meta data is read; counting is told for one process.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from synthetic_set import stand_in_tokens

from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.catalog.settings import replace_file
from trainer.data.loader import BatchReader, Request
from trainer.data.loss_weights import LossWeights, TagSeparators
from trainer.data.store.shards import RowBatch, ShardHead, read_info, write_shard
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import ShardEntry, Snapshot, snapshot_name, snapshot_to_json
from trainer.data.survey.tag_counts import balanced, count_tags, tag_counts

ROWS_PER_SHARD = 2048
TAGS = 1_000_000
BATCH, BATCHES = 8, 400
BUCKET = Bucket(64, 64)


def main() -> None:
    """Make the set, take the measurements, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="images of the set (default: 100000)")
    folder = Path(tempfile.mkdtemp(prefix="loss-weights-"))
    try:
        rows = parser.parse_args().rows
        write_tagged_set(folder, rows)
        print("| what | measured |\n|---|---|")
        for what, measured in (*counting(PreparedSet.open(folder), rows), *reading(PreparedSet.open(folder), rows)):
            print(f"| {what} | {measured} |", flush=True)
    finally:
        shutil.rmtree(folder)


def write_tagged_set(root: Path, rows: int) -> None:
    """A prepared set of one bucket with tags and a caption in each record."""
    (root / "snapshots").mkdir(parents=True)
    head, random = ShardHead(BUCKET, "train", 1, 0.13025, "xxh3:00"), np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(10, TAGS + 10))
    cumulative /= cumulative[-1]
    entries = []
    for begin in range(0, rows, ROWS_PER_SHARD):
        n = min(ROWS_PER_SHARD, rows - begin)
        numbers = np.searchsorted(cumulative, random.random((n, 32)))
        lengths = random.integers(20, 33, n).tolist()
        batch = RowBatch(
            np.zeros((n, *head.latent_shape), dtype=np.float16),
            [
                caption_record("a photograph of something", ", ".join(f"some tag {t}" for t in tags[:length])).decode()
                for tags, length in zip(numbers.tolist(), lengths, strict=True)
            ],
            [f"booru/{begin + i:08d}" for i in range(n)],
            np.full((n, 6), 64, dtype=np.uint32),
            np.ones(n, dtype=np.uint32),
        )
        name = f"{begin:08d}.safetensors"
        with (root / name).open("wb") as file:
            write_shard(file, head, [batch], [])
        entries.append(ShardEntry(name, "train", BUCKET, read_info(root / name)))
    snapshot = Snapshot(1, (1,), {"the VAE's scaling_factor": 0.13025}, tuple(entries))
    replace_file(root / "snapshots" / snapshot_name(1), snapshot_to_json(snapshot))
    replace_file(root / "CURRENT", snapshot_name(1) + "\n")


def counting(prepared: PreparedSet, rows: int) -> Iterator[tuple[str, str]]:
    """Time and memory of counting all tags, of taking up what was kept, and of the table."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    counts = count_tags(prepared, TagSeparators(), 1)
    seconds = time.process_time() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    per_row = 1e6 * seconds / rows
    yield (
        f"counting the tags of {rows:,} images, {len(counts.images):,} different ones",
        f"{seconds:.1f} s, {per_row:.0f} us an image, {peak:.0f} MB at most",
    )
    yield "of 12.4 million images, at that rate", f"{12.4e6 * per_row / 1e6 / 60:.1f} minutes of CPU, once a snapshot"
    tag_counts(prepared, TagSeparators(), 1)
    kept = sum(file.stat().st_size for file in (prepared.path / "tag-counts").iterdir()) / 1e6
    begin = time.process_time()
    balance = balanced(tag_counts(prepared, TagSeparators(), 1), 0.5, 0.25, 4.0)
    yield "taking up the counts and weighing them", f"{time.process_time() - begin:.2f} s ({kept:.0f} MB on the disk)"
    yield "tags in the table of a reader", f"{len(balance.common):,}, some {len(balance.common) * 150 / 1e6:.1f} MB"


def reading(prepared: PreparedSet, rows: int) -> Iterator[tuple[str, str]]:
    """CPU time of a row, without weights and with each kind."""
    balance = balanced(tag_counts(prepared, TagSeparators(), 1), 0.5, 0.25, 4.0)
    kinds: dict[str, LossWeights | None] = {
        "without weights": None,
        "weights of sources": LossWeights({"booru": 0.5}),
        "and images' own": LossWeights({"booru": 0.5}, per_image=True),
        "and of tags": LossWeights({"booru": 0.5}, True, {"some tag 5": 2.0}, balance),
    }
    best = dict.fromkeys(kinds, float("inf"))
    order = np.random.default_rng(1).integers(0, rows, (BATCHES, BATCH))
    for _ in range(5):
        for name, weights in kinds.items():
            reader = BatchReader(prepared, "train", 1, stand_in_tokens, loss_weights=weights)
            begin = time.process_time()
            for ids in order:
                reader.read(Request(0, 0, ids, np.ones(BATCH, dtype=np.float32)))
            best[name] = min(best[name], time.process_time() - begin)
    for name, seconds in best.items():
        yield f"reading an image, {name}", f"{1e6 * seconds / order.size:.1f} us"


if __name__ == "__main__":
    main()
