"""What it costs to prepare a large set again: when nothing has changed, 1 % of the captions, or 1 % of the images.

    python benchmarks/changing_set.py --rows 1245000

Rows come from one of kohya's metadata files, their latents are used where they lie. Each line is a process of its own:
wall and CPU seconds, most memory, and what the new snapshot takes on the disk. 12,446,670 rows take up to 80 GB there,
with `--text-bytes 200` 50.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic_set import metadata_settings, write_metadata_file

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Make the set, prepare it, change it, and print a line of JSON for each time that it is prepared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_245_000)
    parser.add_argument("--text-bytes", type=int, default=466, help="of a caption, and of as many tags (466)")
    parser.add_argument("--dir", type=Path, help="where it is made (default: the system's temporary folder)")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.again:
        print(json.dumps(prepare(arguments.again)))
        return
    folder = Path(tempfile.mkdtemp(prefix="changing-", dir=arguments.dir))
    write_metadata_file(folder, arguments.rows, arguments.text_bytes)
    try:
        told("the first time", folder)
        told("nothing has changed", folder)
        edit(folder / "meta_lat.json", every=100, remove=False)
        told("1 % of the captions", folder)
        edit(folder / "meta_lat.json", every=100, remove=True)
        told("1 % of the images are gone", folder)
    finally:
        shutil.rmtree(folder)


def told(what: str, folder: Path) -> None:
    """Prepare in a process of its own; print what it took."""
    command = [sys.executable, __file__, "--again", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(json.dumps({"prepared": what, **json.loads(done.stdout)}), flush=True)


def prepare(folder: Path) -> dict[str, object]:
    """The whole of it, and what it took."""
    from trainer.data.prepare.commit import commit
    from trainer.data.prepare.encode import encode_shards
    from trainer.data.prepare.stages import plan_prepare

    settings = metadata_settings(folder)
    before, begin = disk_bytes(settings.prepared), time.perf_counter()
    found = plan_prepare(settings, show_progress=False).scan
    encode_shards(settings.prepared, 0, 1, None)
    done = commit(settings.prepared)
    used = resource.getrusage(resource.RUSAGE_SELF)
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    after = disk_bytes(settings.prepared)
    return {
        "images": done.images,
        "new, captions, removed": [found.new, found.captions, found.removed],
        "wall s": round(time.perf_counter() - begin, 1),
        "CPU s": round(used.ru_utime + used.ru_stime, 1),
        "peak MB": int(peak.split()[1]) // 1024,
        "new snapshot MB": round((after - before) / 1e6, 2),
        "catalogue MB": round((settings.prepared / "catalog.sqlite").stat().st_size / 1e6, 1),
    }


def disk_bytes(prepared: Path) -> int:
    """Of shards, edits and snapshots; the catalogue is a working file."""
    files = [path for kind in ("shards/*/*", "edits/*", "snapshots/*") for path in prepared.glob(kind)]
    return sum(path.stat().st_size for path in files)


def edit(metadata: Path, every: int, remove: bool) -> None:
    """Change each so-manieth entry's caption, or take the entry out; its `.npz` stays. None of them is the last one."""
    changed, number = metadata.with_suffix(".new"), -1
    with metadata.open(encoding="utf-8") as source, changed.open("w", encoding="utf-8") as target:
        is_chosen = False
        for line in source:
            if line.startswith('  "'):
                number += 1
                is_chosen = number % every == 0
            if is_chosen and not remove:
                line = line.replace('"caption": "', '"caption": "edited: ')
            if not (is_chosen and remove):
                target.write(line)
            is_chosen = is_chosen and not line.startswith("}")
    changed.replace(metadata)


if __name__ == "__main__":
    main()
