"""Measured points that the formulas of `scaling_model.py` are held against: published ones, and two hosts on a machine.

Each set has unknowns of its own, found by least squares of the logarithms of seconds; what is left is the error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from benchmarks.scaling_model import Card, Links, Machine, Way, Work, ring, shares, step_of

# Images a second of Stable Diffusion 2's UNet (866M weights), a step of 2,048 images, passes of 16, FSDP's
# SHARD_GRAD_OP, hosts of eight A100: github.com/mosaicml/diffusion, README.md and yamls/hydra-yamls/SD-2-base-256.yaml.
A100_POINTS = {
    256: {8: 1100, 16: 2180, 32: 4080, 64: 8530, 128: 11600},
    512: {8: 290, 16: 585, 32: 1195, 64: 2340, 128: 4590},
}
# Images a second on four RTX 3090 and an EPYC 7F52 at passes of one image, by passes in a step: 71 % of SDXL's UNet and
# both text encoders, published by the machine's owner (github.com/6DammK9/nai-anime-pure-negative-prompt, ch06).
RIG_POINTS = {4: 3.26, 64: 4.00}
RIG_GRADIENT_BYTES = 2.0 * (1.827e9 + 0.818e9)
# Of `python benchmarks/hosts_exchange.py`: Mbit/s of the link, way, MB, seconds; four workers on two hosts, gloo.
HOSTS_POINTS = (
    (50, "ring", 4, 1.081),
    (50, "shares", 4, 1.416),
    (50, "ring", 16, 4.167),
    (50, "shares", 16, 5.886),
    (100, "ring", 4, 0.560),
    (100, "shares", 4, 0.786),
    (100, "ring", 16, 2.195),
    (100, "shares", 16, 2.826),
    (200, "ring", 4, 0.269),
    (200, "shares", 4, 0.349),
    (200, "ring", 16, 1.051),
    (200, "shares", 16, 1.524),
)
# Of `python benchmarks/hosts_speed.py --mbit 50`: `exchange.method`, passes of a step, MB that leave a host in a step.
BYTES_POINTS = (("plain", 1, 95.1), ("plain", 4, 95.5), ("int8", 1, 28.8))
HOSTS_WEIGHTS = 15.6e6


@dataclass(frozen=True)
class Fit:
    """What was found: unknowns by name, and for each point its name, what was measured and what the formulas say."""

    unknowns: dict[str, float]
    points: list[tuple[str, float, float]]

    @property
    def error(self) -> float:
        """Root of the mean square of log(said / measured): about the relative error."""
        return math.sqrt(float(np.mean([math.log(said / was) ** 2 for _, was, said in self.points])))

    @property
    def worst(self) -> float:
        """The largest |said / measured - 1|."""
        return max(abs(said / was - 1) for _, was, said in self.points)


def _fit(
    start: dict[str, tuple[float, float, float]],
    points: Sequence[tuple[str, float, Callable[[dict[str, float]], float]]],
) -> Fit:
    """Least squares; `start`: of each unknown (lowest, first guess, highest), all positive; searched by logarithms."""
    names = list(start)
    low, guess, high = (np.log([start[name][place] for name in names]) for place in range(3))

    def unknowns(vector: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(vector).tolist(), strict=True))

    def misses(vector: np.ndarray) -> list[float]:
        found = unknowns(vector)
        return [math.log(say(found) / was) for _, was, say in points]

    found = unknowns(least_squares(misses, guess, bounds=(low, high), x_scale=0.1, diff_step=1e-3).x)
    return Fit(found, [(name, was, say(found)) for name, was, say in points])


def fit_a100() -> Fit:
    """Seconds of an image at both sizes, bytes a second between hosts, and what share of a pass hides an exchange."""

    def say(found: dict[str, float], px: int, gpus: int) -> float:
        work = Work(866e6, found[f"seconds of an image at {px} px"])
        links = Links(8, 230e9, found["bytes/s between hosts"])
        machine = Machine(work, Card(1.0, 1.0, 2039e9), links, found["overlap"], spread=0.0)
        way, batch = Way("zero2", gradient_bytes=4.0, weight_bytes=2.0), min(16, 2048 // gpus)
        return step_of(machine, way, gpus, batch, 2048 // gpus // batch).images_s

    points = [
        (f"{gpus} x A100, {px} px", float(was), lambda found, px=px, gpus=gpus: say(found, px, gpus))
        for px, row in A100_POINTS.items()
        for gpus, was in row.items()
    ]
    start = {f"seconds of an image at {px} px": (1e-4, 8 / A100_POINTS[px][8], 1.0) for px in A100_POINTS}
    start |= {"bytes/s between hosts": (1e9, 5e10, 1e12), "overlap": (0.05, 0.7, 1.0)}
    return _fit(start, points)


def solve_rig() -> tuple[float, float, float]:
    """(seconds of a pass on all four cards, seconds of a step beside its passes, bytes/s if those are all exchange).

    Two points, two unknowns: nothing is left to be an error. That none of the exchange is hidden makes the last a lower
    bound.
    """
    (few, slow), (many, fast) = RIG_POINTS.items()
    each = 4 * (many / fast - few / slow) / (many - few)
    beside = 4 * few / slow - few * each
    return each, beside, 2 * 3 / 4 * RIG_GRADIENT_BYTES / beside


def fit_hosts() -> Fit:
    """What share of a link's bits arrives, and seconds of a message; two hosts of two workers."""

    def say(found: dict[str, float], mbit: int, way: str, megabytes: float) -> float:
        arrives = found["share of the link that arrives"] * mbit * 1e6 / 8
        links = Links(2, 1e10, arrives, (1e-5, found["seconds of a message"]))
        num_bytes = megabytes * 1e6
        return 2 * ring(links, 4, num_bytes) if way == "ring" else shares(links, 4, num_bytes)

    points = [
        (
            f"{mbit:,} Mbit/s, {way}, {megabytes:g} MB",
            seconds,
            lambda found, mbit=mbit, way=way, megabytes=megabytes: say(found, mbit, way, megabytes),
        )
        for mbit, way, megabytes, seconds in HOSTS_POINTS
    ]
    start = {"share of the link that arrives": (0.5, 0.9, 1.0), "seconds of a message": (1e-5, 1e-3, 1.0)}
    return _fit(start, points)


def bytes_of_hosts(way: str) -> float:
    """MB that leave a host of two in a step, of two hosts, by the formulas: as seconds over a link of 1 MB/s."""
    links = Links(2, 1e18, 1e6, (0.0, 0.0))
    if way == "plain":
        return 2 * ring(links, 4, 4 * HOSTS_WEIGHTS)
    return shares(links, 4, 258 / 256 * HOSTS_WEIGHTS)
