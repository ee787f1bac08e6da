"""A picture of one validation: loss by timestep, bucket and source, with the intervals as bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.evaluate.validating.intervals import Estimate
from trainer.evaluate.validating.validation_result import MOST_GROUPS, ValidationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT_INK, _PAPER, _GRID = "#1f2328", "#6e7781", "#ffffff", "#d8dee4"
_HELD_OUT, _TRAINING = "#d1495b", "#2f6fb5"
_MOST_NAME = 28  # characters beside an axis


def validation_chart_png(result: ValidationResult, path: Path, title: str) -> None:
    """Draws three panels side by side; the file appears whole or not at all. Its folder must exist.

    Of buckets and sources, those of the most images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buckets, sources = _largest(result.buckets), _largest(result.sources)
    height = max(4.2, 1.6 + 0.28 * max(len(buckets) + len(result.further), len(sources)))
    figure = Figure(figsize=(14, height), dpi=120, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    _draw_timesteps(axes[0], result)
    spaced = {name.replace("x", " x "): estimate for name, estimate in buckets.items()}
    spaced |= {f"all at {at} px": estimate for at, estimate in result.resolutions.items()}
    _draw_groups(axes[1], spaced, result.loss, "By bucket")
    _draw_groups(axes[2], sources, result.loss, "By source")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _largest(groups: Mapping[str, Estimate]) -> dict[str, Estimate]:
    kept = sorted(groups, key=lambda name: -groups[name].images)[:MOST_GROUPS]
    return {name: estimate for name, estimate in groups.items() if name in kept}


def _draw_timesteps(axis: "Axes", result: ValidationResult) -> None:
    drawn = [("held out", _HELD_OUT, result.at_timesteps), ("trained on", _TRAINING, result.training_at_timesteps)]
    for name, colour, estimates in drawn:
        if not estimates:
            continue
        timesteps = sorted(estimates)
        means, bars = [estimates[t].mean for t in timesteps], [estimates[t].half_width or 0.0 for t in timesteps]
        label = f"{name}, {estimates[timesteps[0]].images:,} images"
        axis.errorbar(timesteps, means, bars, fmt="o-", color=colour, label=label, capsize=3, linewidth=1.4, ms=4)
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend above what is drawn
    axis.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=_INK)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    _style(axis, "By timestep", "timestep (0: the image, 999: noise)")


def _draw_groups(axis: "Axes", groups: Mapping[str, Estimate], whole: Estimate, title: str) -> None:
    names = [*groups][::-1]  # the first on top
    for place, name in enumerate(names):
        estimate = groups[name]
        axis.errorbar(
            estimate.mean, place, xerr=estimate.half_width, fmt="o", color=_HELD_OUT, capsize=3, linewidth=1.4, ms=4
        )
    labels = [f"{_short(name)}  ({groups[name].images:,})" for name in names]
    for label in axis.set_yticks(range(len(names)), labels):
        label.label1.set_parse_math(False)  # a source may be called $a$
    axis.set_ylim(-0.7, max(len(names), 1) - 0.3)
    axis.set_xlim(left=max(axis.get_xlim()[0], 0.0))  # a loss is not below, though the interval of two images is
    axis.axvline(whole.mean, color=_FAINT_INK, linewidth=0.8, linestyle=(0, (3, 3))).set_zorder(0.5)
    axis.grid(axis="x", color=_GRID, linewidth=0.8)
    _style(axis, title, "loss; bars: 95 % interval of the mean; dashed: all images")


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME else name[: _MOST_NAME - 1] + "…"


def _style(axis: "Axes", title: str, below: str) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#afb8c1")
    axis.tick_params(colors=_FAINT_INK, labelsize=9)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axis.set_xlabel(below, color=_FAINT_INK, fontsize=9.5)
