"""Where the time of a run goes, from what every worker tells of its steps: shares by phase, who is slow, what is waited
for, in numbers and in plain words."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

LATEST = 50  # steps, or what was told together of several
ROW_TAIL = 2
"""Numbers behind the phases in a worker's row: GiB on the card, and of the process."""
_WORTH_SAYING = {"exchange": 0.10, "data": 0.05, "save": 0.05}
"""Of a step: what is below is the usual."""
_SLOWER = 0.05
"""Of a step, that the slowest worker is busy longer than the usual one before it is named."""

Row = Sequence[float]


@dataclass(frozen=True)
class Shares:
    """A stretch of steps.

    Attributes:
        period_s: seconds from step to step, without validation and samples.
        mean: share of each phase, mean over the workers.
        slowest: the worker that the others wait for: it is busy longest, and waits least.
        of_slowest: its shares.
        busy_s: of each worker, seconds of a step in which it does not wait for the others.
        late_by: share of a step that the slowest is busy longer than the median worker.
        late_in: the phase that most of this is in.
        card_gib: taken on the fullest card; `process_gib`: resident memory of the largest worker, without its readers.
    """

    period_s: float
    mean: Mapping[str, float]
    slowest: int
    of_slowest: Mapping[str, float]
    busy_s: tuple[float, ...]
    late_by: float
    late_in: str
    card_gib: float
    process_gib: float


class RunTimes:
    """Keeps rows of the latest steps. For rank 0.

    Args:
        phases: names of the numbers in a row, in seconds; `ROW_TAIL` numbers follow.
        exchange: what the exchange of this run is called; `is_known`: whether its time was measured.
    """

    def __init__(self, phases: Sequence[str], exchange: str, *, is_known: bool = True) -> None:
        self._phases, self._exchange, self._is_known = tuple(phases), exchange, is_known
        self._latest: deque[Sequence[Row]] = deque(maxlen=LATEST)
        self._stretch: list[list[float]] = []
        self._noted = 0
        self.is_warm = False
        """Whether the first row, which does not count, has been there."""

    def note(self, rows: Sequence[Row]) -> None:
        """Every worker's row of a step. The first is left out: it allocates, compiles and reads for the first time."""
        if not self.is_warm:
            self.is_warm = True
            return
        self._latest.append(rows)
        self._noted += 1
        if not self._stretch:
            self._stretch = [list(row) for row in rows]
            return
        for total, row in zip(self._stretch, rows, strict=True):
            total[:] = [have + new for have, new in zip(total, row, strict=True)]

    def latest(self) -> Shares | None:
        """Of the latest steps; None before there are any."""
        if not self._latest:
            return None
        totals = [[sum(numbers) for numbers in zip(*rows, strict=True)] for rows in zip(*self._latest, strict=True)]
        return self._shares(totals, len(self._latest))

    def take(self) -> Shares | None:
        """Of all steps since the last call; None if there are none."""
        totals, noted = self._stretch, self._noted
        self._stretch, self._noted = [], 0
        return self._shares(totals, noted) if noted else None

    def _shares(self, totals: Sequence[Row], steps: int) -> Shares:
        each = [dict(zip(self._phases, row, strict=False)) for row in totals]
        periods = [max(sum(times.values()), 1e-9) for times in each]
        shares = [{name: s / period for name, s in times.items()} for times, period in zip(each, periods, strict=True)]
        mean = {name: sum(own[name] for own in shares) / len(shares) for name in self._phases}
        busy = [(period - times["exchange"]) / steps for times, period in zip(each, periods, strict=True)]
        slowest = busy.index(max(busy))
        usual = {name: median(times[name] for times in each) for name in self._phases if name != "exchange"}
        late_in = max(usual, key=lambda name: each[slowest][name] - usual[name])
        period_s = sum(periods) / len(periods) / steps
        return Shares(
            period_s=period_s,
            mean=mean,
            slowest=slowest,
            of_slowest=shares[slowest],
            busy_s=tuple(busy),
            late_by=(busy[slowest] - median(busy)) / period_s,
            late_in=late_in,
            card_gib=max(row[-2] for row in totals) / steps,
            process_gib=max(row[-1] for row in totals) / steps,
        )

    def waiting(self, shares: Shares) -> str:
        """What is waited for, for the progress bar, such as `61 % all-reduce, rank 2 slowest`; empty if all is well."""
        words = {"exchange": self._exchange, "data": "data", "save": "a checkpoint"}
        worth = [name for name, least in _WORTH_SAYING.items() if shares.mean[name] >= least and self._knows(name)]
        told = [f"{_percent(shares.mean[n])} {words[n]}" for n in sorted(worth, key=lambda n: -shares.mean[n])]
        if told and self._has_a_slow_one(shares):
            told.append(f"rank {shares.slowest} slowest ({_WORDS.get(shares.late_in, shares.late_in)})")
        return ", ".join(told)

    def told(self, shares: Shares) -> str:
        """All of it in one line, for the log."""
        names = sorted((n for n in self._phases if self._knows(n)), key=lambda n: -shares.mean[n])
        parts = [f"{_name(n, self._exchange)} {_percent(shares.mean[n])}" for n in names if shares.mean[n] >= 0.005]
        line = f"where the time goes: {', '.join(parts)} of {shares.period_s:.3g} s a step"
        if len(shares.busy_s) > 1 and self._knows("exchange"):
            each = ", ".join(f"{seconds:.3g}" for seconds in shares.busy_s[:16])
            line += f"; busy by itself, by rank: {each}{', ...' if len(shares.busy_s) > 16 else ''} s"
        elif len(shares.busy_s) > 1:
            line += f"; how long workers wait for the {self._exchange} is not known here"
        return line

    def record(self, shares: Shares) -> dict[str, float]:
        """As numbers: keys as docs/performance.md has them."""
        known = {name: share for name, share in shares.mean.items() if self._knows(name)}
        found = {"period_s": shares.period_s, **known, "rss_gib": shares.process_gib}
        if shares.card_gib:
            found["vram_gib"] = shares.card_gib
        if len(shares.busy_s) > 1 and self._knows("exchange"):
            found |= {"slowest": shares.slowest}
            found |= {f"slowest/{name}": share for name, share in shares.of_slowest.items()}
            found |= {f"busy_s/{rank}": seconds for rank, seconds in enumerate(shares.busy_s[:16])}
        return found

    def _has_a_slow_one(self, shares: Shares) -> bool:
        return len(shares.busy_s) > 1 and self._knows("exchange") and shares.late_by >= _SLOWER

    def _knows(self, name: str) -> bool:
        return name != "exchange" or self._is_known


_WORDS = {"copy": "noise and copies", "encode": "encoding", "other": "records"}


def _name(phase: str, exchange: str) -> str:
    return exchange if phase == "exchange" else _WORDS.get(phase, phase)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
