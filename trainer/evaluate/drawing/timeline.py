"""What the training has drawn, on one sheet: a row for each prompt, a column for each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trainer.errors import UserError, printable
from trainer.evaluate.drawing.infotext import CHUNK, Told, read_infotext
from trainer.evaluate.drawing.places import DrawnAt, drawings_of
from trainer.evaluate.pictures import GridRow, fitted, image_grid
from trainer.guards import DEFAULT_LIMITS
from trainer.raster import DECODE_ERRORS, open_image

MOST_STEPS, MOST_PROMPTS = 12, 32
_CELL_PX = 192
_PAPER = "#ffffff"
Key = tuple[str, ...]


@dataclass(frozen=True)
class _Shown:
    """An image of a drawing, small, and what tells it from the others of that drawing."""

    key: Key
    image: Image.Image
    told: Told


def timeline_sheet(samples: Path, name: str, average: str = "", out: Path | None = None) -> Path:
    """Write `samples/timeline[-AVERAGE].png` from a run's drawings.

    Images belong together that have the same prompts, seed and size by what their files say; those that say nothing,
    that have the same name. Of many steps, evenly chosen ones are shown, the first and the last among them. A place
    where nothing was drawn stays empty.

    Args:
        samples: the run's folder of drawings.
        name: of the run.
        average: of the weights; empty: those that train.
        out: where to write in place of that.
    Returns:
        The sheet's path.
    Raises:
        UserError: nothing is drawn that could be shown, or the sheet cannot be written.
    """
    drawn = _evenly(drawings_of(samples, average), MOST_STEPS)
    columns = {each.step: _images_of(each.folder) for each in drawn}
    columns = {step: images for step, images in columns.items() if images}
    if not columns:
        of = f" by the average {printable(average)}" if average else ""
        raise UserError(f"{samples}: holds nothing that was drawn while training{of}; samples.every_steps draws")
    keys: dict[Key, Told] = {}
    for images in reversed(columns.values()):  # the newest drawing's prompts first, in its order
        for key, shown in images.items():
            keys.setdefault(key, shown.told)
    rows = [_row(key, told, columns) for key, told in [*keys.items()][:MOST_PROMPTS]]
    left_out = f", {MOST_PROMPTS} of {len(keys)} prompts" if len(keys) > MOST_PROMPTS else ""
    title = f"{printable(name)}{f', {printable(average)}' if average else ''}{left_out}"
    path = out or samples / f"timeline{f'-{average}' if average else ''}.png"
    try:
        image_grid(rows, path, title, cell_px=_CELL_PX, max_columns=MOST_STEPS)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from None
    return path


def _row(key: Key, told: Told, columns: Mapping[int, Mapping[Key, _Shown]]) -> GridRow:
    empty = Image.new("RGB", (_CELL_PX, 1), _PAPER)
    images = [shown[key].image if key in shown else empty for shown in columns.values()]
    captions = [f"step {step:,}" if key in shown else "" for step, shown in columns.items()]
    words = [f"{name} {told.settings[of]}" for name, of in (("seed", "Seed"), ("", "Size")) if of in told.settings]
    label = " ".join((told.prompt or key[-1]).split())
    return GridRow(_cut(label, 160) + "".join(f"  ·  {word.strip()}" for word in words), images, captions)


def _images_of(folder: Path) -> dict[Key, _Shown]:
    found: dict[Key, _Shown] = {}
    for file in sorted(folder.glob("*.png"), key=lambda file: (len(file.name), file.name))[: 2 * MOST_PROMPTS]:
        try:
            with open_image(file, DEFAULT_LIMITS) as image:
                told = read_infotext(str(image.info.get(CHUNK, "")))
                small = fitted(image, _CELL_PX)
        except DECODE_ERRORS:
            continue  # what is no image is none of the drawing's
        of = told.settings
        named = (told.prompt, told.negative_prompt, of.get("Seed", ""), of.get("Size", ""), of.get("Unconditional", ""))
        key = named if of else (file.stem,)
        found.setdefault(key, _Shown(key, small, told))
    return found


def _evenly(drawn: Sequence[DrawnAt], most: int) -> Sequence[DrawnAt]:
    if len(drawn) <= most:
        return drawn
    return [drawn[i * (len(drawn) - 1) // (most - 1)] for i in range(most)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
