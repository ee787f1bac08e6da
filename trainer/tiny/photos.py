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


class Part(NamedTuple):
    """A part of a photograph that is worth a crop of its own."""

    name: str  # a noun phrase, as it stands in the caption
    x: float  # centre, as a share of the width
    y: float  # centre, as a share of the height
    size: float  # square root of the crop's area, as a share of the photograph's shorter side


@dataclass(frozen=True)
class Photo:
    """One photograph: where it lies, what it shows, who made it, and its parts."""

    package: str
    """Name that is imported."""
    distribution: str
    """Name that is installed."""
    file: str
    subject: str
    origin: str
    """Who made it, and the licence."""
    parts: tuple[Part, ...]
    views: int = 2
    """Crops of each part, at different aspect ratios."""
    gray: bool = False

    @property
    def name(self) -> str:
        return Path(self.file).stem.replace("_", "-")


@dataclass(frozen=True)
class View:
    """One crop to make: a box in the photograph, the size it is saved at, and its caption."""

    photo: Photo
    stem: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in the photograph's pixels
    size_wh: tuple[int, int]
    caption: str


def _skimage(
    file: str, subject: str, origin: str, parts: tuple[Part, ...], views: int = 2, gray: bool = False
) -> Photo:
    return Photo("skimage", "scikit-image", f"data/{file}", subject, origin, parts, views, gray)


PHOTOS = (
    _skimage(
        "astronaut.png",
        "an astronaut in an orange space suit",
        "NASA, public domain",
        (
            Part("the woman with her helmet, a flag and a model shuttle", 0.5, 0.5, 1.0),
            Part("the smiling face", 0.44, 0.22, 0.42),
            Part("the black visor of the helmet", 0.78, 0.82, 0.42),
            Part("the model of the space shuttle", 0.8, 0.28, 0.45),
            Part("the mission patch on the suit", 0.33, 0.74, 0.4),
            Part("the head and shoulders", 0.42, 0.35, 0.68),
        ),
    ),
    _skimage(
        "chelsea.png",
        "a tabby cat",
        "Stefan van der Walt, CC0",
        (
            Part("the face", 0.5, 0.5, 1.2),
            Part("the eye on the left", 0.38, 0.39, 0.6),
            Part("the eye on the right", 0.72, 0.43, 0.6),
            Part("the nose and whiskers", 0.55, 0.8, 0.65),
            Part("the striped forehead", 0.55, 0.15, 0.65),
            Part("the green eyes", 0.55, 0.42, 0.85),
        ),
    ),
    _skimage(
        "coffee.png",
        "a cup of espresso on a red saucer",
        "Rachel Michetti, CC0",
        (
            Part("the cup on a wooden table", 0.5, 0.5, 1.2),
            Part("the coffee in the cup", 0.48, 0.28, 0.62),
            Part("the spoon on the saucer", 0.6, 0.68, 0.55),
            Part("the red handle of the cup", 0.37, 0.66, 0.55),
            Part("the grain of the wooden table", 0.88, 0.55, 0.55),
            Part("the cup seen close", 0.5, 0.45, 0.85),
        ),
    ),
    _skimage(
        "rocket.jpg",
        "a white rocket on its launch pad at dusk",
        "SpaceX, public domain",
        (
            Part("the rocket between steel towers and lights", 0.5, 0.5, 1.2),
            Part("the top of the rocket against the blue sky", 0.5, 0.38, 0.5),
            Part("the star-shaped lights at the foot", 0.5, 0.88, 0.5),
            Part("the lattice tower on the left", 0.12, 0.4, 0.6),
            Part("the lattice tower on the right", 0.92, 0.4, 0.6),
            Part("the rocket in the middle", 0.5, 0.6, 0.8),
        ),
    ),
    _skimage(
        "hubble_deep_field.jpg",
        "distant galaxies in deep space",
        "NASA, public domain",
        (
            Part("a field of galaxies", 0.5, 0.5, 1.0),
            Part("a bright galaxy on the left", 0.15, 0.45, 0.4),
            Part("orange galaxies on black", 0.72, 0.56, 0.4),
            Part("blue galaxies near the top", 0.42, 0.12, 0.4),
            Part("galaxies near the lower edge", 0.45, 0.85, 0.45),
        ),
    ),
    Photo(
        "sklearn",
        "scikit-learn",
        "datasets/images/china.jpg",
        "a Chinese pagoda above a lake",
        "danielbuechele on Flickr, CC BY 2.0",
        (
            Part("the tower, the trees and the water", 0.5, 0.5, 1.2),
            Part("the orange roof at the top", 0.32, 0.22, 0.5),
            Part("the red galleries in the middle", 0.32, 0.55, 0.55),
            Part("the lake in the haze", 0.72, 0.45, 0.6),
            Part("the green trees below", 0.7, 0.82, 0.55),
            Part("the tower", 0.32, 0.48, 0.9),
        ),
    ),
    Photo(
        "sklearn",
        "scikit-learn",
        "datasets/images/flower.jpg",
        "an orange dahlia in bloom",
        "vultilion on Flickr, CC BY 2.0",
        (
            Part("the flower before dark green leaves", 0.5, 0.5, 1.2),
            Part("the heart of the flower", 0.48, 0.52, 0.5),
            Part("the petals at the upper left", 0.36, 0.36, 0.5),
            Part("the petals at the lower right", 0.58, 0.68, 0.5),
            Part("blurred leaves beside the flower", 0.85, 0.35, 0.6),
            Part("the round head of the flower", 0.48, 0.52, 0.8),
        ),
    ),
    Photo(
        "matplotlib",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        "a naval officer with glasses",
        "US Navy, public domain",
        (
            Part("the woman in uniform before a flag", 0.5, 0.5, 1.1),
            Part("the face with glasses", 0.53, 0.36, 0.5),
            Part("the officer's cap", 0.5, 0.15, 0.5),
            Part("the coloured ribbons on the dark jacket", 0.74, 0.82, 0.45),
            Part("the stars of the flag", 0.15, 0.25, 0.42),
            Part("the head and shoulders", 0.5, 0.42, 0.85),
        ),
    ),
    _skimage(
        "camera.png",
        "a man with a camera on a tripod",
        "Lav Varshney, CC0",
        (
            Part("the man bending over his camera on the grass", 0.5, 0.5, 1.0),
            Part("the head and the camera", 0.48, 0.28, 0.5),
            Part("the legs of the tripod", 0.6, 0.78, 0.5),
            Part("the skyline behind the field", 0.8, 0.35, 0.45),
            Part("the man in his black coat", 0.35, 0.45, 0.75),
        ),
        gray=True,
    ),
    _skimage(
        "coins.png",
        "old Greek coins",
        "Brooklyn Museum, no known copyright restrictions",
        (
            Part("four rows of coins on a dark cloth", 0.5, 0.5, 1.2),
            Part("the coins at the upper left", 0.25, 0.3, 0.6),
            Part("the coins at the lower right", 0.75, 0.7, 0.6),
        ),
        gray=True,
    ),
    _skimage("brick.png", "a brick wall", "CC0Textures, CC0", (Part("rows of bricks", 0.5, 0.5, 0.7),), 4, gray=True),
    _skimage("gravel.png", "gravel", "CC0Textures, CC0", (Part("small stones", 0.5, 0.5, 0.7),), 3, gray=True),
    _skimage("grass.png", "a lawn", "linolafett, CC0", (Part("blades of grass", 0.5, 0.5, 0.7),), 3, gray=True),
)

# Width to height, in an order that gives neighbours different shapes.
_ASPECTS = (1.0, 3 / 2, 3 / 4, 16 / 9, 2 / 3, 4 / 3, 1 / 2, 2.0, 9 / 16)
_SMALL_AREA_PX, _LARGE_AREA_PX = 256 * 256, 320 * 320
_CAPTIONS = (
    "a {medium} of {subject}, {distance} of {part}, {shape}",
    "{part}, {distance}, from a {shape} {medium} of {subject}",
    "{subject}, {shape} {medium} showing {part}",
    "{distance} of {part} in a {medium} of {subject}, {shape} format",
    "{shape} {medium}, {subject}, {part}",
)


def _shape_word(aspect: float) -> str:
    if aspect == 1:
        return "square"
    words = ("landscape", "wide landscape") if aspect > 1 else ("portrait", "tall portrait")
    return words[max(aspect, 1 / aspect) > 1.6]


def _box(part: Part, aspect: float, zoom: float, photo_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box of this aspect ratio inside the photograph that is at most the part's size, near its centre."""
    width, height = photo_wh
    side = part.size * zoom * min(photo_wh)
    crop_w, crop_h = side * math.sqrt(aspect), side / math.sqrt(aspect)
    fit = min(1.0, width / crop_w, height / crop_h)
    box_w, box_h = int(crop_w * fit), int(crop_h * fit)
    left = min(max(int(part.x * width - box_w / 2), 0), width - box_w)
    top = min(max(int(part.y * height - box_h / 2), 0), height - box_h)
    return left, top, left + box_w, top + box_h


def views(photo: Photo, photo_wh: tuple[int, int], first: int) -> list[View]:
    """Returns the crops of one photograph; `first` is the running number of its first crop."""
    found = []
    for nth_part, part in enumerate(photo.parts):
        for nth_view in range(photo.views):
            number = first + len(found)
            aspect = _ASPECTS[number % len(_ASPECTS)]
            if photo.views > 2:  # a texture: another place for each view
                part = part._replace(x=0.3 + 0.4 * (nth_view % 2), y=0.3 + 0.4 * (nth_view // 2))
            box = _box(part, aspect, 1.0 if nth_view % 2 == 0 else 1.15, photo_wh)
            box_area = (box[2] - box[0]) * (box[3] - box[1])
            area = _LARGE_AREA_PX if box_area >= _LARGE_AREA_PX else _SMALL_AREA_PX
            scale = math.sqrt(area / box_area)
            distance = "wide view" if part.size >= 1 else "medium view" if part.size > 0.65 else "close-up"
            caption = _CAPTIONS[(number + number // len(_CAPTIONS)) % len(_CAPTIONS)].format(
                medium="black and white photograph" if photo.gray else "photograph",
                subject=photo.subject,
                part=part.name,
                distance=distance,
                shape=_shape_word(aspect),
            )
            size_wh = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
            found.append(View(photo, f"{photo.name}-{nth_part}{'abcd'[nth_view]}", box, size_wh, caption))
    return found


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
        with Image.open(path) as file:
            image = file.convert("RGB")
        for view in views(photo, image.size, count):
            crop = image.resize(view.size_wh, Image.Resampling.LANCZOS, box=view.box)
            crop.save(folder / f"{view.stem}.jpg", quality=95, subsampling=0)
            (folder / f"{view.stem}.txt").write_text(view.caption + "\n", encoding="utf-8")
            count += 1
    origins = "".join(f"- `{p.name}-*.jpg`: {p.distribution} `{p.file}`, {p.origin}\n" for p in PHOTOS)
    (folder / "ORIGIN.md").write_text(f"# Where these photographs come from\n\n{origins}", encoding="utf-8")
    return count
