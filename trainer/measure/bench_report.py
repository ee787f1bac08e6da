"""What `sdxl-train bench` found: a table to read, JSON to keep, and the speed that `plan` counts with; no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

GIB = 2**30
BENCH_FILE = "bench.json"
PHASES = ("data", "forward", "backward", "optimizer")
_VERSION = 1


@dataclass(frozen=True)
class BenchRow:
    """One way to train, measured; or why it could not be.

    Attributes:
        strategy: `single` for one worker, `ddp`, `zero2`, `zero3`.
        batch_size: `train.batch_size_per_gpu`.
        compiled: `train.compile` was `blocks`.
        workers, accumulation: of a step.
        bucket: height and width in pixels.
        error: why there are no figures; then all that follows is empty.
        images_per_s: of all workers together.
        step_s: mean over the measured steps.
        split: seconds of a step by phase, mean over the workers: `forward`, `backward`, `optimizer` (norm, clipping
            and AdamW), and `data`, which is the wait for the real loader, outside of `step_s`; absent if not measured.
        exposed_s: of a step, in which communication was hidden by nothing; part of `forward` and `backward`.
            None: not measured.
        exposed_how: how it was measured, or why it was not.
        flops_per_image: forward and backward; recomputed beside them.
        peak_flops: of one worker's device, and `peak_source`: where that is from.
        planned_bytes: tensors of one worker at the fullest moment; None: not planned.
        measured_bytes: the same, at most over the workers, by CUDA's allocator; None on the CPU.
        reserved_bytes: what the allocator took of the card.
        rss_bytes: the worker's largest resident memory on the host, libraries included.
        recomputed: of how many blocks, as `13 of 57`.
        compilations: of blocks, of one worker.
        notes: what else the reader should know.
        bucket_mib: `exchange.bucket_mib`; None: `auto`.
    """

    strategy: str
    batch_size: int
    compiled: bool
    workers: int
    accumulation: int
    bucket: tuple[int, int]
    error: str | None = None
    images_per_s: float = 0.0
    step_s: float = 0.0
    split: dict[str, float] | None = None
    exposed_s: float | None = None
    exposed_how: str = ""
    flops_per_image: tuple[int, int] | None = None
    peak_flops: float = 0.0
    peak_source: str = ""
    planned_bytes: int | None = None
    measured_bytes: int | None = None
    reserved_bytes: int | None = None
    rss_bytes: int = 0
    recomputed: str = ""
    compilations: int = 0
    notes: tuple[str, ...] = ()
    bucket_mib: float | None = None

    @property
    def way(self) -> tuple[str, int, bool]:
        """What a plan knows of it: strategy, batch size, compiled."""
        return self.strategy, self.batch_size, self.compiled

    @property
    def label(self) -> str:
        """In words."""
        buckets = f", buckets of {self.bucket_mib:g} MiB" if self.bucket_mib else ""
        return f"{self.strategy}, batch {self.batch_size}{buckets}{', compiled' if self.compiled else ''}"

    @property
    def mfu(self) -> float | None:
        """Share of the cards' peak that the model's own operations took; recomputed ones do not count."""
        if self.flops_per_image is None or not self.peak_flops:
            return None
        return self.images_per_s * self.flops_per_image[0] / (self.workers * self.peak_flops)


@dataclass(frozen=True)
class BenchReport:
    """All rows of one bench.

    Attributes:
        device: the cards' name, or the CPU.
        precision: `train.precision`.
        time: when it began, as ISO 8601.
        versions: of torch and others.
    """

    device: str
    precision: str
    time: str
    versions: dict[str, str]
    rows: tuple[BenchRow, ...] = ()

    @property
    def best(self) -> BenchRow | None:
        """The fastest row."""
        return max((row for row in self.rows if row.error is None), key=lambda row: row.images_per_s, default=None)

    def write(self, path: Path) -> None:
        """Keep it as JSON; the file is replaced as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"version": _VERSION} | asdict(self)
        partial = path.with_name(f"{path.name}.partial")
        rows = [asdict(row) | {"mfu": row.mfu} for row in self.rows]
        partial.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def describe(self) -> list[str]:
        """The table, and what to write into the configuration for its best row."""
        return [*table(self.rows, self.best), "", *self._notes(), *self._advice()]

    def _notes(self) -> list[str]:
        measured = [row for row in self.rows if row.error is None]
        if not measured:
            return []
        height, width = measured[0].bucket
        peaks = sorted(row.peak_flops / 1e12 for row in measured)
        span = f"{peaks[0]:.3g}" if peaks[0] == peaks[-1] else f"{peaks[0]:.3g} to {peaks[-1]:.3g}"
        notes = [
            f"{width} x {height} px, {self.precision}; seconds are of a step, and a mean over the workers",
            f"MFU: of {span} TFLOP/s, {measured[0].peak_source}; recomputed operations do not count",
        ]
        for row in measured:
            notes += [f"exposed: {row.exposed_how}", *row.notes]
        return [f"  {note}" for note in dict.fromkeys(notes)]

    def _advice(self) -> list[str]:
        best = self.best
        if best is None:
            return ["nothing could be measured"]
        lines = [f"best: {best.label}, {_speed(best.images_per_s)} images a second. In the configuration:"]
        lines += ["  train:", f"    batch_size_per_gpu: {best.batch_size}"]
        lines += ["    compile: blocks"] * best.compiled
        if best.workers > 1:
            lines += ["  memory:", f"    strategy: {best.strategy}"]
        if best.bucket_mib:
            lines += ["  exchange:", f"    bucket_mib: {best.bucket_mib:g}"]
        return lines


def row_from_json(stored: dict[str, Any]) -> BenchRow:
    """What `dataclasses.asdict` gave, lists being tuples again."""
    known = {field.name for field in fields(BenchRow)}
    values = {name: value for name, value in stored.items() if name in known}
    for name in ("bucket", "flops_per_image", "notes"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return BenchRow(**values)


def table(rows: Sequence[BenchRow], best: BenchRow | None) -> list[str]:
    """Aligned columns; the best row is marked."""
    heads = ["", "img/s", "step s", *PHASES, "exposed", "MFU", "planned GiB", "measured", "recomputed"]
    cells = [heads, *(_cells(row, best) for row in rows)]
    widths = [max(len(line[i]) for line in cells if len(line) > i) for i in range(len(heads))]
    # Reasons are as long as they like.
    widths[1] = max(len(line[1]) for line in cells if len(line) == len(heads))
    lines = []
    for line in cells:
        first, *others = line
        numbers = "  ".join(f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=False))
        lines.append(f"{first:<{widths[0]}}  {numbers}".rstrip())
    return lines


def _cells(row: BenchRow, best: BenchRow | None) -> list[str]:
    first = f"{'*' if row is best else ' '} {row.label}"
    if row.error is not None:
        return [first, row.error]
    split = row.split or {}
    measured = "-" if row.measured_bytes is None else f"{row.measured_bytes / GIB:.2f}"
    if row.measured_bytes is None and row.rss_bytes:
        measured = f"RSS {row.rss_bytes / GIB:.2f}"
    return [
        first,
        _speed(row.images_per_s),
        f"{row.step_s:.3f}",
        *(f"{split[phase]:.3f}" if phase in split else "-" for phase in PHASES),
        "-" if row.exposed_s is None else f"{row.exposed_s:.3f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        "-" if row.planned_bytes is None else f"{row.planned_bytes / GIB:.2f}",
        measured,
        row.recomputed or "-",
    ]


def _speed(images_per_s: float) -> str:
    return f"{images_per_s:.2f}" if images_per_s < 100 else f"{images_per_s:.0f}"
