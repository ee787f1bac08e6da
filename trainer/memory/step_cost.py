"""Seconds that a way to run costs beside its plain passes, by the assumptions of `choice.py`; no torch."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trainer.memory.choice import CARD_FLOPS, LINK_BYTES_PER_S, WIRE_BYTES_PER_S
from trainer.memory.holdings import Holding, StrategyName
from trainer.memory.strategy_peak import wire_split

if TYPE_CHECKING:
    from trainer.memory.trace import Segment
    from trainer.memory.traced_run import TracedRun

_LEAST_SHARE = 0.25  # of the link, that copies get whatever else is on it
_CAREFUL = 0.5  # of the assumed rate, at which moving shall not cost more than recomputing either


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step.

    Attributes:
        again_s: of recomputation.
        moved_bytes: of activations in one pass, in each direction.
        waits_s: for those that nothing hides.
        beside_s: of the wire, and of optimizer state and weights from the host's memory, as if nothing hid them.
    """

    again_s: float
    moved_bytes: int
    waits_s: float
    beside_s: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.again_s + self.waits_s + self.beside_s


class _Event(NamedTuple):
    """So many seconds of computation, and what happens then to a block: it `leaves` forward, or `enters` backward."""

    seconds: float
    kind: str
    block: str


class StepCosts:
    """What the ways of one run cost."""

    def __init__(self, traced: "TracedRun", in_flight: int) -> None:
        self._traced, self._in_flight = traced, in_flight
        self._events: dict[StrategyName, list[_Event]] = {}

    def extra_s(self, holding: Holding, recomputed: int, offloads: bool, moved: int = 0) -> float:
        """Seconds of a way that has been traced."""
        return self.cost(holding, recomputed, offloads, moved).total

    def cost(self, holding: Holding, recomputed: int, offloads: bool, moved: int = 0) -> Cost:
        """Of a way that has been traced."""
        traced, strategy = self._traced, holding.strategy
        if offloads:
            plain = traced.trace(strategy)
            saved = max(plain.saved_bytes - traced.saved_bytes(strategy, recomputed), 0)
            waits = 2 * saved * holding.accumulation / WIRE_BYTES_PER_S
            return Cost(self._again_s(holding, recomputed), saved, waits, self._beside_s(holding))
        sizes = traced.trace(strategy, recomputed, False, moved).moved_bytes if moved else {}
        return self._cost(holding, recomputed, sizes)

    def moving(self, holding: Holding, recomputed: int, fewest: int, spare: int) -> tuple[int, int]:
        """How many blocks to recompute and how many to move, in place of recomputing so many, by an estimate.

        It costs least at the assumed rate of copies among what costs no more than now at half of it.

        Args:
            fewest: to recompute.
            spare: bytes of the budget that are free.
        """
        traced, strategy = self._traced, holding.strategy
        blocks, order = traced.trace(strategy).blocks(), traced.blocks(strategy)
        now = self._cost(holding, recomputed, {}).total
        best = now, recomputed, 0
        needed = traced.saved_bytes(strategy, recomputed) - spare
        for moved in range(self._in_flight + 1, len(order) - fewest + 1):
            for again in range(fewest, min(recomputed, len(order) - moved + 1)):
                names = traced.moved_blocks(strategy, again, moved)
                away = sum(blocks[name].saved_bytes for name in names[: -self._in_flight])
                if traced.saved_bytes(strategy, again) + away >= needed:
                    break
            else:
                continue
            sizes = {name: blocks[name].saved_bytes for name in names}
            if self._cost(holding, again, sizes, _CAREFUL).total <= now:
                best = min(best, (self._cost(holding, again, sizes).total, again, moved))
        return best[1:]

    def _cost(self, holding: Holding, recomputed: int, sizes: Mapping[str, int], share: float = 1.0) -> Cost:
        waits = self._waits_s(holding, recomputed, sizes, share) if sizes else 0.0
        return Cost(self._again_s(holding, recomputed), sum(sizes.values()), waits, self._beside_s(holding))

    def _again_s(self, holding: Holding, recomputed: int) -> float:
        return self._traced.recomputed_flops(holding.strategy, recomputed) * holding.accumulation / CARD_FLOPS

    def _beside_s(self, holding: Holding) -> float:
        hosted = 2 * holding.hosted_bytes + 3 * holding.hosted_weight_bytes  # to compute, to compute again, and back
        return (sum(wire_split(self._traced.trace(holding.strategy), holding)) + hosted) / WIRE_BYTES_PER_S

    def _waits_s(self, holding: Holding, recomputed: int, sizes: Mapping[str, int], share: float) -> float:
        """Of all passes of a step; those in which workers exchange leave copies less of the link."""
        traced, strategy = self._traced, holding.strategy
        plain = traced.trace(strategy)
        blocks = plain.blocks()
        again = {name: blocks[name].flops / CARD_FLOPS for name in traced.blocks(strategy)[:recomputed]}
        if strategy not in self._events:
            self._events[strategy] = _events(plain.segments)
        rates, busy = [share * LINK_BYTES_PER_S] * 2, list[float]()
        forward_s, backward_s = plain.forward_flops / CARD_FLOPS, (plain.flops - plain.forward_flops) / CARD_FLOPS
        for rate, seconds, wire in zip(
            rates, (forward_s, backward_s + sum(again.values())), wire_split(plain, holding), strict=True
        ):
            taken = wire / _exchanging(holding) / LINK_BYTES_PER_S / max(seconds, 1e-9)
            busy.append(rate * max(1 - taken, _LEAST_SHARE))
        exchanging = _exchanging(holding)
        events = self._events[strategy]
        waits = exchanging * waiting_s(events, sizes, again, (busy[0], busy[1]), self._in_flight)
        if exchanging < holding.accumulation:
            alone = waiting_s(events, sizes, again, (rates[0], rates[1]), self._in_flight)
            waits += (holding.accumulation - exchanging) * alone
        return waits


def _exchanging(holding: Holding) -> int:
    """Passes of a step in which workers exchange weights or gradients."""
    every = holding.strategy == "zero3" or (holding.strategy == "zero2" and holding.reduce_each_pass)
    return holding.accumulation if every else 1


def _events(segments: Sequence["Segment"]) -> list[_Event]:
    kinds, seconds, found = {"after forward": "leaves", "before backward": "enters"}, 0.0, list[_Event]()
    for segment in segments:
        seconds += segment.flops / CARD_FLOPS
        if segment.mark in kinds:
            found.append(_Event(seconds, kinds[segment.mark], segment.name))
            seconds = 0.0
    return [*found, _Event(seconds, "", "")]


def waiting_s(
    events: Sequence[tuple[float, str, str]],
    sizes: Mapping[str, int],
    again: Mapping[str, float],
    rates: tuple[float, float],
    in_flight: int,
) -> float:
    """Seconds for which a pass waits for copies, as `trainer.optim.hosted.hosted_activations` orders them.

    Args:
        events: seconds of computation, then `leaves` (its forward pass is over) or `enters` (its backward pass begins)
            and a block.
        sizes: bytes of the blocks whose activations move.
        again: seconds of those that are recomputed.
        rates: bytes a second to the host, and back.
        in_flight: see `IN_FLIGHT` there.
    """
    now, computed, sent, fetched = 0.0, 0.0, 0.0, 0.0
    leaving, order = deque[tuple[str, float]](), list[str]()
    gone, there, entered = set[str](), dict[str, float](), set[str]()

    def fetch(block: str) -> float:
        nonlocal fetched
        if block in gone and block not in there:
            fetched = there[block] = max(fetched, now) + sizes[block] / rates[1]
        return there.get(block, 0.0)

    for seconds, kind, block in events:
        now, computed = now + seconds, computed + seconds
        if kind == "leaves" and block in sizes:
            sent = max(sent, now) + sizes[block] / rates[0]
            leaving.append((block, sent))
            order.append(block)
            while len(leaving) > in_flight:
                first, arrived = leaving.popleft()
                gone.add(first)
                now = max(now, arrived)
        elif kind == "enters" and block not in entered:
            entered.add(block)
            now, computed = now + again.get(block, 0.0), computed + again.get(block, 0.0)
            if block in sizes:
                now = (
                    max(now, *(arrived for _, arrived in leaving), fetch(block)) if leaving else max(now, fetch(block))
                )
                leaving.clear()
                before = order.index(block) - 1
                if before >= 0:
                    fetch(order[before])
    return now - computed
