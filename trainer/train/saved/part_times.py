"""When each part of the model trains: `start_at` and `stop_at` as steps of the run, and what a checkpoint says of them.

A stretch of the run, between two of these steps, trains the same parts throughout. At its end the run is built anew
from a checkpoint, as if it had been interrupted there: what rests has no gradients then, on no worker and on no wire.
Without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.config.sections.trainable_config import Moment, TextEncoderPart
from trainer.errors import UserError
from trainer.train.trained_parts import trained_parts

RECORD = "part_times"  # key of a checkpoint's state
_Asked = tuple[Moment | None, Moment | None]


@dataclass(frozen=True)
class PartTimes:
    """When a part trains.

    Attributes:
        start, stop: steps done by the run: it trains from `start` on, and no more from `stop` on; None: to the end.
        asked: what the configuration says, `start_at` and `stop_at`.
    """

    start: int
    stop: int | None
    asked: _Asked

    def train_after(self, step: int) -> bool:
        """Whether it trains in the step after so many."""
        return self.start <= step and (self.stop is None or step < self.stop)


Times = Mapping[str, PartTimes]


def has_times(config: Config) -> bool:
    """Whether any part starts late or stops early."""
    return any(_asked(part) != (None, None) for part in trained_parts(config).values())


def part_times(config: Config, total_steps: int, step: int = 0, before: Times | None = None) -> dict[str, PartTimes]:
    """When each part trains, of a run of `total_steps` that has done `step` of them; {} where all train throughout.

    Args:
        before: what was found earlier in this run: what has begun or ended since stays so, though the run's length,
            of which moments may be shares, has changed.

    Raises:
        UserError: a part would stop before it starts, or nothing trains at some time.
    """
    if not has_times(config):
        return {}
    found = {}
    for name, part in trained_parts(config).items():
        start, stop = (None if at is None else _as_step(at, total_steps) for at in _asked(part))
        start, earlier = start or 0, (before or {}).get(name)
        if earlier and earlier.asked == _asked(part) and earlier.start <= step:
            start = earlier.start
            if earlier.stop is not None and earlier.stop <= step:
                stop = earlier.stop
        if stop is not None and stop <= start:
            key = f"trainable.{name}"
            raise UserError(
                f"{key}.start_at = {part.start_at} with {key}.stop_at = {part.stop_at}: of {total_steps:,} steps, it "
                f"would start after {start:,} and stop after {stop:,}; let it stop later"
            )
        found[name] = PartTimes(start, stop, _asked(part))
    for at in sorted({step, *(each.start for each in found.values()), *(each.stop or 0 for each in found.values())}):
        if step <= at < total_steps and not any(each.train_after(at) for each in found.values()):
            raise UserError(f"trainable: nothing trains after step {at:,}; let a part start earlier or stop later")
    return found


def resting_parts(times: Times, step: int) -> frozenset[str]:
    """The parts that do not train in the step after so many, and do at another time of the run."""
    return frozenset(name for name, each in times.items() if not each.train_after(step))


def times_record(times: Times) -> dict[str, object]:
    """What a checkpoint's state says of them, beside the rest; to be read by `recorded_times`."""
    each = {name: {"start": t.start, "stop": t.stop, "asked": [*t.asked]} for name, t in times.items()}
    return {RECORD: each} if times else {}


def recorded_times(state: Mapping[str, Any], source: Path) -> dict[str, PartTimes]:
    """Of a checkpoint's state.

    Raises:
        UserError: it is not what was written.
    """
    try:
        return {
            name: PartTimes(each["start"], each["stop"], (each["asked"][0], each["asked"][1]))
            for name, each in state.get(RECORD, {}).items()
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{source}: its {RECORD} cannot be used: {error}") from None


def told_times(config: Config) -> Iterator[str]:
    """A line for each part that starts late or stops early."""
    for name, part in trained_parts(config).items():
        words = [f"{word} {_told(at)}" for word, at in zip(("from", "until"), _asked(part), strict=True) if at]
        if words:
            yield f"{name}: trains {' '.join(words)}"


def _told(at: Moment) -> str:
    return f"step {at:,}" if isinstance(at, int) else f"{at:.4g} of the run"


def _asked(part: TextEncoderPart) -> _Asked:
    return part.start_at, part.stop_at


def _as_step(at: Moment, total_steps: int) -> int:
    return at if isinstance(at, int) else max(1, round(at * total_steps))
