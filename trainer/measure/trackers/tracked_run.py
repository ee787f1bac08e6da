"""What a tracker is, and what it has to know of the run that it shows. Free of torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import UserError

Record = Mapping[str, Any]
FOLDER = "trackers"  # in the run's directory: how far each tracker is
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Of trackers that need one: its module, and what pip calls it."""
NOT_VALUES = ("kind", "step", "time")


@dataclass(frozen=True)
class TrackedRun:
    """A run as one tracker sees it.

    Attributes:
        kind: of the tracker: `csv`, `wandb`, `mlflow`.
        name: what the run is called there.
        options: of the tracker, as in the section of its name in `log`.
        settings: of the run, as nested dictionaries.
    """

    kind: str
    run_dir: Path
    name: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]

    def to_json(self) -> str:
        """On one line, for another process."""
        return json.dumps(asdict(self) | {"run_dir": str(self.run_dir.absolute())})

    @staticmethod
    def from_json(text: str) -> "TrackedRun":
        """Of `to_json`."""
        fields = json.loads(text)
        return TrackedRun(**fields | {"run_dir": Path(fields["run_dir"])})


@dataclass(frozen=True)
class Mark:
    """How far a tracker is.

    Attributes:
        records: of `metrics.jsonl` from its beginning on, that it has.
        step: the highest of these.
        replaces: records that it has are no more those of the file.
        id: what the tracker knows the run by.
    """

    records: int = 0
    step: int = -1
    replaces: bool = False
    id: str = ""


class Tracker(Protocol):
    """Something outside that shows records. Whatever fails may raise anything; it is opened anew then."""

    id: str

    def add(self, records: Sequence[Record]) -> None:
        """Show these too, which come after all that it has."""
        ...

    def close(self) -> None:
        """Hand on what is left."""
        ...


OpenTracker = Callable[[TrackedRun, Mark], "tuple[Tracker, Mark]"]
"""Opens one at a mark, with nothing of what is to be replaced; returns from where on it wants the records."""


def values_of(record: Record) -> dict[str, float]:
    """A record's numbers by the names that TensorBoard has them under; those that are not finite are left out."""
    kind = record["kind"]
    return {f"{kind}/{key}": value for key, value in record.items() if key not in NOT_VALUES and value is not None}


def mark_path(run_dir: Path, kind: str) -> Path:
    """Where it is kept."""
    return run_dir / FOLDER / f"{kind}.json"


def read_mark(run_dir: Path, kind: str) -> Mark:
    """How far a tracker is; at the beginning, if nobody knows."""
    try:
        fields = json.loads(mark_path(run_dir, kind).read_text())
        return Mark(int(fields["records"]), int(fields["step"]), bool(fields["replaces"]), str(fields["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Mark()


def write_mark(run_dir: Path, kind: str, mark: Mark) -> None:
    """At once, or not at all."""
    path = mark_path(run_dir, kind)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(mark)) + "\n")
    partial.replace(path)


def begin_again_at(run_dir: Path, kind: str, last_step: int) -> None:
    """The run goes on from `last_step`: what a tracker has of later steps is to be replaced."""
    mark = read_mark(run_dir, kind)
    if mark.step > last_step and not mark.replaces:
        write_mark(run_dir, kind, replace(mark, replaces=True))


def require_packages(kinds: Sequence[str]) -> None:
    """Refuse trackers whose packages are missing.

    Raises:
        UserError: a line for each.
    """
    missing = [kind for kind in kinds if kind in PACKAGES and find_spec(PACKAGES[kind][0]) is None]
    if missing:
        raise UserError(*(f"log.trackers: {kind}: its package is missing; `pip install {PACKAGES[kind][1]}`, or leave "
                          "it out" for kind in missing))  # fmt: skip
