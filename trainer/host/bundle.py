"""What there is to be looked into after a run has given up, in one folder: `failure-DATE/` in its directory.

No environment variables and no data: logs, stacks, the configuration, and facts of the host.
"""

import json
import platform
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from trainer.host.card_process import KernelLog

_LOG_TAIL_BYTES = 256 << 10
_LARGEST_BYTES = 64 << 20
_KERNEL_LINES = 200
_OF_INTEREST = re.compile(
    r"nvrm|nvidia|pcie|aer:|out of memory|oom|mce|edac|ata\d|nvme|i/o error|ext4|xfs|btrfs|hung", re.I
)
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "nvidia-ml-py")
_README = """What was kept when the run gave up, to be looked into or to be shown to somebody:

summary.json          why it ended, what was tried, versions, cards, memory and disk
rank-*.log, log.txt   the ends of the workers' logs
rank-*.stacks.txt     where every thread of a worker was that hung
flight-record-*       which exchange each worker was in, after a time-out of NCCL (read by
                      torch.distributed.flight_recorder.fr_trace)
events.txt            what happened to the run
host.jsonl            the host's last hours
kernel.log            the kernel's last lines on cards, memory and disks, if they may be read
config.resolved.yaml  the configuration, with its paths

It holds paths and captions as far as log lines have them, no environment variables and no images.
"""


def write_bundle(run_dir: Path, log_dir: Path, summary: Mapping[str, object]) -> Path | None:
    """Collect it; returns the folder, or None where nothing can be written.

    Args:
        summary: JSON-able; versions are added.
    """
    folder = run_dir / time.strftime("failure-%Y-%m-%d-%H%M%S")
    try:
        folder.mkdir(parents=True)
        (folder / "README.txt").write_text(_README)
        record = {**summary, "versions": versions(), "host": platform.platform(), "python": platform.python_version()}
        (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError:
        return None
    for name in ("log.txt", "events.txt", "host.jsonl"):
        _copy_tail(run_dir / name, folder / name)
    for pattern in ("rank-*.log", "rank-*.stacks.txt"):
        for file in sorted(log_dir.glob(pattern)):
            _copy_tail(file, folder / file.name)
    whole = [run_dir / "config.resolved.yaml", *log_dir.glob("rank-*.error.json"), *log_dir.glob("flight-record-*")]
    for file in whole:
        with suppress(OSError):
            if file.stat().st_size <= _LARGEST_BYTES:
                shutil.copyfile(file, folder / file.name)
    with suppress(OSError):
        lines = [line for line in KernelLog(from_start=True).new_lines() if _OF_INTEREST.search(line)]
        if lines:
            (folder / "kernel.log").write_text("\n".join(lines[-_KERNEL_LINES:]) + "\n")
    return folder


def versions() -> dict[str, str]:
    """Of the packages that matter for training; the files of torch itself are not touched."""
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _copy_tail(source: Path, target: Path) -> None:
    """The last lines of a file, if it is there."""
    with suppress(OSError), source.open("rb") as file:
        size = source.stat().st_size
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        data = file.read()
        target.write_bytes(data.partition(b"\n")[2] if size > _LOG_TAIL_BYTES else data)
