"""What validation costs: its seconds beside those of the steps between, and the interval that would cost less."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Spent:
    """Seconds of a piece of a validation, once it is done."""

    seconds: float = 0.0


@dataclass
class ValidationClock:
    """Measures steps and validations of one start of a run.

    Attributes:
        step_s: mean seconds of a step between the last two validations; None: none was measured yet.
        spent_s: of the newest validation, so far.
        affords: whether images that are trained on are part of it; None: not decided yet.
    """

    step_s: float | None = None
    spent_s: float = 0.0
    affords: bool | None = None
    _began: float | None = None
    _steps: list[float] = field(default_factory=list)
    _told_share: float = 0.0
    _told_left_out: bool = False

    def step_ends(self, *, validates: bool) -> None:
        """A step has ended; where none was begun, nothing is known of it.

        Args:
            validates: a validation follows, which is compared with the steps until now.
        """
        if self._began is not None:
            self._steps.append(time.monotonic() - self._began)
            self._began = None
        if validates:
            if self._steps:
                self.step_s = math.fsum(self._steps) / len(self._steps)
            self._steps.clear()
            self.spent_s, self.affords = 0.0, None

    def step_begins(self) -> None:
        """All that is done between steps is done."""
        self._began = time.monotonic()

    @contextmanager
    def validating(self) -> Iterator[Spent]:
        """What is done within is part of the validation; its seconds are there when it is done."""
        began, spent = time.monotonic(), Spent()
        try:
            yield spent
        finally:
            spent.seconds = time.monotonic() - began
            self.spent_s += spent.seconds

    def share(self, seconds: float, every_steps: int) -> float | None:
        """Of the run's time, if so many seconds are spent every so many steps; None: not known yet."""
        if self.step_s is None or seconds <= 0:
            return None
        return seconds / (seconds + every_steps * self.step_s)

    def too_much(self, every_steps: int, most_share: float) -> str:
        """A line about the newest validation if it costs a larger share than this, and has not been told, or was then
        two thirds of that; else nothing."""
        share = self.share(self.spent_s, every_steps)
        if share is None or share <= most_share or share < 1.5 * self._told_share:
            return ""
        self._told_share = share
        steps = self._affordable_steps(most_share)
        return (
            f"validation takes {self.spent_s:.1f} s, {100 * share:.1f} % of the time where {100 * most_share:g} % are "
            f"meant (validation.max_time_share); validation.every_steps: {steps} would keep to it"
        )

    def left_out(self, share: float | None, most_share: float) -> str:
        """A line, once, about images that are trained on and not scored, for that would cost this share; else
        nothing."""
        if self._told_left_out or share is None:
            return ""
        self._told_left_out = True
        return (
            f"images that are trained on are not scored, with which validation would take {100 * share:.1f} % of the "
            f"time where {100 * most_share:g} % are meant (validation.max_time_share); to see the gap, validate less "
            "often, or set validation.train_images to a number"
        )

    def _affordable_steps(self, most_share: float) -> int:
        """Steps between validations such as the newest with which they cost at most this, rounded up to two digits."""
        assert self.step_s is not None, "a share is known before it is too large"
        steps = max(1.0, self.spent_s * (1 - most_share) / (most_share * self.step_s))
        unit = 10.0 ** max(0, math.floor(math.log10(steps)) - 1)
        return int(math.ceil(steps / unit) * unit)
