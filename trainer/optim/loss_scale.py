"""Dynamic loss scale of fp16 training: as large as the gradients allow, halved when one overflows.

The same rule as `torch.amp.GradScaler` (Micikevicius et al. 2018, "Mixed Precision Training"), as a value: the state of
a run is these two numbers. The caller multiplies the loss by `scale`, divides the gradients' norm by it, and skips the
step where the norm is not finite; the norm is a sum over all workers, so all of them decide alike.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

GROWTH_INTERVAL = 2000  # steps without overflow before the scale is doubled
LARGEST, SMALLEST = 2.0**24, 1.0


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by, and how many steps in a row it has held."""

    scale: float = 65536.0
    good_steps: int = 0

    def after(self, finite: bool) -> "LossScale":
        """The scale of the next step, after one whose gradients were all finite or not."""
        if not finite:
            return LossScale(max(self.scale / 2, SMALLEST), 0)
        if self.good_steps + 1 < GROWTH_INTERVAL:
            return LossScale(self.scale, self.good_steps + 1)
        return LossScale(min(self.scale * 2, LARGEST), 0)

    def to_json(self) -> dict[str, float | int]:
        """For the train state."""
        return asdict(self)

    @staticmethod
    def from_json(state: Mapping[str, float | int]) -> "LossScale":
        """What `to_json` gave."""
        return LossScale(float(state["scale"]), int(state["good_steps"]))
