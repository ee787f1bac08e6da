"""What the disks of data and run mean for training: facts in, findings out."""

from trainer.doctor.disk_facts import READERS, ROW_BYTES, FlushFacts, PlaceFacts, ReadFacts
from trainer.doctor.findings import Finding, Level, absent
from trainer.doctor.told_sizes import seconds, speed

_KIB = 1024
# A latent is one read of 128 KiB: four cards that take 4 images a second need 4 reads a second, and as many ahead. A
# hard disk does about a hundred, a SATA SSD some thousands.
_FEW_READS, _TOO_FEW_READS = 200.0, 20.0
# What `prepare`, `verify` and a start read in order: a set of a hundred GB takes ten minutes at 170 MB/s.
_SLOW_READ, _TOO_SLOW_READ = 170e6, 20e6
# Of a checkpoint of 13.5 GB, which is written beside the steps: two minutes at 110 MB/s.
_SLOW_WRITE, _TOO_SLOW_WRITE = 110e6, 15e6
_SLOW_FLUSH_S, _TOO_SLOW_FLUSH_S = 0.1, 2.0  # of each file of a checkpoint, and of the marker that makes it valid
_LITTLE_ROOM = 30e9  # two checkpoints of 13.5 GB
_ROOM_TO_MEASURE = "too little room to write a sample, or it may not be written to"


def judge_reading(place: PlaceFacts, read: ReadFacts | None, *, measured: bool) -> list[Finding]:
    """The disk of the data."""
    if not measured:
        return [absent("disks", "data in order", "not measured"), absent("disks", "data at random", "not measured")]
    if read is None:
        return [absent("disks", "data in order", _ROOM_TO_MEASURE), absent("disks", "data at random", _ROOM_TO_MEASURE)]
    about = _about(place) + (", through the host's cache" if read.is_cached else "")
    ordered = _level(read.sequential, _SLOW_READ, _TOO_SLOW_READ)
    random = _level(read.reads_per_s, _FEW_READS, _TOO_FEW_READS)
    advice = "put the prepared set on an NVMe SSD (data.prepared)"
    return [
        Finding(
            "disks",
            "data in order",
            ordered,
            f"{speed(read.sequential)} ({about})",
            "`prepare` and `verify` read all of it",
            "" if ordered == "ok" else advice,
            read.sequential / 1e6,
            "MB/s",
        ),
        Finding(
            "disks",
            "data at random",
            random,
            f"{read.reads_per_s:,.0f} reads of {ROW_BYTES // _KIB} KiB a second, p99 {seconds(read.slowest_s)}, "
            f"{READERS} at once",
            "each image of a step is one such read",
            "" if random == "ok" else advice,
            read.reads_per_s,
            "reads/s",
        ),
    ]


def judge_flushing(place: PlaceFacts, flush: FlushFacts | None) -> list[Finding]:
    """The disk of the run."""
    room = Finding(
        "disks",
        "run room",
        "warn" if place.free < _LITTLE_ROOM else "ok",
        f"{place.free / 1e9:.1f} GB free ({_about(place)})",
        "checkpoints: 13.5 GB of all of SDXL with 8-bit moments",
        "make room, or another run.dir; a run says at its start what it needs" if place.free < _LITTLE_ROOM else "",
        place.free / 1e9,
        "GB",
    )
    if flush is None:
        return [room, absent("disks", "run writes", _ROOM_TO_MEASURE), absent("disks", "run fsync", _ROOM_TO_MEASURE)]
    write = _level(flush.written, _SLOW_WRITE, _TOO_SLOW_WRITE)
    level = _level(-flush.slowest_s, -_SLOW_FLUSH_S, -_TOO_SLOW_FLUSH_S)
    return [
        room,
        Finding(
            "disks",
            "run writes",
            write,
            f"{speed(flush.written)}, flushed",
            "a checkpoint that is not yet written delays the next",
            "" if write == "ok" else "put run.dir on an SSD, or save less often (checkpoint.every)",
            flush.written / 1e6,
            "MB/s",
        ),
        Finding(
            "disks",
            "run fsync",
            level,
            f"median {seconds(flush.median_s)}, p99 {seconds(flush.slowest_s)} of {flush.flushes}",
            "nothing counts as saved before it is flushed",
            "" if level == "ok" else "put run.dir on another disk; `dmesg` tells if this one has errors",
            flush.slowest_s * 1e3,
            "ms",
        ),
    ]


def judge_trouble(name: str, error: str) -> Finding:
    """A disk that failed while it was measured."""
    advice = "`dmesg` and `smartctl -a` tell if the disk is at fault; copy what is on it first"
    return Finding("disks", name, "fail", error, "a run would end there as well", advice)


def _about(place: PlaceFacts) -> str:
    kind = "" if place.rotates is None else "a hard disk" if place.rotates else "not a hard disk"
    return ", ".join(word for word in (place.filesystem, kind) if word) or "unknown"


def _level(value: float, little: float, too_little: float) -> Level:
    return "fail" if value < too_little else "warn" if value < little else "ok"
