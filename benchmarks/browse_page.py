"""The page of a large set: `python benchmarks/browse_page.py [--rows N] [--dir DIR]`: its size, time and memory.

The set has captions, tags, seven sources, some 40 buckets and a catalogue whose images are real photographs; latents
are holes in sparse files. The commands run as their users run them, each in a process of its own.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image
from skimage import data
from synthetic_set import write_synthetic_set

from trainer.data.buckets import Bucket, BucketRules, place
from trainer.data.catalog.catalog import CatalogRow, FileStamp, add_rows, open_catalog, transaction
from trainer.data.catalog.settings import replace_file
from trainer.data.sources.source import WHOLE
from trainer.data.store.snapshot_file import Part, ShardEntry, read_snapshot, snapshot_name, snapshot_to_json

SOURCES = 7
PHOTOGRAPHS = 60
LEFT_OUT = 100_000
_ROWS_AT_ONCE = 5000


def main() -> None:
    """Make the set, write its page twice (tags counted, tags as they were kept), print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images of the set (default: 1000000)")
    parser.add_argument("--dir", type=Path, help="where the set is made, and stays (default: a temporary folder)")
    arguments = parser.parse_args()
    folder: Path = arguments.dir or Path(tempfile.mkdtemp(prefix="browse-page-"))
    try:
        root = folder / "prepared"
        if not root.is_dir():
            write_set(folder, root, arguments.rows)
        print("| page | seconds | peak memory, MB | size, MB |\n|---|---|---|---|")
        for name in ("tags counted", "tags kept"):
            seconds, megabytes = timed("browse", str(root))
            size = (root / "browse.html").stat().st_size / 1e6
            print(f"| {arguments.rows:,} images, {name} | {seconds:.1f} | {megabytes:.0f} | {size:.2f} |", flush=True)
    finally:
        if arguments.dir is None:
            shutil.rmtree(folder)


def timed(action: str, *arguments: str) -> tuple[float, float]:
    """Wall time of `sdxl-train data ACTION ...`, and the peak memory in MB of the largest process so far."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "trainer", "data", action, *arguments], check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def write_set(folder: Path, root: Path, rows: int) -> None:
    """The prepared set, with what `prepare` leaves beside the shards."""
    photographs = list(write_photographs(folder / "photographs"))
    write_synthetic_set(root, rows, holes=True, with_tags=True)
    first = read_snapshot(root, snapshot_name(1))
    entries = tuple(
        replace(shard, parts=(Part(f"source-{number % SOURCES}", shard.rows, shard.virtual_rows),))
        for number, shard in enumerate(first.shards)
    )
    replace_file(root / "snapshots" / snapshot_name(1), snapshot_to_json(replace(first, shards=entries)))
    with open_catalog(root) as connection:
        for shard in entries:
            with transaction(connection):
                found = list(catalog_rows(shard, photographs))
                for begin in range(0, len(found), _ROWS_AT_ONCE):
                    add_rows(connection, 1, found[begin : begin + _ROWS_AT_ONCE])
                bucket = shard.bucket
                connection.execute(
                    "INSERT INTO shards (name, generation, row_generation, split, bucket_h, bucket_w, payload, "
                    "first_key, last_key, rows) VALUES (?, 1, 1, 'train', ?, ?, 'encode', ?, ?, ?)",
                    (shard.name, bucket.height_px, bucket.width_px, found[0].key, found[-1].key, shard.rows),
                )
    lines = (
        json.dumps({"path": f"/photos/{n}.jpg", "key": f"photos/{n}", "reason": f"is {n}x1 px, or cut off"}) + "\n"
        for n in range(LEFT_OUT)
    )
    replace_file(root / "bad.jsonl", lines)


def catalog_rows(shard: ShardEntry, photographs: list[tuple[Path, tuple[int, int]]]) -> Iterator[CatalogRow]:
    """The rows of a shard of `write_synthetic_set`, each an image of some photograph."""
    bucket: Bucket = shard.bucket
    index = int(shard.name.rpartition("-")[2].partition(".")[0])
    for row in range(shard.rows):
        path, original_hw = photographs[(row * 7919 + index) % len(photographs)]
        yield CatalogRow(
            key=f"synthetic/{bucket.height_px}x{bucket.width_px}/{index:04d}/{row:06d}",
            path=str(path),
            offset=0,
            length=WHOLE,
            payload="encode",
            stamp=FileStamp(1, 1, 0),
            caption="{}",
            repeats=1,
            split="train",
            original_hw=original_hw,
            placement=place(original_hw, (bucket,), BucketRules()),
        )


def write_photographs(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Parts of real photographs, of a few megapixels, each with its height and width."""
    folder.mkdir(parents=True)
    sources = [Image.fromarray(image()) for image in (data.astronaut, data.coffee, data.chelsea)]
    for number in range(PHOTOGRAPHS):
        whole = sources[number % len(sources)]
        side = 150 + 5 * (number // len(sources))
        left, top = (number * 37) % (whole.width - side), (number * 53) % (whole.height - side)
        part = whole.crop((left, top, left + side, top + side)).resize((1500 + number * 10, 1400))
        path = folder / f"{number:03d}.jpg"
        part.save(path, quality=92)
        yield path, (part.height, part.width)


if __name__ == "__main__":
    main()
