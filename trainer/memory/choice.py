"""Chooses how a run uses its memory: the strategy and the least recomputation that fit a budget; no torch."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainer.memory.holdings import Holding, Peak

GIB = 2**30
# Assumptions, used to rank what fits and printed with it.
CARD_FLOPS = 35e12  # an RTX 3090 in bf16 at half of its 71 TFLOP/s
WIRE_BYTES_PER_S = 6e9  # between cards through the host's memory
_ALIKE = 0.8
_ESTIMATE = 4  # blocks by which the estimate of those to recompute may be too high


@dataclass(frozen=True)
class Budget:
    """What a worker may use, in bytes.

    Attributes:
        total: of all that it takes; None where nothing limits it.
        context: what CUDA and its libraries take before the first tensor.
        buffers: of NCCL.
        margin_share: of the peak, for what the allocator cannot use and for the convolutions' scratch.
        given: where `total` comes from, in words.
    """

    total: int | None
    context: int = 0
    buffers: int = 0
    margin_share: float = 0.0
    given: str = ""

    def needed(self, peak: Peak) -> int:
        """What a peak of tensors takes of the budget."""
        return round(peak.total * (1 + self.margin_share)) + self.context + self.buffers

    def fits(self, peak: Peak) -> bool:
        """Whether a peak stays within the budget."""
        return self.total is None or self.needed(peak) <= self.total


@dataclass(frozen=True)
class Moving:
    """Which blocks' activations wait in the host's memory, copied beside the computation.

    Attributes:
        count: of blocks, of those that are not recomputed and can be moved in time; at most all of these.
        late_first: blocks that cannot be moved in time are recomputed before all others, and not in their own order.
            It pays where the budget has no room to keep them.
    """

    count: int = 0
    late_first: bool = False


NOTHING_MOVES = Moving()


@dataclass(frozen=True, eq=False)
class Rung:
    """One way to run: a strategy, and how many of the blocks are recomputed.

    Attributes:
        label: in words.
        recomputed: blocks that are recomputed, the first ones of the list of all blocks.
        offloads: all saved activations wait in the host's memory.
        moved: the blocks whose activations do, beside the computation.
        peak: the fullest moment of a step.
        extra_s: seconds per optimizer step beyond the plain passes, by `CARD_FLOPS` and `WIRE_BYTES_PER_S`.
        fits: within the budget.
    """

    label: str
    holding: Holding
    recomputed: int
    offloads: bool
    peak: Peak
    extra_s: float
    fits: bool
    moved: Moving = NOTHING_MOVES


@dataclass(frozen=True)
class Ways:
    """What may be chosen from.

    Attributes:
        holdings: by label, with the strategies and ways of accumulation that are allowed; `last`: those that are looked
            at where none of them fits; `final`: those where none of these does.
        num_blocks: that can be recomputed.
        fewest, most: recomputed blocks that are allowed; equal where nothing is left to choose.
        may_offload: the last rung is allowed.
        must_offload: and no other.
        moved: blocks whose activations are moved; None: as many as pay.
    """

    holdings: dict[str, Holding]
    num_blocks: int
    fewest: int
    most: int
    may_offload: bool = True
    must_offload: bool = False
    last: dict[str, Holding] = field(default_factory=dict)
    final: dict[str, Holding] = field(default_factory=dict)
    moved: Moving | None = NOTHING_MOVES

    def fewest_of(self, holding: Holding) -> int:
        """Recomputed blocks at least: all whose weights do not stay on the card."""
        return self.most if holding.hosted_weight_bytes else self.fewest


@dataclass(frozen=True)
class Measures:
    """What is known of a way to run, worked out when asked for.

    Attributes:
        peak: of a holding with so many recomputed blocks, with or without offloading, and so many moved ones.
        saved_bytes: of the first so many blocks.
        extra_s: see `Rung.extra_s`.
        moving: an estimate of how many blocks to recompute and which to move, in place of so many that are recomputed,
            at least so many, with so many bytes to spare; asked where `Ways.moved` is None.
    """

    peak: Callable[[Holding, int, bool, Moving], Peak]
    saved_bytes: Callable[[int], int]
    extra_s: Callable[[Holding, int, bool, Moving], float]
    moving: Callable[[Holding, int, int, int], tuple[int, Moving]]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what else was looked at: for each holding the rung without recomputation, and the last."""

    chosen: Rung | None
    looked_at: tuple[Rung, ...] = field(default=())


def choose(ways: Ways, measures: Measures, budget: Budget) -> Choice:
    """The way that costs least time among those that fit; None where nothing fits."""
    looked_at: list[Rung] = []
    found: list[Rung] = []
    offloading = [True] if ways.must_offload else [False]
    if ways.may_offload and not ways.must_offload:
        offloading.append(True)
    hopeless: set[str] = set()  # without any activations
    for holdings, offloads in itertools.product((ways.holdings, ways.last, ways.final), offloading):
        for label, holding in holdings.items():
            if label in hopeless:
                continue
            rungs = _rungs_of(label, holding, ways, measures, budget, offloads)
            looked_at += rungs
            if all(_is_hopeless(rung, budget) for rung in rungs):
                hopeless.add(label)
            found += [rung for rung in rungs if rung.fits]
        if found:
            break
    if not found:
        return Choice(None, (*looked_at, *_least_of_all(looked_at, ways, measures, budget)))
    # Only the most promising is brought down to the fewest blocks: each look is a pass over the whole model.
    promising = {rung: _least_cost(rung, ways, measures, budget) for rung in found}
    finest: set[Rung] = set()
    while True:
        best = min(promising, key=lambda rung: promising[rung])
        if best in finest:
            moving = _with_moving(best, ways, measures, budget)
            return Choice(moving or best, (*looked_at, *([moving] if moving else [])))
        finer = _least(best, ways, measures, budget)
        if finer is not best:
            looked_at.append(finer)
        del promising[best]
        promising[finer] = finer.extra_s
        finest.add(finer)


def _rungs_of(
    label: str, holding: Holding, ways: Ways, measures: Measures, budget: Budget, offloads: bool
) -> list[Rung]:
    """The rung with the fewest recomputed blocks and, if that does not fit, the one with the most."""
    fewest = ways.fewest_of(holding)
    first = _rung(label, holding, fewest, ways, measures, budget, offloads)
    if first.fits or ways.most == fewest or _is_hopeless(first, budget):
        return [first]
    last = _rung(label, holding, ways.most, ways, measures, budget, offloads)
    return [first, last]


def _least_of_all(looked_at: Sequence[Rung], ways: Ways, measures: Measures, budget: Budget) -> Iterator[Rung]:
    """What takes least, if it has not been looked at, so that it can be said how much is missing."""
    least = min(looked_at, key=lambda rung: rung.peak.total - rung.peak.split["activations"], default=None)
    if least is not None and least.recomputed < ways.most and _is_hopeless(least, budget):
        yield _rung(least.label, least.holding, ways.most, ways, measures, budget, least.offloads)


def _is_hopeless(rung: Rung, budget: Budget) -> bool:
    return budget.total is not None and rung.peak.total - rung.peak.split["activations"] > budget.total


def _least_cost(rung: Rung, ways: Ways, measures: Measures, budget: Budget) -> float:
    """Seconds of the same way with the fewest blocks that may fit."""
    fewest = _fewest(rung, ways, measures, budget)
    # Of blocks that are moved as wished, little hangs on how many are recomputed: that is not traced for it.
    moved = rung.moved if fewest == rung.recomputed else NOTHING_MOVES
    return measures.extra_s(rung.holding, fewest, rung.offloads, moved)


def _fewest(rung: Rung, ways: Ways, measures: Measures, budget: Budget) -> int:
    """Blocks to recompute, by what the first ones save."""
    fewest = ways.fewest_of(rung.holding)
    if budget.total is None or rung.recomputed == fewest or rung.offloads:
        return rung.recomputed
    first = measures.peak(rung.holding, fewest, rung.offloads, _moved(fewest, ways, rung.offloads))
    over = (budget.needed(first) - budget.total) / (1 + budget.margin_share)
    return next((n for n in range(fewest, rung.recomputed) if measures.saved_bytes(n) >= over), rung.recomputed)


def _least(rung: Rung, ways: Ways, measures: Measures, budget: Budget) -> Rung:
    """The same way with the fewest recomputed blocks that fit: first as many as may do, and then by halves."""
    fewest = _fewest(rung, ways, measures, budget)
    return _halved(rung, fewest, fewest, ways, measures, budget)


def _halved(rung: Rung, fewest: int, count: int, ways: Ways, measures: Measures, budget: Budget) -> Rung:
    least = rung
    while fewest < least.recomputed:
        tried = _rung(rung.label, rung.holding, count, ways, measures, budget, rung.offloads)
        if tried.fits:
            least = tried
        else:
            fewest = count + 1
        count = (fewest + least.recomputed) // 2
    return least


def _with_moving(rung: Rung, ways: Ways, measures: Measures, budget: Budget) -> Rung | None:
    """In place of recomputing some blocks, the activations of others are moved; None where that does not pay."""
    fewest = ways.fewest_of(rung.holding)
    if ways.moved is not None or rung.offloads or rung.recomputed == fewest or budget.total is None:
        return None
    spare = round((budget.total - budget.needed(rung.peak)) / (1 + budget.margin_share))
    count, moved = measures.moving(rung.holding, rung.recomputed, fewest, spare)
    if not moved.count:
        return None
    some = replace(ways, moved=moved)
    low = max(fewest, count - _ESTIMATE)  # each look is a pass over the whole model
    found = _halved(rung, low, count, some, measures, budget)
    return found if found.moved.count and found.extra_s < rung.extra_s else None


def _moved(recomputed: int, ways: Ways, offloads: bool) -> Moving:
    if offloads or ways.moved is None:
        return NOTHING_MOVES
    return replace(ways.moved, count=min(ways.moved.count, ways.num_blocks - recomputed))


def _rung(
    label: str, holding: Holding, count: int, ways: Ways, measures: Measures, budget: Budget, offloads: bool
) -> Rung:
    moved = _moved(count, ways, offloads)
    peak = measures.peak(holding, count, offloads, moved)
    extra_s = measures.extra_s(holding, count, offloads, moved)
    return Rung(label, holding, count, offloads, peak, extra_s, budget.fits(peak), moved)


def spread(names: Sequence[str], count: int) -> tuple[str, ...]:
    """So many of the names, evenly far apart, in their order."""
    return tuple(names[(2 * place + 1) * len(names) // (2 * count)] for place in range(count))


def scattered_alike(order: Sequence[str], worth: Mapping[str, float]) -> list[str]:
    """The same names, those of about the same worth in an order whose every end is spread over all of them.

    Args:
        order: by falling worth.
        worth: of each name, in the order in which they are met.
    """
    groups, places = list[list[str]](), {name: place for place, name in enumerate(worth)}
    for name in order:
        if not groups or worth[name] < _ALIKE * worth[groups[-1][0]]:
            groups.append([])
        groups[-1].append(name)
    return [name for group in groups for name in _scattered(sorted(group, key=places.__getitem__))]


def _scattered(names: Sequence[str]) -> list[str]:
    """Van der Corput's order."""
    num_bits = len(names).bit_length()
    return [names[i] for i in sorted(range(len(names)), key=lambda place: f"{place:0{num_bits}b}"[::-1])]


def smallest(rungs: Sequence[Rung]) -> Rung:
    """The rung that needs the least memory."""
    return min(rungs, key=lambda rung: rung.peak.total)


def parse_size(text: str) -> int:
    """Bytes of a size such as `23GiB`, `23.5 GB` or `512MiB`.

    Raises:
        ValueError: it is none.
    """
    number, unit = text.strip().rstrip("BbiIKkMmGgTt"), text.strip().lstrip("0123456789. ").lower()
    units = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    if unit not in units:
        raise ValueError(f"{text}: must be a number with a unit, such as 23GiB")
    return round(float(number) * units[unit])


def in_gib(amount: float) -> str:
    """`12.34`."""
    return f"{amount / GIB:.2f}"
