"""Pictures for a person: the loss curve, and grids of images to compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.evaluate.drawing.infotext import png_text
from trainer.guards import DEFAULT_LIMITS
from trainer.raster import open_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _CAPTION_INK, _FAINT_INK, _PAPER = "#1f2328", "#3d444d", "#6e7781", "#ffffff"
_TRAIN, _VALIDATION = "#2f6fb5", "#d1495b"
_AVERAGES = "#2a9d68", "#8e5bb5", "#c77f1a"  # of the weights; more of them repeat the colours
_MARGIN_PX, _GAP_PX = 20, 10
CELL_PX = 256
_MAX_POINTS = 4000  # of the raw loss: more cannot be told apart


@dataclass(frozen=True)
class GridRow:
    """One row of an image grid."""

    label: str
    images: Sequence[Image.Image]  # of any sizes
    captions: Sequence[str] = ()  # one for each image, or none; three lines of each are shown
    details: Sequence[str] = ()  # the same, in lines of their own below it


def loss_curve_png(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the training loss, raw and smoothed, with the validation loss on top.

    Where validation records have losses at timesteps (`loss_t100`, ...), a second panel shows each in
    percent of its first value, since they differ in size by orders of magnitude.

    Args:
        metrics: records of `metrics.jsonl` (kinds `train`, `validation`, and `validation_NAME` of an average); may be
            empty.
        path: the PNG; its folder must exist.
        title: such as the run's name.
    """
    # Imported here: it takes 0.5 s, and the figure needs no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = _column(metrics, "train", "loss")
    prefix, kinds = "validation_", {record["kind"] for record in metrics}
    averages = sorted(kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix))
    validation = {"validation": _column(metrics, "validation", "loss")}
    validation |= {f"validation of {name}": _column(metrics, prefix + name, "loss") for name in averages}
    names = {name for record in metrics if record["kind"] == "validation" for name in record}
    timesteps = sorted(int(name.removeprefix("loss_t")) for name in names if name.startswith("loss_t"))
    figure = Figure(figsize=(9, 7.2 if timesteps else 4.8), dpi=120, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    if timesteps:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _draw_timesteps(bottom, {t: _column(metrics, "validation", f"loss_t{t}") for t in timesteps})
        last = bottom
    else:
        top = last = figure.subplots()
    _draw_losses(top, train, validation)
    last.set_xlabel("optimizer step", color=_INK)
    last.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    last.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    top.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
    partial = _partial(path)
    figure.savefig(partial, format="png")
    partial.replace(path)


def image_grid(
    rows: Sequence[GridRow],
    path: Path,
    title: str = "",
    cell_px: int = CELL_PX,
    max_columns: int = 8,
    text: str = "",
) -> None:
    """Draws rows of images below each other, so that the n-th images of all rows share a column.

    Images are fitted into square cells without changing their shape; captions are wrapped below them.
    Rows of more than `max_columns` images go on in a further block of all rows.

    Args:
        rows: a row may be shorter than others.
        path: the PNG; its folder must exist.
        title: on top, up to three lines; empty: none.
        cell_px: side of a cell.
        max_columns: images beside each other.
        text: what the file says of how the images were drawn (`infotext`); empty: nothing.
    """
    num_images = max((len(row.images) for row in rows), default=0)
    width_px = 2 * _MARGIN_PX + min(max(num_images, 1), max_columns) * (cell_px + _GAP_PX) - _GAP_PX
    strips = [_text_strip(title, _font(20, bold=True), width_px, _MARGIN_PX, max_lines=3)] if title else []
    for start in range(0, num_images, max_columns):
        for row in rows:
            columns = slice(start, start + max_columns)
            if row.images[columns]:
                strips.append(_text_strip(row.label, _font(15, bold=True), width_px, _GAP_PX, max_lines=2))
                below = row.captions[columns], row.details[columns]
                strips.append(_row_strip(row.images[columns], *below, cell_px, width_px))
    sheet = Image.new("RGB", (width_px, _MARGIN_PX + sum(strip.height for strip in strips) + _GAP_PX), _PAPER)
    top = _MARGIN_PX
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    partial = _partial(path)
    sheet.save(partial, format="PNG", pnginfo=png_text(text) if text else None)
    partial.replace(path)


def read_small(path: Path, side_px: int = CELL_PX) -> Image.Image:
    """An image of ours, as large as a cell of a grid.

    Raises:
        Exception: any of `DECODE_ERRORS`.
    """
    with open_image(path, DEFAULT_LIMITS) as image:
        return fitted(image, side_px)


def fitted(image: Image.Image, side_px: int) -> Image.Image:
    """RGB, its longer side so long."""
    scale = side_px / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _text_strip(
    text: str, font: ImageFont.FreeTypeFont, width_px: int, below_px: int, *, max_lines: int
) -> Image.Image:
    line_px, lines = _line_px(font), _wrapped(text, font, width_px - 2 * _MARGIN_PX, max_lines)
    strip = Image.new("RGB", (width_px, line_px * len(lines) + below_px), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((_MARGIN_PX, number * line_px), line, font=font, fill=_INK)
    return strip


def _row_strip(
    images: Sequence[Image.Image], captions: Sequence[str], details: Sequence[str], cell_px: int, width_px: int
) -> Image.Image:
    small = [fitted(image, cell_px) for image in images]
    font = _font(12)
    texts = [_wrapped(caption, font, cell_px, max_lines=3) for caption in captions] or [[] for _ in details]
    for lines, told in zip(texts, details, strict=False):
        lines += _wrapped(told, font, cell_px, max_lines=2)
    row_px, line_px = max(image.height for image in small), _line_px(font)
    text_px = max((len(lines) for lines in texts), default=0) * line_px
    strip = Image.new("RGB", (width_px, row_px + (_GAP_PX // 2 + text_px if text_px else 0) + 2 * _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, image in enumerate(small):
        left = _MARGIN_PX + number * (cell_px + _GAP_PX)
        strip.paste(image, (left + (cell_px - image.width) // 2, row_px - image.height))
        for line, text in enumerate(texts[number] if number < len(texts) else ()):
            draw.text((left, row_px + _GAP_PX // 2 + line * line_px), text, font=font, fill=_CAPTION_INK)
    return strip


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int, max_lines: int) -> list[str]:
    """Lines that fit the width; words wider than a line are cut, and so is what does not fit the lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width_px:
                lines.append("")
            lines[-1] += character
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width_px:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip(" ,.;") + "…"]


def _font(size_px: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib's font has more scripts than Pillow's, and comes with it on every system.
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", name), size_px)


def _line_px(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 2


def _partial(path: Path) -> Path:
    """Where a picture is written before it takes its name, so that a viewer never sees half of it."""
    return path.with_name(path.name + ".partial")


def _column(metrics: Sequence[Mapping[str, Any]], kind: str, name: str) -> np.ndarray:
    """Steps and values [n, 2] of a kind of record; missing and non-finite values (null) are left out."""
    pairs = [(record["step"], record[name]) for record in metrics if record["kind"] == kind and name in record]
    return np.array([pair for pair in pairs if pair[1] is not None], dtype=np.float64).reshape(-1, 2)


def _smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred moving mean over a twentieth of the values (cut off at both ends), and its width."""
    half = max(len(values) // 40, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low), min(2 * half + 1, len(values))


def _draw_losses(axes: "Axes", train: np.ndarray, validation: Mapping[str, np.ndarray]) -> None:
    limits: list[float] = []
    if len(train):
        thin = train[:: math.ceil(len(train) / _MAX_POINTS)]
        axes.plot(thin[:, 0], thin[:, 1], color=_TRAIN, alpha=0.22, linewidth=0.8, label="training, each step")
        smooth, width = _smoothed(train[:, 1])
        width_steps = round(width * float(np.median(np.diff(train[:, 0])))) if len(train) > 1 else 1
        label = f"training, mean of {width_steps:,} steps{_ends(smooth)}"
        axes.plot(train[:, 0], smooth, color=_TRAIN, linewidth=2.0, label=label)
        # A few wild steps must not press everything else flat.
        limits += [*np.quantile(train[:, 1], (0.005, 0.99)), smooth.min(), smooth.max()]
    for index, (name, column) in enumerate(validation.items()):
        if len(column):
            colour = _AVERAGES[(index - 1) % len(_AVERAGES)] if index else _VALIDATION
            label = f"{name}{_ends(column[:, 1])}"
            axes.plot(column[:, 0], column[:, 1], "o-", color=colour, linewidth=1.6, markersize=5, label=label)
            limits += [column[:, 1].min(), column[:, 1].max()]
    if limits:
        low, high = min(limits), max(limits)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(max(low - room, 0.0), high + room)
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    else:
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color=_FAINT_INK)
    axes.set_ylabel("loss", color=_INK)
    _style(axes)


def _draw_timesteps(axes: "Axes", by_timestep: Mapping[int, np.ndarray]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(by_timestep)))
    for colour, (timestep, column) in zip(colours, by_timestep.items(), strict=True):
        if len(column) and column[0, 1]:
            label = f"t {timestep}{_ends(column[:, 1])}"
            percent = 100 * column[:, 1] / column[0, 1]
            axes.plot(column[:, 0], percent, "o-", color=colour, linewidth=1.4, markersize=3.5, label=label)
    axes.axhline(100, color=_FAINT_INK, linewidth=0.8, linestyle=":")
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:.0f} %")
    axes.set_ylabel("validation loss,\nof its first value", color=_INK)
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.3,
        ncols=5,
        handlelength=1.4,
        columnspacing=1.6,
    )
    _style(axes)


def _ends(values: np.ndarray) -> str:
    return f": {values[0]:.3g} → {values[-1]:.3g}" if len(values) > 1 else f": {values[0]:.3g}"


def _style(axes: "Axes") -> None:
    axes.grid(axis="y", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT_INK, labelsize=9)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#afb8c1")
