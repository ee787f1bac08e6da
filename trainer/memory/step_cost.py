"""Seconds that a way to run costs beside its plain passes, by the assumptions of `choice.py`; no torch."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import TYPE_CHECKING, NamedTuple

from trainer.memory.choice import CARD_FLOPS, NOTHING_MOVES, WIRE_BYTES_PER_S, Budget, Moving, Rung, spread
from trainer.memory.holdings import Holding, StrategyName
from trainer.memory.report import RungReport
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


@dataclass(frozen=True)
class _Plain:
    """A pass in which all is kept.

    Attributes:
        order: of recomputation where others are moved; `movable`: those, in the order of the forward pass.
        saved: bytes that each block keeps; `first`: that the first so many of `order` do.
        again: seconds to compute a block once more.
        seconds: of the forward and the backward pass.
    """

    order: tuple[str, ...]
    movable: tuple[str, ...]
    saved: dict[str, int]
    first: tuple[int, ...]
    again: dict[str, float]
    seconds: tuple[float, float]
    events: list[_Event]

    @staticmethod
    def of(traced: "TracedRun", strategy: StrategyName, late_first: bool) -> "_Plain":
        trace, order = traced.trace(strategy), traced.blocks(strategy, Moving(1, late_first))
        blocks = trace.blocks()
        return _Plain(
            order=order,
            movable=traced.movable(strategy),
            saved={name: block.saved_bytes for name, block in blocks.items()},
            first=tuple(accumulate((blocks[name].saved_bytes for name in order), initial=0)),
            again={name: block.flops / CARD_FLOPS for name, block in blocks.items()},
            seconds=(trace.forward_flops / CARD_FLOPS, (trace.flops - trace.forward_flops) / CARD_FLOPS),
            events=_events(trace.segments),
        )


class StepCosts:
    """What the ways of one run cost."""

    def __init__(self, traced: "TracedRun", link_bytes_per_s: float, bounds: tuple[int, int]) -> None:
        """
        Args:
            link_bytes_per_s: of a card's own link to the host's memory, each way.
            bounds: see `waiting_s`.
        """
        self._traced, self._link, self._bounds = traced, link_bytes_per_s, bounds
        self._plain: dict[tuple[StrategyName, bool], _Plain] = {}

    def extra_s(self, holding: Holding, recomputed: int, offloads: bool, moved: Moving = NOTHING_MOVES) -> float:
        """Seconds of a way that has been traced."""
        return self.cost(holding, recomputed, offloads, moved).total

    def cost(self, holding: Holding, recomputed: int, offloads: bool, moved: Moving = NOTHING_MOVES) -> Cost:
        """Of a way that has been traced."""
        traced, strategy = self._traced, holding.strategy
        if offloads:
            plain = traced.trace(strategy)
            saved = max(plain.saved_bytes - traced.saved_bytes(strategy, recomputed), 0)
            waits = 2 * saved * holding.accumulation / WIRE_BYTES_PER_S
            return Cost(self._again_s(holding, recomputed), saved, waits, self._beside_s(holding))
        sizes = traced.trace(strategy, recomputed, False, moved).moved_bytes if moved.count else {}
        return self._cost(holding, recomputed, sizes, moved)

    def report(self, budget: Budget, rung: Rung) -> RungReport:
        """What is told of a way, with its price."""
        traced, strategy = self._traced, rung.holding.strategy
        plain = max(traced.trace(strategy).flops, 1)
        again = traced.recomputed_flops(strategy, rung.recomputed, rung.moved) / plain
        cost = self.cost(rung.holding, rung.recomputed, rung.offloads, rung.moved)
        return replace(
            RungReport.of(rung, budget),
            again_share=again / (1 + again),
            moved=len(traced.moved_blocks(strategy, rung.recomputed, rung.moved)),
            moved_bytes=cost.moved_bytes,
            waits_s=cost.waits_s,
        )

    def moving(self, holding: Holding, recomputed: int, fewest: int, spare: int) -> tuple[int, Moving]:
        """How many blocks to recompute and which to move, in place of recomputing so many, by an estimate.

        It costs least at the link's rate among what costs no more than now at half of it.

        Args:
            fewest: to recompute.
            spare: bytes of the budget that are free.
        """
        now = self._cost(holding, recomputed, {}).total
        best, found = now, (recomputed, NOTHING_MOVES)
        needed = self._traced.saved_bytes(holding.strategy, recomputed) - spare
        for late_first, again in product((False, True), range(fewest, recomputed)):
            plain = self._of(holding.strategy, late_first)
            names = self._fewest_moved(plain, again, needed - plain.first[again])
            moved, sizes = Moving(len(names), late_first), {name: plain.saved[name] for name in names}
            if not names or self._cost(holding, again, sizes, moved, _CAREFUL).total > now:
                continue
            total = self._cost(holding, again, sizes, moved).total
            if total < best:
                best, found = total, (again, moved)
        return found

    def _fewest_moved(self, plain: _Plain, again: int, needed: int) -> tuple[str, ...]:
        """Blocks that take so many bytes away; empty where all do not."""
        recomputed = {*plain.order[:again]}
        kept = [name for name in plain.movable if name not in recomputed]
        fewest, most = 1, len(kept)
        while fewest <= most:
            middle = (fewest + most) // 2
            away = sum(plain.saved[name] for name in spread(kept, middle))
            fewest, most = (fewest, middle - 1) if away >= needed else (middle + 1, most)
        return spread(kept, fewest) if fewest <= len(kept) else ()

    def _of(self, strategy: StrategyName, late_first: bool) -> _Plain:
        way = strategy, late_first
        if way not in self._plain:
            self._plain[way] = _Plain.of(self._traced, strategy, late_first)
        return self._plain[way]

    def _cost(
        self,
        holding: Holding,
        recomputed: int,
        sizes: Mapping[str, int],
        moved: Moving = NOTHING_MOVES,
        share: float = 1.0,
    ) -> Cost:
        waits = self._waits_s(holding, recomputed, sizes, moved.late_first, share) if sizes else 0.0
        return Cost(self._again_s(holding, recomputed, moved), sum(sizes.values()), waits, self._beside_s(holding))

    def _again_s(self, holding: Holding, recomputed: int, moved: Moving = NOTHING_MOVES) -> float:
        again = self._traced.recomputed_flops(holding.strategy, recomputed, moved)
        return again * holding.accumulation / CARD_FLOPS

    def _beside_s(self, holding: Holding) -> float:
        hosted = 2 * holding.hosted_bytes + 3 * holding.hosted_weight_bytes  # to compute, to compute again, and back
        return (sum(wire_split(self._traced.trace(holding.strategy), holding)) + hosted) / WIRE_BYTES_PER_S

    def _waits_s(
        self, holding: Holding, recomputed: int, sizes: Mapping[str, int], late_first: bool, share: float
    ) -> float:
        """Of all passes of a step; those in which workers exchange leave copies less of the link."""
        plain, exchanging = self._of(holding.strategy, late_first), _exchanging(holding)
        again = {name: plain.again[name] for name in plain.order[:recomputed]}
        rate = share * self._link
        forward_s, backward_s = plain.seconds
        sent, received = wire_split(self._traced.trace(holding.strategy), holding)
        to_host = rate * self._left(sent / exchanging, forward_s)
        back = rate * self._left(received / exchanging, backward_s + sum(again.values()))
        waits = exchanging * waiting_s(plain.events, sizes, again, (to_host, back), self._bounds)
        if exchanging < holding.accumulation:
            alone = waiting_s(plain.events, sizes, again, (rate, rate), self._bounds)
            waits += (holding.accumulation - exchanging) * alone
        return waits

    def _left(self, wire: float, seconds: float) -> float:
        """Share of the link that so many bytes between workers leave in so many seconds."""
        return max(1 - wire / self._link / max(seconds, 1e-9), _LEAST_SHARE)


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
    bounds: tuple[int, int],
) -> float:
    """Seconds for which a pass waits for copies, as `trainer.optim.hosted.hosted_activations` orders them.

    Args:
        events: seconds of computation, then `leaves` (its forward pass is over) or `enters` (its backward pass begins)
            and a block.
        sizes: bytes of the blocks whose activations move.
        again: seconds of those that are recomputed.
        rates: bytes a second to the host, and back.
        bounds: `IN_FLIGHT` and `PATIENCE` there.
    """
    now, computed, sent, fetched = 0.0, 0.0, 0.0, 0.0
    in_flight, patience = bounds
    leaving, order, num_left = deque[tuple[str, float, int]](), list[str](), 0
    gone, there, entered = set[str](), dict[str, float](), set[str]()

    def fetch(block: str) -> float:
        nonlocal fetched
        if block in gone and block not in there:
            fetched = there[block] = max(fetched, now) + sizes[block] / rates[1]
        return there.get(block, 0.0)

    for seconds, kind, block in events:
        now, computed = now + seconds, computed + seconds
        if kind == "leaves":
            num_left += 1
            if block in sizes:
                sent = max(sent, now) + sizes[block] / rates[0]
                leaving.append((block, sent, num_left))
                order.append(block)
            while leaving and (len(leaving) > in_flight or num_left - leaving[0][2] >= patience):
                first, arrived, _ = leaving.popleft()
                gone.add(first)
                now = max(now, arrived)
        elif kind == "enters" and block not in entered:
            entered.add(block)
            now, computed = now + again.get(block, 0.0), computed + again.get(block, 0.0)
            if block in sizes:
                now = max([now, *(arrived for _, arrived, _ in leaving)])
                leaving.clear()
                now = max(now, fetch(block))
                before = order.index(block) - 1
                if before >= 0:
                    fetch(order[before])
    return now - computed
