"""A small data set of real photographs: captioned crops of pictures that PyPI packages ship.

Nothing is downloaded. The packages are searched for, never imported, so that none of what they need
has to be installed.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from trainer.errors import UserError
from trainer.package_files import find_package_file
from trainer.raster import open_image


class Framing(NamedTuple):
    """Where a crop lies in its photograph."""

    x: float  # centre, as a share of the width
    y: float  # centre, as a share of the height
    size: float  # square root of the crop's area, as a share of the photograph's shorter side


@dataclass(frozen=True)
class Photo:
    """One photograph: where it lies, what it shows, who made it, and how it is cropped."""

    package: str
    """Name that is imported."""
    distribution: str
    """Name that is installed."""
    file: str
    subject: str
    origin: str
    """Who made it, and the licence."""
    framing: Framing

    @property
    def name(self) -> str:
        return Path(self.file).stem.replace("_", "-")


@dataclass(frozen=True)
class View:
    """One crop to make: a box in the photograph, the size it is saved at, and its caption."""

    stem: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in the photograph's pixels
    size_wh: tuple[int, int]
    caption: str


# Few subjects, of different colours and shapes: what a tiny model can learn in minutes, and an eye knows again.
PHOTOS = (
    Photo(
        "skimage",
        "scikit-image",
        "data/astronaut.png",
        "an astronaut in an orange space suit",
        "NASA, public domain",
        Framing(0.49, 0.48, 0.98),
    ),
    Photo(
        "skimage",
        "scikit-image",
        "data/coffee.png",
        "a cup of espresso on a red saucer",
        "Rachel Michetti, CC0",
        Framing(0.48, 0.48, 1.0),
    ),
    Photo(
        "skimage",
        "scikit-image",
        "data/rocket.jpg",
        "a white rocket on its launch pad at dusk",
        "SpaceX, public domain",
        Framing(0.5, 0.58, 1.0),
    ),
    Photo(
        "sklearn",
        "scikit-learn",
        "datasets/images/china.jpg",
        "a Chinese pagoda above a lake",
        "danielbuechele on Flickr, CC BY 2.0",
        Framing(0.38, 0.5, 1.05),
    ),
    Photo(
        "sklearn",
        "scikit-learn",
        "datasets/images/flower.jpg",
        "an orange dahlia in bloom",
        "vultilion on Flickr, CC BY 2.0",
        Framing(0.48, 0.52, 0.9),
    ),
    Photo(
        "matplotlib",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        "a naval officer with glasses",
        "US Navy, public domain",
        Framing(0.5, 0.45, 0.92),
    ),
)

# Twice the buckets of configs/tiny.yaml, so that nothing is cut off there.
_SIZES_WH = {"square": (256, 256), "landscape": (320, 192), "portrait": (192, 320)}


def _box(framing: Framing, aspect: float, photo_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box of this aspect ratio in the photograph, at most of the framing's size, near its centre."""
    width, height = photo_wh
    side = framing.size * min(photo_wh)
    crop_w, crop_h = side * math.sqrt(aspect), side / math.sqrt(aspect)
    fit = min(1.0, width / crop_w, height / crop_h)
    box_w, box_h = int(crop_w * fit), int(crop_h * fit)
    left = min(max(int(framing.x * width - box_w / 2), 0), width - box_w)
    top = min(max(int(framing.y * height - box_h / 2), 0), height - box_h)
    return left, top, left + box_w, top + box_h


def views(photo: Photo, photo_wh: tuple[int, int]) -> list[View]:
    """Returns the crops of one photograph: its subject in three shapes."""
    return [
        View(
            f"{photo.name}-{shape}",
            _box(photo.framing, size_wh[0] / size_wh[1], photo_wh),
            size_wh,
            f"a {shape} photograph of {photo.subject}",
        )
        for shape, size_wh in _SIZES_WH.items()
    ]


def _find(photo: Photo) -> Path | UserError:
    try:
        return find_package_file(photo.package, photo.distribution, photo.file)
    except UserError as error:
        return error


def write_photos(folder: Path, show_progress: bool = True) -> int:
    """Writes the crops as `<name>.jpg` with their captions as `<name>.txt`, and their origins as `ORIGIN.md`.

    Args:
        folder: an existing folder.

    Returns:
        The number of crops.

    Raises:
        UserError: a package that ships some of the photographs is missing; all missing ones are named.
    """
    found = [_find(photo) for photo in PHOTOS]
    problems = [line for path in found if isinstance(path, UserError) for line in path.lines]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    paths = [path for path in found if isinstance(path, Path)]
    count = 0
    for photo, path in tqdm(
        dict(zip(PHOTOS, paths, strict=True)).items(),
        "photographs",
        unit="photo",
        disable=None if show_progress else True,
    ):
        with open_image(path) as file:
            image = file.convert("RGB")
        for view in views(photo, image.size):
            crop = image.resize(view.size_wh, Image.Resampling.LANCZOS, box=view.box)
            crop.save(folder / f"{view.stem}.jpg", quality=95, subsampling=0)
            (folder / f"{view.stem}.txt").write_text(view.caption + "\n", encoding="utf-8")
            count += 1
    origins = "".join(f"- `{p.name}-*.jpg`: {p.distribution} `{p.file}`, {p.origin}\n" for p in PHOTOS)
    (folder / "ORIGIN.md").write_text(f"# Where these photographs come from\n\n{origins}", encoding="utf-8")
    return count
