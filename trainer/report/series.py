"""One number of a run over its steps, in bounded memory however long the run is."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np

POINTS = 1024
"""Of a curve: more cannot be told apart. A power of two, since stretches are joined by twos."""
_NEWEST = 2048
"""The newest values that are kept as they came: steps that are done anew replace them without a trace."""
_WHOLE = 1e15  # whole numbers below are told in all digits


class Series:
    """Values over steps: the newest as they came, older ones as stretches of equal numbers of values.

    A stretch has the mean of its values, the least and the greatest; whenever there are `POINTS` stretches, they are
    joined by twos.
    """

    def __init__(self) -> None:
        self._x, self._y = array("d"), array("d")  # the newest
        self._last, self._sum, self._low, self._high = (np.empty(0) for _ in range(4))  # stretches; x, and of y
        self._width = 1  # values of a stretch

    def __len__(self) -> int:
        """Values, all of them counted."""
        return len(self._last) * self._width + len(self._x)

    def add(self, x: float, y: float) -> None:
        """A further value, which is finite."""
        self._x.append(x)
        self._y.append(y)
        if len(self._x) >= 2 * _NEWEST:
            self._join()

    def forget_from(self, x: float) -> None:
        """Drop what is at `x` and after it. Of a stretch that reaches so far, all is dropped."""
        keep = bisect_left(self._x, x)
        del self._x[keep:], self._y[keep:]
        if not keep and len(self._last) and self._last[-1] >= x:
            keep = bisect_left(self._last, x)
            self._last, self._sum = self._last[:keep], self._sum[:keep]
            self._low, self._high = self._low[:keep], self._high[:keep]

    def newest(self, count: int) -> array[float]:
        """At most so many of the newest values."""
        return self._y[-count:]

    def thinned(self, points: int = POINTS) -> dict[str, list[float]]:
        """At most so many x and y. Of several values, y is their mean, x the last one's; `low` and `high` go along."""
        ones = np.ones(len(self._x), dtype=np.int64)
        counts = np.append(np.full(len(self._last), self._width), ones)
        x = np.append(self._last, self._x)
        total, low, high = (np.append(joined, self._y) for joined in (self._sum, self._low, self._high))
        if not len(x) or (len(x) <= points and self._width == 1):
            return {"x": _shortened(x), "y": _shortened(total)}
        values = counts.cumsum()
        group = (values - 1) * points // values[-1]  # of about as many values each
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        ends = np.append(begins[1:], len(x)) - 1
        return {
            "x": _shortened(x[ends]),
            "y": _shortened(np.add.reduceat(total, begins) / np.add.reduceat(counts, begins)),
            "low": _shortened(np.minimum.reduceat(low, begins)),
            "high": _shortened(np.maximum.reduceat(high, begins)),
        }

    def _join(self) -> None:
        """Make stretches of all but the newest values."""
        while stretches := min((len(self._x) - _NEWEST) // self._width, POINTS - len(self._last)):
            count = stretches * self._width
            x = np.array(self._x[:count]).reshape(-1, self._width)
            y = np.array(self._y[:count]).reshape(-1, self._width)
            del self._x[:count], self._y[:count]
            self._last = np.append(self._last, x[:, -1])
            self._sum = np.append(self._sum, y.sum(1))
            self._low = np.append(self._low, y.min(1))
            self._high = np.append(self._high, y.max(1))
            if len(self._last) == POINTS:
                self._double()

    def _double(self) -> None:
        """Join stretches by twos."""
        self._last = self._last[1::2]
        self._sum = self._sum[0::2] + self._sum[1::2]
        self._low = np.minimum(self._low[0::2], self._low[1::2])
        self._high = np.maximum(self._high[0::2], self._high[1::2])
        self._width *= 2


def _shortened(values: np.ndarray) -> list[float]:
    """Six digits, which are more than a screen shows; whole numbers as JSON writes them shortest."""
    return [int(y) if abs(y) < _WHOLE and y.is_integer() else float(f"{y:.6g}") for y in values.tolist()]
