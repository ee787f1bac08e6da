"""Pieces of HTML: text that is escaped, numbers, tables with bars, histograms."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from trainer.errors import printable

_WIDTH, _HEIGHT = 400, 190  # of a histogram, in units of its drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 20, 38
_MOST_BINS = 32


class Bar(NamedTuple):
    """A row of a table with bars: `numbers` are shown behind the bar, which is as long as the first of them."""

    label: str
    numbers: tuple[float, ...]


def shown_text(text: str, most: int = 2000) -> str:
    """Text of unknown origin, on one line: nothing in it is markup, steers the line's direction or breaks it."""
    return f"<bdi>{escape(printable(text, most))}</bdi>"


def count(number: float) -> str:
    """A number of things, such as `12,400,000`."""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """The same for an axis, such as `12.4M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def percent(part: float, whole: float) -> str:
    """A share, such as `12.5 %`; what is there but rounds to nothing is told as such."""
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"


def round_up(number: float, steps: Sequence[float] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)) -> float:
    """The next of `steps` times a power of ten, at which an axis may end; at least 1."""
    if number <= 1:
        return 1.0
    power = 10 ** math.floor(math.log10(number))
    return next(step * power for step in (*steps, 10) if step * power >= number)


def bar_table(caption: str, heads: Sequence[str], bars: Sequence[Bar], unit: str, whole: float) -> str:
    """A table with a bar in each row, and the bars' axis below.

    Args:
        caption: plain text.
        heads: of the label and of each number.
        unit: of the axis.
        whole: of which the last column tells each bar's share; 0: no such column.
    """
    end = round_up(max((bar.numbers[0] for bar in bars), default=1))
    rows = "".join(_row(bar, end, whole) for bar in bars)
    numbers = "".join(f'<th scope="col" class="number">{escape(head)}</th>' for head in heads[1:])
    share = '<th scope="col" class="number share">share</th>' if whole else ""
    columns = len(heads) - 1 + bool(whole)
    ticks = "".join(f"<span>{short_count(end * part)}</span>" for part in (0, 0.5, 1))
    return (
        f'<table class="bars"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{escape(heads[0])}</th><td></td>{numbers}{share}</tr></thead>'
        f"<tbody>{rows}</tbody>"
        f'<tfoot><tr><td></td><td class="axis" aria-hidden="true">{ticks}</td>'
        f'<td class="unit" colspan="{columns}">{escape(unit)}</td></tr></tfoot></table>'
    )


def _row(bar: Bar, end: float, whole: float) -> str:
    length = 100 * bar.numbers[0] / end
    numbers = "".join(f'<td class="number">{count(number)}</td>' for number in bar.numbers)
    share = f'<td class="number share">{percent(bar.numbers[0], whole)}</td>' if whole else ""
    return (
        f'<tr><th scope="row">{shown_text(bar.label, 120)}</th>'
        '<td class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{length:.2f}" height="10"></rect></svg></td>{numbers}{share}</tr>'
    )


def histogram(values: np.ndarray, unit: str, used: int | None) -> str:
    """The shares of int values [n], at least one, as a drawing with axes; what lies beyond `used` is marked.

    The few largest values are put into the last bar, so that one of them does not press the others together.
    """
    most = max(1, int(np.quantile(values, 0.995)), used + 1 if used and values.max() > used else 0)
    step = max(1, round(round_up((most + 1) / _MOST_BINS, (1, 2, 5))))
    bins = most // step + 1
    counts = np.bincount(np.minimum(values // step, bins - 1), minlength=bins)
    shares = 100 * counts / len(values)
    top = round_up(float(shares.max()))
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    base = _TOP + plot_h

    def x(value: float) -> float:
        return _LEFT + plot_w * value / (bins * step)

    parts = []
    for part in (0, 0.5, 1):
        y = base - plot_h * part
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{top * part:.3g} %</text>')
    for i, share in enumerate(shares.tolist()):
        y, height = base - plot_h * share / top, plot_h * share / top
        last = i == bins - 1 and values.max() >= bins * step
        title = f"{i * step:,} {'or more' if last else f'to {(i + 1) * step - 1:,}'} {unit}: {counts[i]:,} texts"
        parts.append(
            f'<rect class="{"beyond" if used and (i + 1) * step - 1 > used else "column"}" x="{x(i * step) + 0.5:.1f}" '
            f'y="{y:.1f}" width="{max(0.5, x(step) - _LEFT - 1):.1f}" height="{height:.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )
    ticks = max(1, round(round_up(bins * step / 6, (1, 2, 5))))
    parts += [
        f'<text x="{x(value):.1f}" y="{base + 14}" text-anchor="middle">{value:,}</text>'
        for value in range(0, bins * step + 1, ticks)
    ]
    parts.append(f'<text x="{_LEFT + plot_w / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>')
    if used and used < bins * step:
        parts.append(f'<line class="mark" x1="{x(used):.1f}" x2="{x(used):.1f}" y1="{_TOP - 4}" y2="{base}"></line>')
        anchor = "end" if x(used) > _WIDTH / 2 else "start"
        parts.append(f'<text class="marked" x="{x(used):.1f}" y="{_TOP - 8}" text-anchor="{anchor}">{used} used</text>')
    label = escape(f"Histogram of text lengths in {unit}", quote=True)
    drawing = f'<svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return f"{drawing}{''.join(parts)}</svg>"
