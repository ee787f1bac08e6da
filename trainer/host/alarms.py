"""Conditions that are told once when they begin, and not again before they have ended. Functions of readings."""

from collections import deque
from dataclasses import dataclass, field

from trainer.host.card_readings import Card

_ON_SHARE, _OFF_SHARE = 0.5, 0.05
SLOWED_FOR_S = 300.0
_LINK_FOR_S = 60.0
_REPLAYS_FOR_S = 60.0
MANY_REPLAYS = 50  # in a minute; a sound link has none in weeks
_COOLER_BY_C = 4
_POWER_LIMIT = "its power limit"
_SLOW_CLOCK = 0.7  # of the highest clock that was seen
_FEWEST = 3  # readings that stand for a window which is shorter than they are apart


@dataclass
class Alarm:
    """Begins when a condition held in half of the readings of `window_s`, and ends when it did in hardly any.

    Single readings say little: a card idles between two steps, a clock comes back for a second. Where readings are far
    apart, it takes three of them; one, if `window_s` is 0.
    """

    window_s: float
    is_on: bool = False
    _seen: deque[tuple[float, bool]] = field(default_factory=deque)

    def begins(self, now_s: float, holds: bool) -> bool:
        """Take a reading; whether the condition begins with it."""
        self._seen.append((now_s, holds))
        fewest = _FEWEST if self.window_s else 1
        while len(self._seen) > fewest and now_s - self._seen[0][0] > self.window_s:
            self._seen.popleft()
        share = sum(held for _, held in self._seen) / len(self._seen)
        is_covered = len(self._seen) >= fewest and now_s - self._seen[0][0] >= 0.8 * self.window_s
        if self.is_on:
            self.is_on = not (is_covered and share <= _OFF_SHARE)
            return False
        self.is_on = is_covered and share >= _ON_SHARE
        return self.is_on


@dataclass
class CardAlarms:
    """What one card's readings amount to."""

    label: str
    hot_c: int
    _alarms: dict[str, Alarm] = field(default_factory=dict)
    _best_link: tuple[int, int] = (0, 0)
    _best_clock_mhz: int = 0
    _replays: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, now_s: float, card: Card) -> list[str]:
        """Take a reading; returns what begins with it, in words."""
        if card.lost:
            return []
        return [*self._heat(now_s, card), *self._slowdown(now_s, card), *self._link(now_s, card),
                *self._replay(now_s, card)]  # fmt: skip

    @property
    def link_is_noisy(self) -> bool:
        """Whether the link had to repeat many packets lately."""
        return "replays" in self._alarms and self._alarms["replays"].is_on

    def _begins(self, name: str, window_s: float, now_s: float, holds: bool) -> bool:
        return self._alarms.setdefault(name, Alarm(window_s)).begins(now_s, holds)

    def _heat(self, now_s: float, card: Card) -> list[str]:
        if card.temperature_c is None:
            return []
        was_on = "heat" in self._alarms and self._alarms["heat"].is_on
        is_hot = card.temperature_c >= self.hot_c - _COOLER_BY_C * was_on
        if not self._begins("heat", 30.0, now_s, is_hot):
            return []
        slows = f", and slows down at {card.slowdown_at_c}" if card.slowdown_at_c else ""
        power = f"; it takes {card.power_w:.0f} W" if card.power_w is not None else ""
        return [f"{self.label} is at {card.temperature_c} C (launch.hot_c is {self.hot_c}{slows}){power}"]

    def _slowdown(self, now_s: float, card: Card) -> list[str]:
        self._best_clock_mhz = max(self._best_clock_mhz, card.clock_mhz or 0)
        reasons = {*card.slowed_by, *(name[5:] for name in self._alarms if name.startswith("slow "))} - {"idle"}
        clock = f", its clock is {card.clock_mhz} MHz" if card.clock_mhz else ""
        power = f" at {card.power_w:.0f} W" if card.power_w is not None else ""
        return [
            f"{self.label} has been slowed down by {reason}{power} for {SLOWED_FOR_S / 60:.0f} minutes{clock}"
            for reason in sorted(reasons)
            if self._begins(f"slow {reason}", SLOWED_FOR_S, now_s, self._is_slowed_by(reason, card))
        ]

    def _is_slowed_by(self, reason: str, card: Card) -> bool:
        """A card at work is always at its power limit: only where that costs much of its clock is it worth a word."""
        is_slow = reason != _POWER_LIMIT or (card.clock_mhz or 0) < _SLOW_CLOCK * self._best_clock_mhz
        return reason in card.slowed_by and is_slow

    def _link(self, now_s: float, card: Card) -> list[str]:
        """Against the best that was seen under load, for an idle card's link rests in a lower generation."""
        link = card.pcie_generation, card.pcie_width
        if link[0] is None or link[1] is None or "idle" in card.slowed_by:
            return []
        best = self._best_link = max(self._best_link[0], link[0]), max(self._best_link[1], link[1])
        if not self._begins("link", _LINK_FOR_S, now_s, link != best):
            return []
        return [
            f"{self.label}: its PCIe link is at generation {link[0]} x{link[1]}, and was at {best[0]} x{best[1]} "
            "before; a riser or a contact may be failing"
        ]

    def _replay(self, now_s: float, card: Card) -> list[str]:
        if card.replays is None:
            return []
        self._replays.append((now_s, card.replays))
        while len(self._replays) > 2 and now_s - self._replays[0][0] > _REPLAYS_FOR_S:
            self._replays.popleft()
        since_s, before = self._replays[0]
        minutes = max(1.0, (now_s - since_s) / 60)
        per_minute = round((card.replays - before) / minutes)
        if not self._begins("replays", 0.0, now_s, per_minute >= MANY_REPLAYS):
            return []
        return [f"{self.label}: its PCIe link had to repeat {per_minute} packets in a minute; check riser, slot, cable"]
