"""Which steps are skipped because their loss or gradient norm cannot be right. A pure function of the steps before.

A step is skipped whose loss or norm is not finite, or lies more than 6 standard deviations above the mean of the latest
128 steps that were taken: the constants of OLMo's SkipStep optimizers (github.com/allenai/OLMo-core,
`src/olmo_core/optim/skip_step_optimizer.py`). As there, nothing is judged before half as many are known. Here both are
looked at by their logarithms, because losses and norms of single batches are skewed, over a factor of ten from one
timestep to another, and their sound values are nearer to a normal distribution there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IN_A_ROW = 3
"""Skipped steps in a row after which the run goes back: one comes of a bad batch or of a card's slip, three do not."""
# In large batches 6 standard deviations are a few percent, which do no harm; and long gradients are clipped as well.
_LEAST_RISE_OF_LOSS, _LEAST_RISE_OF_NORM = math.log(2.0), math.log(4.0)


@dataclass(frozen=True)
class GuardRules:
    """How steps are judged.

    Attributes:
        sigma: standard deviations above the mean; 0: only what is not finite is skipped.
        window: steps that are looked back on.
        in_fp16: gradients that are not finite are how the loss scale is found, and no fault.
    """

    sigma: float = 6.0
    window: int = 128
    in_fp16: bool = False


class TakenStep(NamedTuple):
    """A step that was taken: its loss, its gradient norm before clipping, and its images."""

    loss: float
    norm: float
    images: float


@dataclass(frozen=True)
class Verdict:
    """On one step.

    Attributes:
        reason: why it is skipped, in words that follow "step N is skipped: "; empty where it is taken.
        is_fault: it counts, as an overflow of fp16 does not.
        loss_limit, norm_limit: what is above is skipped; infinite where too few steps are known.
    """

    reason: str = ""
    is_fault: bool = False
    loss_limit: float = math.inf
    norm_limit: float = math.inf


TAKEN = Verdict()


@dataclass(frozen=True)
class NumericsGuard:
    """What is remembered between steps; the same on all workers, and part of every checkpoint.

    Attributes:
        taken: the latest steps that were taken; one that is skipped has no part in what is usual.
        in_a_row: steps that were skipped since.
        sound_step: of the run, before the first of those in a row.
    """

    taken: tuple[TakenStep, ...] = ()
    in_a_row: int = 0
    sound_step: int = 0

    def judge(self, rules: GuardRules, loss: float, norm: float, images: float) -> Verdict:
        """On a step with these sums over all workers, before it changes anything.

        Args:
            loss: mean over the step's images; NaN without any.
            norm: of the gradients before clipping.
        """
        if not images:
            return TAKEN  # and changes nothing
        if not (math.isfinite(loss) and math.isfinite(norm)):
            which = " and ".join(n for n, x in (("loss", loss), ("gradients", norm)) if not math.isfinite(x))
            return Verdict(f"{which} not finite", is_fault=not rules.in_fp16)
        if not rules.sigma:
            return TAKEN
        loss_limit = self._limit(rules, [step.loss for step in self.taken], images, _LEAST_RISE_OF_LOSS)
        norm_limit = self._limit(rules, [step.norm for step in self.taken], images, _LEAST_RISE_OF_NORM)
        reasons = [
            f"{name} {value:.4g}, above {limit:.4g}"
            for name, value, limit in (("loss", loss, loss_limit), ("gradient norm", norm, norm_limit))
            if value > limit
        ]
        return Verdict(" and ".join(reasons), bool(reasons), loss_limit, norm_limit)

    def after(self, rules: GuardRules, verdict: Verdict, step: TakenStep, sound_step: int) -> "NumericsGuard":
        """With a step that was judged, the run's `sound_step` + 1."""
        if verdict.is_fault:
            return NumericsGuard(self.taken, self.in_a_row + 1, self.sound_step if self.in_a_row else sound_step)
        if verdict.reason or not step.images:
            return self
        return NumericsGuard((*self.taken, step)[-rules.window :])

    def _limit(self, rules: GuardRules, values: Sequence[float], images: float, least_rise: float) -> float:
        """Of a step with so many images; infinite where half a window is not known yet."""
        # What is not above 0, as the loss of contrastive objectives may be, is no spike, and has no logarithm.
        logs = [math.log(value) for value in values if value > 0]
        if len(logs) < max(2, rules.window // 2):
            return math.inf
        mean = math.fsum(logs) / len(logs)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
        # A mean over fewer images, such as the last ones of an epoch, strays farther, and its gradient is longer.
        usual = math.fsum(step.images for step in self.taken) / len(self.taken)
        wider = math.sqrt(max(usual / images, 1.0))
        height = mean + math.log(wider) + max(rules.sigma * deviation * wider, least_rise)
        return math.exp(height) if height < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """For the train state; `from_json` gives the same back, to the bit."""
        return {"taken": [list(step) for step in self.taken], "in_a_row": self.in_a_row, "sound_step": self.sound_step}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "NumericsGuard":
        """What `to_json` gave."""
        taken = tuple(TakenStep(*map(float, step)) for step in record["taken"])
        return NumericsGuard(taken, int(record["in_a_row"]), int(record["sound_step"]))


NOTHING_KNOWN = NumericsGuard()

Judge = Callable[[float, float, float], Verdict]
"""Of a step's loss, gradient norm and images, over all workers."""


def skip_what_is_not_finite(loss: float, norm: float, images: float) -> Verdict:
    """The judge of steps that stand alone."""
    return NOTHING_KNOWN.judge(GuardRules(), loss, norm, images)
