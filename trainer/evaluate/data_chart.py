"""A picture of a data set: histograms of aspect ratio, size and caption length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT_INK, _PAPER, _GRID = "#1f2328", "#6e7781", "#ffffff", "#d8dee4"
_ORIGINAL, _BUCKET, _MARK = "#2f6fb5", "#9ec5e8", "#d1495b"
_RATIOS = ((1, 4), (1, 3), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (3, 1), (4, 1))


@dataclass(frozen=True)
class DataChart:
    """What is drawn; arrays are of the sampled images."""

    title: str
    subtitle: str
    original_hw: np.ndarray
    """int [n, 2], in pixels; 0 where it is not known."""
    target_hw: np.ndarray
    """int [n, 2], in pixels."""
    text_lengths: Sequence[int]
    length_unit: str
    """Such as `CLIP tokens`."""
    used_length: int | None
    """Where texts are cut off, in the same unit."""
    loss_weights: np.ndarray
    """float [n]; empty where all images count the same, and then not drawn."""


def data_chart_png(chart: DataChart, path: Path) -> None:
    """Draws three histograms side by side, with one of loss weights as a fourth; the file appears whole or not at all.

    Its folder must exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 4 if len(chart.loss_weights) else 3
    figure = Figure(figsize=(5 * columns, 4.8), dpi=120, layout="constrained", facecolor=_PAPER)
    figure.get_layout_engine().set(w_pad=0.15, rect=(0, 0, 1, 0.87))  # type: ignore[call-arg]
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in axes:
        _plain(axis)
        axis.margins(y=0.14)  # room for what is written beside a mark
    if len(chart.target_hw):
        _draw_aspects(axes[0], chart)
        _draw_megapixels(axes[1], chart)
    _draw_lengths(axes[2], chart)
    if len(chart.loss_weights):
        _draw_loss_weights(axes[3], chart.loss_weights)
    figure.text(0.01, 0.975, chart.title, va="top", fontsize=14, fontweight="bold", color=_INK)
    figure.text(0.01, 0.915, chart.subtitle, va="top", fontsize=10, color=_FAINT_INK)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _plain(axis: "Axes") -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT_INK)
    axis.tick_params(colors=_FAINT_INK, labelsize=9, length=3)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def _draw_aspects(axis: "Axes", chart: DataChart) -> None:
    """Width / height on a logarithmic axis, on which portrait and landscape mirror each other."""
    known = chart.original_hw[chart.original_hw.all(axis=1)]
    originals = np.log2(known[:, 1] / known[:, 0])
    buckets = np.log2(chart.target_hw[:, 1] / chart.target_hw[:, 0])
    reach = max(1.05, float(np.abs(np.concatenate([originals, buckets])).max()) + 0.05)
    edges = np.linspace(-reach, reach, 2 * round(reach * 12) + 2)  # an odd number: squares lie in the middle of one
    axis.hist(buckets, edges.tolist(), weights=_shares(buckets), color=_BUCKET, label="bucket (as trained)")
    if len(originals):
        outline = {"histtype": "step", "color": _ORIGINAL, "linewidth": 1.6}
        axis.hist(originals, edges.tolist(), weights=_shares(originals), label="image file", **outline)
    shown = [ratio for ratio in _RATIOS if abs(np.log2(ratio[0] / ratio[1])) <= reach]
    axis.set_xticks([np.log2(w / h) for w, h in shown], [f"{w}:{h}" for w, h in shown])
    axis.set_xlim(-reach, reach)
    axis.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _title(axis, "Aspect ratio, width : height", "portrait \u2190  \u2192 landscape")
    squares = axis.axvline(0, color=_FAINT_INK, linewidth=0.8, linestyle=(0, (3, 3)))
    squares.set_zorder(0.5)


def _draw_megapixels(axis: "Axes", chart: DataChart) -> None:
    """Size of the files on a logarithmic axis; the line is the largest bucket."""
    is_known = chart.original_hw.all(axis=1)
    original_hw, target_hw = chart.original_hw[is_known], chart.target_hw[is_known]
    if not len(original_hw):
        axis.set_xticks([])
        axis.set_yticks([])
        _title(axis, "Size of the image files", "not known: only the latents are at hand")
        return
    megapixels = original_hw.prod(axis=1) / 1e6
    target = float(chart.target_hw.prod(axis=1).max()) / 1e6
    low, high = min(megapixels.min(), target), max(megapixels.max(), target)
    edges = np.geomspace(low / 1.05, high * 1.05, 41)
    axis.hist(megapixels, edges.tolist(), weights=_shares(megapixels), color=_ORIGINAL)
    axis.set_xscale("log")
    axis.minorticks_off()
    ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
    shown = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    smaller = float(np.mean(original_hw.prod(axis=1) < target_hw.prod(axis=1)))
    of = "" if is_known.all() else f" (known of {_percent(float(is_known.mean()))})"
    _mark(axis, target, f"largest bucket, {target:.2g} MP")
    _title(axis, "Size of the image files", f"megapixels{of}; {_percent(smaller)} are smaller than their bucket")


def _draw_lengths(axis: "Axes", chart: DataChart) -> None:
    lengths = np.asarray(chart.text_lengths)
    _title(axis, "Length of the captions", chart.length_unit)
    if not len(lengths):
        return
    most = max(int(np.quantile(lengths, 0.995)), (chart.used_length or 1) + 1)
    width = max(1, round(most / 40))
    edges = np.arange(0, most + 2 * width, width) - 0.5
    shown = np.minimum(lengths, edges[-1] - 0.5)  # the few longest share the last bar
    axis.hist(shown, edges.tolist(), weights=_shares(shown), color=_ORIGINAL)
    empty = float(np.mean(lengths == 0))
    notes = [chart.length_unit, f"median {int(np.median(lengths)):,}", f"{_percent(empty)} empty"]
    if chart.used_length is not None:
        longer = float(np.mean(lengths > chart.used_length))
        notes.append(f"{_percent(longer)} cut off")
        _mark(axis, chart.used_length + 0.5, f"{chart.used_length} are used")
    if lengths.max() > edges[-1]:
        notes.append(f"longest {int(lengths.max()):,}")
    axis.set_xlim(edges[0], edges[-1])
    _title(axis, "Length of the captions", "; ".join(notes))


def _draw_loss_weights(axis: "Axes", weights: np.ndarray) -> None:
    """On a logarithmic axis, on which half and double lie at the same distance from 1."""
    reach = 1.05 * max(2.0, float(weights.max()), 1 / float(weights.min()))
    edges = np.geomspace(1 / reach, reach, 42)  # an odd number of bars: 1 lies in the middle of one
    axis.hist(weights, edges.tolist(), weights=_shares(weights), color=_ORIGINAL)
    axis.set_xscale("log")
    axis.minorticks_off()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if 1 / reach <= tick <= reach]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    low, middle, high = np.quantile(weights, (0.05, 0.5, 0.95))
    notes = f"mean {weights.mean():.3g}, median {middle:.3g}; nine in ten from {low:.3g} to {high:.3g}"
    _title(axis, "Weight in the loss", notes)
    axis.axvline(1, color=_FAINT_INK, linewidth=0.8, linestyle=(0, (3, 3))).set_zorder(0.5)


def _shares(values: np.ndarray) -> np.ndarray:
    """Weights with which the bars of a histogram add up to 1."""
    return np.full(len(values), 1 / len(values))


def _percent(share: float) -> str:
    """No share but all is shown as 100 %, none but nothing as 0 %."""
    return f"{100 * share:.2f} %" if 0 < min(share, 1 - share) < 0.01 else f"{100 * share:.3g} %"


def _mark(axis: "Axes", x: float, text: str) -> None:
    axis.axvline(x, color=_MARK, linewidth=1.4)
    axis.annotate(
        text,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=9,
        color=_MARK,
    )


def _title(axis: "Axes", title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axis.set_xlabel(below, color=_FAINT_INK, fontsize=9.5)
