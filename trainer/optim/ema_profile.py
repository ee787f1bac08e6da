"""How much past weights count in a running average, and how averages of other lengths follow from stored ones.

A step counts from where the average began: after step t, weights that held during step i count with w_i. Two profiles:

- `PlainEma`: w_i falls exponentially with age.
- `PowerEma`: w_i rises as a power of i, so that the average's length is a fixed share of the run so far (Karras et
  al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1). From a few stored
  averages of this kind those of any other length can be computed after the run (section 3.2, appendix C).

Float64 throughout; no state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MAX_SIGMA_REL = 12**-0.5
"""Relative length of the plain mean over all steps (gamma = 0); a profile that rises is shorter."""


@dataclass(frozen=True)
class PlainEma:
    """average = decay * average + (1 - decay) * weights, at each step.

    Attributes:
        decay: in [0, 1).
        warms_up: let the decay rise from 0 as diffusers' `EMAModel` does, so that the first weights are soon
            forgotten. Otherwise the average starts from the weights that it was given, and keeps decay^t of them.
    """

    decay: float
    warms_up: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay}: must be in [0, 1)")

    def decay_at(self, step: int) -> float:
        """The decay at a step, the first of which is 1: min(decay, (1 + n) / (10 + n)) after n earlier ones, n > 0.

        With warm-up the first step's is 0: the average becomes the weights (as `EMAModel.get_decay` has it).
        """
        if not self.warms_up:
            return self.decay
        earlier = step - 1
        return min(self.decay, (1 + earlier) / (10 + earlier)) if earlier > 0 else 0.0

    def decay_over(self, done: int, step: int) -> float:
        """What is left of the average after the steps `done` + 1 ... `step`: the product of their decays."""
        if not self.warms_up:
            return self.decay ** (step - done)
        return math.prod(self.decay_at(each) for each in range(done + 1, step + 1))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"kind": "plain", "decay": self.decay, "warms_up": self.warms_up}


@dataclass(frozen=True)
class PowerEma:
    """An average in which step i of t counts as the integral of p(s) = (gamma + 1) s^gamma / t^(gamma + 1), i-1 to i.

    What was there before the first step counts nothing, for p(0) = 0: at step 1 the average is that step's weights
    (equation 127 with t = 1 gives a decay of 0). So a fine-tune's average holds none of the weights that it started
    from, but as far as its first steps are still close to them.

    Attributes:
        sigma_rel: length: the profile's standard deviation as a share of t, in (0, 12^-0.5).
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        gamma_of(self.sigma_rel)

    def decay_at(self, step: int) -> float:
        """(1 - 1/t)^(gamma + 1) at step t = 1, 2, ... (equation 127)."""
        return self.decay_over(step - 1, step)

    def decay_over(self, done: int, step: int) -> float:
        """What is left of the average after the steps `done` + 1 ... `step`: (done / step)^(gamma + 1)."""
        return (done / step) ** (gamma_of(self.sigma_rel) + 1)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"kind": "power", "sigma_rel": self.sigma_rel}


Profile = PlainEma | PowerEma


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of p as a share of t (equation 123)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of a length: the largest root of equation 126 (algorithm 2).

    Raises:
        ValueError: `sigma_rel` is not in (0, 12^-0.5), where gamma is positive.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel = {sigma_rel}: must be above 0 and below {MAX_SIGMA_REL:.4f}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class ProfileAt(NamedTuple):
    """The power-function profile of one length, as it is after a step.

    Attributes:
        step: counted from where the average began, at least 1.
    """

    step: int
    sigma_rel: float


class Reconstruction(NamedTuple):
    """How stored averages are combined to another one.

    Attributes:
        weights: of each stored average, in their order; their sum is 1.
        relative_error: |found profile - wanted profile| / |wanted profile|, in the L2 norm over steps.
        amplification: root of the sum of squared weights: what independent rounding errors are multiplied by.
    """

    weights: Matrix
    relative_error: float
    amplification: float


def reconstruction_weights(stored: Sequence[ProfileAt], wanted: ProfileAt) -> Reconstruction:
    """The combination of stored averages whose profile comes closest to the wanted one (algorithm 3).

    Least squares over the run's time, from the normal equations; then scaled to the sum 1, so that weights that never
    changed come out as they are.

    Raises:
        ValueError: nothing is stored, or a step or a length is out of range.
    """
    if not stored:
        raise ValueError("there is no stored average")
    gram, right = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    # In units of each profile's norm, and by the pseudo-inverse: averages that are stored twice are no obstacle.
    norms = np.sqrt(np.diag(gram))
    solution = np.linalg.lstsq(gram / np.outer(norms, norms), right / norms, rcond=1e-13)[0] / norms
    weights = solution / solution.sum()
    norm = inner_products([wanted], [wanted])[0, 0]
    squared_error = weights @ gram @ weights - 2 * weights @ right + norm
    return Reconstruction(weights, math.sqrt(max(squared_error, 0.0) / norm), math.sqrt(weights @ weights))


def inner_products(first: Sequence[ProfileAt], second: Sequence[ProfileAt]) -> Matrix:
    """Integrals over time of the product of two profiles, [first, second] (appendix C, equation 151).

    With m the earlier of both steps: (a + 1)(b + 1) / (a + b + 1) * (m / t_a)^(a + 1) * (m / t_b)^(b + 1) / m.
    """
    step_a, gamma_a = (column[:, None] for column in _columns(first))
    step_b, gamma_b = (column[None, :] for column in _columns(second))
    until = np.minimum(step_a, step_b)
    shares = (until / step_a) ** (gamma_a + 1) * (until / step_b) ** (gamma_b + 1)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shares / until


def _columns(profiles: Sequence[ProfileAt]) -> tuple[Matrix, Matrix]:
    if any(profile.step < 1 for profile in profiles):
        raise ValueError("an average begins with step 1")
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma_of(profile.sigma_rel) for profile in profiles], dtype=np.float64)
