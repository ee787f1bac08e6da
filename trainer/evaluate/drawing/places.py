"""Where drawings lie: one folder each, which appears whole or not at all, with a sheet of all its images beside it.

    RUN/samples/step-00000120/        drawn while training; step-00000120-ema/: by an average of the weights
    RUN/samples/step-00000120.png     all of them on one sheet
    RUN/samples/drawn/step-00000120/  drawn by `sample`; step-00000120-2/ when it was there already
    RUN/samples/timeline.png          drawings of the training over its steps

A drawing that is made again while training (the run went back to a step before it) takes the place of the older one as
a whole; `sample` never touches what was drawn before.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

SAMPLES, BY_HAND = "samples", "drawn"
_STEP_DIGITS, _PREFIX = 8, "step-"


@dataclass(frozen=True)
class DrawnAt:
    """A drawing of the training."""

    folder: Path
    step: int
    average: str  # empty: of the weights that train


def sheet_of(folder: Path) -> Path:
    """Where the sheet of a drawing is. A folder's name may hold dots, as an average's does."""
    return folder.with_name(f"{folder.name}.png")


def folder_at(samples: Path, step: int, average: str = "") -> Path:
    """Where the training draws after so many steps."""
    return samples / (f"{_PREFIX}{step:0{_STEP_DIGITS}d}" + (f"-{average}" if average else ""))


def drawings_of(samples: Path, average: str = "") -> list[DrawnAt]:
    """The training's drawings by one kind of weights, in the order of their steps."""
    found = list[DrawnAt]()
    for folder in sorted(samples.glob(f"{_PREFIX}{'[0-9]' * _STEP_DIGITS}*/")):
        digits, _, name = folder.name.removeprefix(_PREFIX).partition("-")
        if digits.isdigit() and name == average:
            found.append(DrawnAt(folder, int(digits), name))
    return found


def fresh_folder(folder: Path) -> Path:
    """The folder, or if a drawing is there the first of `NAME-2`, `NAME-3`, ... where none is."""
    place, number = folder, 1
    while place.exists() or sheet_of(place).exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    return place


def begin_drawing(folder: Path) -> Path:
    """An empty folder beside `folder` to draw into, without what an interrupted drawing has left there."""
    partial = _beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def partial_of(folder: Path) -> Path:
    """What `begin_drawing` has made."""
    return _beside(folder, "partial")


def publish_drawing(folder: Path) -> None:
    """Let what was drawn take the place of `folder`, as a whole."""
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial_of(folder).rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
