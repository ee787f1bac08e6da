"""Two evaluations compared image by image: the same images with the same noise, so that their differences weigh out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError, printable
from trainer.evaluate.validating.intervals import Estimate, mean_of
from trainer.guards import DEFAULT_LIMITS, Limits, read_json

LOSSES_FILE = "losses.json"


@dataclass(frozen=True)
class ImageLosses:
    """What an evaluation left behind: of each held-out image, by its key, the loss at each timestep."""

    timesteps: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Paired:
    """How much greater one evaluation's losses are than another's, over the images and timesteps of both.

    Each image counts once; the interval is Student's, of the images' own differences.
    """

    overall: Estimate
    by_timestep: Mapping[int, Estimate]


def write_losses(path: Path, found: ImageLosses) -> None:
    """As JSON, for later evaluations."""
    path.write_text(json.dumps({"timesteps": found.timesteps, "losses": found.losses}) + "\n")


def read_losses(place: Path, limits: Limits = DEFAULT_LIMITS) -> ImageLosses:
    """Of an evaluation's folder, or of the file in it.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = place / LOSSES_FILE if place.is_dir() else place
    try:
        content = read_json(path, limits)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the folder of an earlier `eval`") from None
    steps, losses = (content.get("timesteps"), content.get("losses")) if isinstance(content, dict) else (None, None)
    if not isinstance(steps, list) or not _are(steps, int) or not isinstance(losses, dict):
        raise UserError(f"{path}: not what `eval` writes: wanted `timesteps` and `losses`")
    for key, values in losses.items():
        if not _are(values, float) or len(values) != len(steps):
            raise UserError(f"{path}: losses of {printable(key, 80)}: wanted a number for each timestep")
    return ImageLosses(tuple(steps), {key: tuple(values) for key, values in losses.items()})


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


def paired(one: ImageLosses, other: ImageLosses) -> Paired:
    """one - other.

    Raises:
        UserError: they have no timestep or fewer than two images in common.
    """
    steps = [t for t in one.timesteps if t in other.timesteps]
    keys = sorted(one.losses.keys() & other.losses.keys())
    if not steps or len(keys) < 2:
        raise UserError("the two evaluations have too few images or no timesteps in common; nothing is compared")
    places = [(one.timesteps.index(t), other.timesteps.index(t)) for t in steps]
    rows = [[one.losses[key][i] - other.losses[key][j] for i, j in places] for key in keys]
    even = [1.0] * len(rows)
    overall = mean_of([sum(row) / len(row) for row in rows], even)
    return Paired(overall, {t: mean_of([row[i] for row in rows], even) for i, t in enumerate(steps)})


def paired_table(found: Paired, against: str) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"loss less that of {against}, image by image, over {found.overall.images:,} images:"
    yield f"  all timesteps  {_told(found.overall)}"
    for timestep, estimate in found.by_timestep.items():
        yield f"  timestep {timestep:4d}  {_told(estimate)}"


def paired_record(found: Paired, against: str) -> dict[str, Any]:
    """JSON-able."""
    by_timestep = {str(t): _plain(estimate) for t, estimate in found.by_timestep.items()}
    return {"against": against, "images": found.overall.images, **_plain(found.overall), "by_timestep": by_timestep}


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"difference": estimate.mean, "plus_minus": estimate.half_width}


def _told(estimate: Estimate) -> str:
    return f"{estimate.mean:+.5f} ± {estimate.half_width or 0.0:.5f}"


def losses_of(images: Sequence[tuple[str, tuple[float, ...]]], timesteps: Sequence[int]) -> ImageLosses:
    """Of images by key."""
    return ImageLosses(tuple(timesteps), dict(images))
