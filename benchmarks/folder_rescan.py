"""What it costs to prepare a folder of images again of which nothing has changed: CPU time, and system calls where
`strace` is there.

    python benchmarks/folder_rescan.py --images 100000

An image and a caption each, a thousand of them in a subfolder. Beside it stands the least that tells of a change: a
walk with `os.scandir` and one `stat` a file, in one thread and with nothing kept or compared.
"""

import argparse
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from trainer.config.sections.data.sources import FolderSource
from trainer.data.buckets import BucketRules
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare

CALLS = ("stat", "newfstatat", "statx", "lstat", "fstat", "getdents64", "openat", "open", "read", "pread64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dir", type=Path, help="where they are made (default: the system's temporary folder)")
    parser.add_argument("--part", choices=("start", "prepare", "walk"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"start": lambda _: None, "prepare": prepare, "walk": walk}[arguments.part](arguments.dir)
        return
    folder = Path(tempfile.mkdtemp(prefix="rescan-", dir=arguments.dir))
    try:
        make(folder / "photos", arguments.images)
        first = measured("prepare", folder, calls=False)
        print(f"{arguments.images:,} images and captions; the first time: {first}", flush=True)
        for part in ("start", "prepare", "walk"):
            print(f"{part}: {measured(part, folder)}", flush=True)
    finally:
        shutil.rmtree(folder)


def make(folder: Path, count: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (120, 130, 140)).save(buffer, "jpeg", quality=30)
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:05d}").mkdir(parents=True)
        stem = folder / f"{i // 1000:05d}" / f"{i:08d}"
        stem.with_suffix(".jpg").write_bytes(buffer.getvalue())
        stem.with_suffix(".txt").write_text(f"photograph {i}")


def measured(part: str, folder: Path, calls: bool = True) -> str:
    """A process of its own: its CPU time; its system calls, in a second one."""
    command = [sys.executable, __file__, "--part", part, "--dir", str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    told = f"{user + system:.1f} s of CPU ({system:.1f} s in the kernel)"
    if calls and shutil.which("strace"):
        table = folder / "calls.txt"
        subprocess.run(["strace", "-f", "-c", "-o", str(table), *command], check=True)
        counts = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", table.read_text(), re.M)
        told += ", calls: " + ", ".join(f"{name} {int(n):,}" for n, name in counts if name in CALLS)
    return told


def prepare(folder: Path) -> None:
    """All of it; `data.mode: images`, which encodes nothing."""
    rules = BucketRules(resolution=64, min_px=32, max_px=128, step_px=32)
    settings = PrepareSettings(
        prepared=folder / "prepared", sources=(FolderSource(path=folder / "photos"),), buckets=rules, vae="none",
        scaling_factor=0.13025, mode="images",
    )  # fmt: skip
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, None)
    commit(settings.prepared)


def walk(folder: Path) -> None:
    """The least: each file's size and time."""
    waiting, told = [str(folder / "photos")], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    found = entry.stat()
                    told ^= found.st_mtime_ns ^ found.st_size


if __name__ == "__main__":
    main()
