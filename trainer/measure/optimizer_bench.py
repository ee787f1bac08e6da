"""What `sdxl-train bench --optimizers` found: a table, JSON to keep, and the seconds that `plan` shows; no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from trainer.guards import Refused, read_json

OPTIMIZERS_FILE = "bench_optimizers.json"
_VERSION = 1
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class OptimizerRow:
    """One kind, measured; or why it could not be.

    Attributes:
        refused: the configuration does not go with the kind.
        error: why there are no figures; then all that follows is empty.
        strategy: in which it was measured: `single`, `ddp`, `zero2` or `zero3`.
        num_weights: that train, of the whole model.
        alone_s: the optimizer's step alone, without norm and clipping: median over the measured steps, of the slowest
            worker.
        step_s: a whole training step, mean over the measured ones and the workers; `in_step_s` of it are norm, clipping
            and the optimizer (what is released as gradients arrive has no place of its own: then it is `alone_s`).
        images_per_s: of all workers together.
        state_bytes: of the state's tensors, all workers together; what all of them have alike is counted once.
        planned_bytes: the same as the memory plan has it.
        recomputed: of how many blocks activations are computed again, as `13 of 57`: less state leaves more room.
    """

    kind: str
    refused: bool = False
    error: str | None = None
    strategy: str = ""
    num_weights: int = 0
    alone_s: float = 0.0
    step_s: float = 0.0
    in_step_s: float = 0.0
    images_per_s: float = 0.0
    state_bytes: int = 0
    planned_bytes: int = 0
    recomputed: str = ""

    @property
    def alone_ns(self) -> float:
        """Nanoseconds of the step alone for each weight that trains."""
        return 1e9 * self.alone_s / max(self.num_weights, 1)

    @property
    def share(self) -> float:
        """Of a whole training step, with norm and clipping."""
        return self.in_step_s / self.step_s if self.step_s else 0.0

    @property
    def state_bytes_per_weight(self) -> float:
        """As measured."""
        return self.state_bytes / max(self.num_weights, 1)

    @property
    def planned_bytes_per_weight(self) -> float:
        """As planned."""
        return self.planned_bytes / max(self.num_weights, 1)

    def summary(self) -> str:
        """In a line."""
        if self.error is not None:
            return f"refused: {self.error}" if self.refused else self.error
        state = f"{self.state_bytes_per_weight:.2f} bytes a weight"
        return f"{self.alone_s:.4f} s alone, {self.share:.1%} of a step, {state}"


@dataclass(frozen=True)
class OptimizerReport:
    """All kinds of one bench.

    Attributes:
        device: the cards' name, or the CPU.
        precision: `train.precision`.
        strategy: `memory.strategy`.
        workers: of each measurement.
        batch_size: `train.batch_size_per_gpu`.
        own_kind: the configuration's kind.
        time: when it began, as ISO 8601.
        versions: of torch and others.
    """

    device: str
    precision: str
    strategy: str
    workers: int
    batch_size: int
    own_kind: str
    time: str
    versions: dict[str, str]
    rows: tuple[OptimizerRow, ...] = ()

    @property
    def measured(self) -> tuple[OptimizerRow, ...]:
        """The rows that have figures."""
        return tuple(row for row in self.rows if row.error is None)

    def with_row(self, row: OptimizerRow) -> "OptimizerReport":
        """The report with one more."""
        return replace(self, rows=(*self.rows, row))

    def write(self, path: Path) -> None:
        """Keep it as JSON; the file is replaced as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) | _ratios(row) for row in self.rows]
        partial = path.with_name(f"{path.name}.partial")
        text = json.dumps({"version": _VERSION} | asdict(self) | {"rows": rows}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    def describe(self) -> list[str]:
        """The table, and what its columns are."""
        if not self.measured:
            return [*_table(self.rows, self.own_kind), "", "nothing could be measured"]
        weights, measured = self.measured[0].num_weights, f"{self.precision} on {self.device}"
        ways = ", ".join(dict.fromkeys(row.strategy for row in self.measured))
        return [
            *_table(self.rows, self.own_kind),
            "",
            f"  {weights:,} weights train, {measured}, {self.workers} x {ways}, batch {self.batch_size}",
            "  alone: the optimizer's step on random gradients; share: of a whole step, with the norm and clipping",
            "  bytes of state a weight, of all workers together; planned: as `sdxl-train plan` counts them",
        ]


def _ratios(row: OptimizerRow) -> dict[str, float]:
    return {
        "alone_ns_per_weight": row.alone_ns,
        "share": row.share,
        "state_bytes_per_weight": row.state_bytes_per_weight,
        "planned_bytes_per_weight": row.planned_bytes_per_weight,
    }


def optimizer_row(stored: dict[str, Any]) -> OptimizerRow:
    """What `dataclasses.asdict` gave; more than that is left out."""
    known = {field.name for field in fields(OptimizerRow)}
    return OptimizerRow(**{name: value for name, value in stored.items() if name in known})


@dataclass(frozen=True)
class MeasuredOptimizers:
    """What `plan` shows of a bench: seconds of each kind's step alone, and the device they were measured on."""

    device: str
    seconds: dict[str, float]


def measured_optimizers(
    run_dir: Path, precision: str, strategy: str, workers: int, num_weights: int
) -> MeasuredOptimizers | None:
    """What was measured of this run with as many workers and weights; None where nothing was."""
    try:
        stored = read_json(run_dir / OPTIMIZERS_FILE, most_bytes=_MOST_BYTES)
        if [stored[key] for key in ("precision", "strategy", "workers")] != [precision, strategy, workers]:
            return None
        rows = [optimizer_row(row) for row in stored["rows"]]
        seconds = {
            str(row.kind): float(row.alone_s) for row in rows if row.error is None and row.num_weights == num_weights
        }
        return MeasuredOptimizers(str(stored["device"]), seconds) if seconds else None
    except (OSError, Refused, KeyError, TypeError, ValueError, AttributeError):
        return None


def _table(rows: Sequence[OptimizerRow], own_kind: str) -> list[str]:
    """Aligned columns; the run's own kind is marked."""
    heads = ["", "alone s", "ns/weight", "share", "step s", "img/s", "bytes/weight", "planned", "recomputed"]
    cells = [heads, *(_cells(row, own_kind) for row in rows)]
    full = [line for line in cells if len(line) == len(heads)]  # reasons are as long as they like
    widths = [max(len(line[i]) for line in (cells if i == 0 else full)) for i in range(len(heads))]
    lines = []
    for first, *others in cells:
        if len(others) == 1:
            lines.append(f"{first:<{widths[0]}}  {others[0]}")
            continue
        numbers = "  ".join(f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        lines.append(f"{first:<{widths[0]}}  {numbers}")
    return lines


def _cells(row: OptimizerRow, own_kind: str) -> list[str]:
    first = f"{'*' if row.kind == own_kind else ' '} {row.kind}"
    if row.error is not None:
        return [first, row.summary()]
    return [
        first,
        f"{row.alone_s:.4f}",
        f"{row.alone_ns:.2f}",
        f"{row.share:.1%}",
        f"{row.step_s:.3f}",
        f"{row.images_per_s:.2f}",
        f"{row.state_bytes_per_weight:.2f}",
        f"{row.planned_bytes_per_weight:.2f}",
        row.recomputed or "-",
    ]
