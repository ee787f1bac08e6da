"""`prepare` killed at random moments: whether the finished set is that of a run which nobody disturbed.

A run is one process that does the whole of it: find the images, encode them, commit. It is killed (SIGKILL) at a moment
drawn from the time that an undisturbed run takes, started again, and so on; once a run has come to its end, the set is
compared and the next run begins an empty one. Every second moment is drawn from the first thirtieth, about the time in
which the images are found: otherwise nearly all would fall into the encoding.
"""

import hashlib
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
from child_process import Child
from PIL import Image

_WORKING_FILES = ("catalog.sqlite", "catalog.sqlite-journal", "lock", "moved.json")


def kill_prepare(folder: Path, kills: int, photos: int) -> str:
    """What became of so many kills over so many photographs; everything is made below `folder` and deleted."""
    _write_photos(folder / "photos", photos)
    whole = folder / "whole"
    seconds = _run(folder / "photos", whole, None)
    assert seconds is not None
    expected = _digests(whole)
    random, torn = np.random.default_rng(), folder / "torn"
    struck, sets, differing = Counter(), 0, 0
    while True:
        killing = struck.total() < kills
        latest = seconds / 30 if struck.total() % 2 else seconds
        if _run(folder / "photos", torn, float(random.uniform(0, latest)) if killing else None) is None:
            struck[_stage(torn)] += 1
            continue
        sets += 1
        differing += _digests(torn) != expected
        shutil.rmtree(torn)
        if not killing:
            break
    shutil.rmtree(folder)
    moments = ", ".join(f"{count} {stage}" for stage, count in struck.items())
    return f"{sets - differing} of {sets} finished sets identical, {struck.total()} kills: {moments}"


def _run(photos: Path, prepared: Path, kill_after_s: float | None) -> float | None:
    """Seconds that the run took, or None if it was killed before its end."""
    with Child("prepare", photos=photos, prepared=prepared) as child:
        child.ask()  # the imports are over
        begin = time.perf_counter()
        child.go()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            child.kill()
        if not child.told_more():
            return None
        return time.perf_counter() - begin


def _stage(prepared: Path) -> str:
    """How far a killed run had come, as its files tell."""
    if (prepared / "CURRENT").exists():
        return "after the commit"
    return "while shards were written" if (prepared / "shards").exists() else "while images were looked for"


def _digests(prepared: Path) -> dict[str, str]:
    """Of every file but the working files."""
    files = (path for path in prepared.rglob("*") if path.is_file() and path.name not in _WORKING_FILES)
    return {str(path.relative_to(prepared)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def _write_photos(folder: Path, count: int) -> None:
    """JPEGs of varied shapes with a caption each; one in forty is cut off, one in forty cannot be opened."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        height, width = random.integers(200, 700, 2).tolist()
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"photograph {number}", encoding="utf-8")
        data = path.read_bytes()
        if number % 40 == 20:
            path.write_bytes(data[: len(data) // 2])
        elif number % 40 == 30:
            path.write_bytes(data[10:])
