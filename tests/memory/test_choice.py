"""What is chosen within a budget, on made-up figures."""

from dataclasses import replace

import pytest

from trainer.memory.choice import (
    GIB,
    NOTHING_MOVES,
    Budget,
    Choice,
    Measures,
    Moving,
    Ways,
    choose,
    parse_size,
    scattered_alike,
    spread,
)
from trainer.memory.holdings import Holding, Peak
from trainer.memory.report import MemoryPlan, RungReport, run_time
from trainer.memory.strategy_peak import strategy_peak
from trainer.memory.trace import Segment, Trace

BLOCKS, PER_BLOCK = 10, GIB
STATIC = {"ddp": 20 * GIB, "zero2": 8 * GIB, "zero3": 5 * GIB}
WIRE_S = {"ddp": 1.0, "zero2": 1.1, "zero3": 3.0}


def peak(holding: Holding, recomputed: int, offloads: bool, moved: Moving) -> Peak:
    kept = 0 if offloads else (BLOCKS - recomputed - moved.count) * PER_BLOCK
    return Peak("backward", {"weights": STATIC[holding.strategy], "activations": kept + GIB})


def extra_s(holding: Holding, recomputed: int, offloads: bool, moved: Moving) -> float:
    return WIRE_S[holding.strategy] + 0.2 * recomputed + 5 * offloads + 0.05 * moved.count


def not_asked(*way: object) -> tuple[int, Moving]:
    raise AssertionError("nothing is to be moved that was not wished")


MEASURES = Measures(peak, lambda count: count * PER_BLOCK, extra_s, not_asked)
HOLDINGS = {name: Holding(name, 4, 4, 2, 2, 8) for name in ("ddp", "zero2", "zero3")}  # pyright: ignore[reportArgumentType]


def chosen(total: float | None, ways: Ways | None = None, **costs: float) -> Choice:
    budget = Budget(None if total is None else round(total * GIB), **costs)  # pyright: ignore[reportArgumentType]
    return choose(ways or Ways(HOLDINGS, BLOCKS, 0, BLOCKS), MEASURES, budget)


@pytest.mark.parametrize(
    ("total", "label", "recomputed", "offloads"),
    [
        (None, "ddp", 0, False),
        (40, "ddp", 0, False),
        (30, "zero2", 0, False),
        (16, "zero2", 3, False),
        (10, "zero2", 9, False),
        (8, "zero3", 8, False),
        (6, "zero3", 10, False),
    ],
)
def test_the_fastest_that_fits(total: float | None, label: str, recomputed: int, offloads: bool) -> None:
    rung = chosen(total).chosen
    assert rung and (rung.label, rung.recomputed, rung.offloads) == (label, recomputed, offloads)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
def test_not_a_block_more_than_needed(share: float) -> None:
    """Also where a block saves less than its activations, because the peak moves."""
    blocks, looks = 131, list[int]()

    def peak(holding: Holding, recomputed: int, offloads: bool, moved: Moving) -> Peak:
        looks.append(recomputed)
        return Peak(
            "backward", {"weights": STATIC["zero2"], "activations": round(131 * GIB - recomputed * share * GIB)}
        )

    measures = Measures(peak, lambda count: count * GIB, extra_s, not_asked)
    ways = Ways({"zero2": HOLDINGS["zero2"]}, blocks, 0, blocks, may_offload=False)
    for needed in (1, 2, 64, 130, 131):
        looks.clear()
        total = round(STATIC["zero2"] + 131 * GIB - needed * share * GIB)
        rung = choose(ways, measures, Budget(total)).chosen
        assert rung and rung.recomputed == needed
        assert len(set(looks)) <= 11  # both ends, an estimate, and halves


def test_offloading_is_the_last_rung() -> None:
    ways = Ways({"zero2": HOLDINGS["zero2"]}, BLOCKS, 0, 0)
    rung = chosen(9.5, ways).chosen
    assert rung and rung.offloads
    assert chosen(9.5, Ways({"zero2": HOLDINGS["zero2"]}, BLOCKS, 0, 0, may_offload=False)).chosen is None
    forced = chosen(40, Ways(HOLDINGS, BLOCKS, 0, BLOCKS, must_offload=True)).chosen
    assert forced and forced.offloads


@pytest.mark.parametrize("off", [-2, 0, 3])
def test_moved_in_place_of_recomputed(off: int) -> None:
    """As the estimate says, but for the blocks by which it is off; never more than fits, nor where it does not pay."""

    def moving(holding: Holding, recomputed: int, fewest: int, spare: int) -> tuple[int, Moving]:
        assert (recomputed, fewest, spare) == (9, 0, 0)
        return 4 + off, Moving(5, late_first=True)

    ways = Ways({"zero2": HOLDINGS["zero2"]}, BLOCKS, 0, BLOCKS, moved=None)
    choice = choose(ways, replace(MEASURES, moving=moving), Budget(10 * GIB))
    rung = choice.chosen
    assert (
        rung
        and (rung.recomputed, rung.moved, rung.fits) == (4, Moving(5, late_first=True), True)
        and rung in choice.looked_at
    )
    assert rung.extra_s == pytest.approx(1.1 + 0.8 + 0.25)
    dear = replace(MEASURES, moving=moving, extra_s=lambda *way: extra_s(*way) + 2 * bool(way[3].count))
    rung = choose(ways, dear, Budget(10 * GIB)).chosen
    assert rung and (rung.recomputed, rung.moved) == (9, NOTHING_MOVES)


def test_so_many_moved_as_wished() -> None:
    """Also those that would fit without."""
    rung = chosen(12, Ways(HOLDINGS, BLOCKS, 0, BLOCKS, moved=Moving(3))).chosen
    assert rung and (rung.label, rung.recomputed, rung.moved) == ("zero2", 4, Moving(3))
    assert spread("abcdefghij", 3) == ("b", "f", "i") and spread("abc", 3) == ("a", "b", "c") and spread("abc", 0) == ()


def test_what_is_left_over_of_alike_blocks_is_spread() -> None:
    """Eight of one kind, between others that are worth half as much or twice: each end of their order is far apart."""
    worth = {"a": 2.0, **{f"b{place}": 1.0 + 0.1 * (place % 2) for place in range(8)}, "c": 0.5}
    order = scattered_alike(sorted(worth, key=lambda name: -worth[name]), worth)
    assert order[0] == "a" and order[-1] == "c" and {*order} == worth.keys()
    assert sorted(order[7:9]) == ["b3", "b7"] and sorted(order[5:9]) == ["b1", "b3", "b5", "b7"]


def test_nothing_fits() -> None:
    choice = chosen(5)
    assert choice.chosen is None and {rung.label for rung in choice.looked_at} == {"ddp", "zero2", "zero3"}


def test_what_lies_beside_the_tensors_counts() -> None:
    """10 % of 19 GiB and 1.5 GiB more."""
    assert chosen(22.4, context=GIB, buffers=GIB // 2, margin_share=0.1).chosen.recomputed == 0  # pyright: ignore[reportOptionalMemberAccess]
    assert chosen(22.3, context=GIB, buffers=GIB // 2, margin_share=0.1).chosen.recomputed == 1  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("text", "size"), [("23GiB", 23 * GIB), ("23.5 GB", 23_500_000_000), ("512MiB", 512 * 2**20)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_the_report_survives_json_and_names_its_assumption() -> None:
    choice, budget = chosen(16), Budget(16 * GIB, given="memory.budget")
    assert choice.chosen
    plan = MemoryPlan(
        kernels="cuda",
        workers=4,
        accumulation=1,
        image=(1024, 1024, 4),
        budget=budget,
        chosen=RungReport.of(choice.chosen, budget),
        looked_at=tuple(RungReport.of(rung, budget) for rung in choice.looked_at),
        num_blocks=BLOCKS,
        recompute=("a", "b", "c"),
        advice=(),
        wire_bytes=10**10,
        flops_per_image=(7 * 10**12, 14 * 10**12, 10**12),
        host_bytes=GIB,
        checkpoint_bytes=GIB,
        disk_bytes=4 * GIB,
    )
    assert MemoryPlan.from_json(plan.to_json()) == plan
    text = "\n".join(plan.describe())
    assert "chosen: zero2, 3 of 10 blocks recomputed: 16.00 of 16.00 GiB (memory.budget)" in text
    assert "22.00 TFLOP an image" in text
    assert "35 TFLOP/s" in run_time(plan, 1000, None) and "measured 2.00" in run_time(plan, 1000, 2.0)


def test_memory_of_fsdp2s_own_streams_stays_taken_on_a_card() -> None:
    """Gradients' shards of a step before are not there for the next one's activations."""
    segments = tuple(
        Segment(0, net, mark, name)  # pyright: ignore[reportArgumentType]
        for net, mark, name in (
            (0, "forward", "block"),
            (900, "end of forward", ""),
            (0, "gradient", "block.weight"),
            (-900, "backward", "block"),
            (0, "end of backward", ""),
        )
    )
    trace = Trace(segments, {"block.weight": (400,)}, frozenset({"block.weight"}), {"block.weight": "block"})
    shared, kept = (Holding("zero2", 4, 4, 2, 2, 8.0, pools_by_stream=pools) for pools in (False, True))
    masters, states, weights, gradients, activations = 400, 800, 800, 800, 900
    gather_buffer = 800 + 200  # whole, and this worker's share of it in bf16
    assert strategy_peak(trace, shared).total == masters + states + weights + gradients + activations
    shards = 200 + 400  # in bf16 as they arrive, and in fp32
    expected = masters + states + weights + gradients + activations + shards + gather_buffer
    assert strategy_peak(trace, kept).total == expected
