"""What a run has done so far: a few integers, written as JSON into every checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.left_out import Stretch
from trainer.data.sampler import Position
from trainer.errors import UserError
from trainer.optim.loss_scale import LossScale
from trainer.train.guard.numerics_guard import NOTHING_KNOWN, NumericsGuard

VERSION = 2


@dataclass(frozen=True)
class TrainState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        images_seen: images that these steps trained on, padding and unreadable rows not counted.
        position: where the data order goes on.
        snapshot: name of the prepared data set's snapshot that `position` refers to.
        seed: seed of the data order and the noise.
        loss_scale: of fp16, else None.
        guard: by which the next step is judged.
        left_out: data that the run goes past, where it has been or will come to.
    """

    step: int
    images_seen: int
    position: Position
    snapshot: str
    seed: int
    loss_scale: LossScale | None = None
    guard: NumericsGuard = NOTHING_KNOWN
    left_out: tuple[Stretch, ...] = ()

    def to_json(self) -> dict[str, object]:
        """A JSON-able record; `from_json` gives the same state back."""
        return {
            "version": VERSION,
            "step": self.step,
            "images_seen": self.images_seen,
            "position": self.position.to_json(),
            "snapshot": self.snapshot,
            "seed": self.seed,
            "loss_scale": self.loss_scale and self.loss_scale.to_json(),
            "guard": self.guard.to_json(),
            "left_out": [part.to_json() for part in self.left_out],
        }

    @staticmethod
    def from_json(record: Mapping[str, Any], source: Path) -> "TrainState":
        """Read back what `to_json` gave.

        Raises:
            UserError: the record was written by another version of the format, or is incomplete.
        """
        if record.get("version") != VERSION:
            raise UserError(
                f"{source}: training state of version {record.get('version')}, this program reads {VERSION}"
            )
        try:
            return TrainState(
                step=record["step"],
                images_seen=record["images_seen"],
                position=Position.from_json(record["position"]),
                snapshot=record["snapshot"],
                seed=record["seed"],
                loss_scale=record["loss_scale"] and LossScale.from_json(record["loss_scale"]),
                # Older checkpoints have neither.
                guard=NumericsGuard.from_json(record["guard"]) if "guard" in record else NOTHING_KNOWN,
                left_out=tuple(Stretch.from_json(part) for part in record.get("left_out", ())),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{source}: the training state is incomplete ({error})") from None
