"""The formulas of the simulator of scaling, against counting hop by hop and pair by pair, and published points."""

from dataclasses import replace
from itertools import product

import pytest

from benchmarks.scaling_model import Card, Links, Machine, Way, Work, efficiency, fewest_passes, ring, step_of, to_each
from benchmarks.scaling_points import BYTES_POINTS, bytes_of_hosts, fit_a100, fit_hosts, solve_rig
from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.wire.wire_cost import sent_bytes

NO_LATENCY = (0.0, 0.0)
LINKS = Links(4, 6e9, 1e9, NO_LATENCY)
MACHINE = Machine(Work(3e9, 2e13, 5e12), Card(71e12, 0.4), LINKS, spread=0.0)
WAYS = [Way("ddp"), Way("shares", 1.0), Way("zero2"), Way("zero3"), Way("hsdp"), Way("averaging", every=8)]


def host_of(gpu: int) -> int:
    return gpu // LINKS.host_gpus


@pytest.mark.parametrize("gpus", [2, 4, 8, 20])
def test_a_ring_is_as_slow_as_its_slowest_hop(gpus: int) -> None:
    """Round by round: in each of W-1, every GPU hands one W-th of the bytes to the next."""
    num_bytes, seconds = 7e9, 0.0
    for _ in range(gpus - 1):
        hops = [(gpu, (gpu + 1) % gpus) for gpu in range(gpus)]
        within = [LINKS.within_bytes_s if host_of(a) == host_of(b) else LINKS.between_bytes_s for a, b in hops]
        seconds += max(num_bytes / gpus / rate for rate in within)
    assert ring(LINKS, gpus, num_bytes) == pytest.approx(seconds)


@pytest.mark.parametrize("gpus", [2, 4, 8, 20])
def test_shares_load_a_hosts_link_with_every_pair(gpus: int) -> None:
    num_bytes = 7e9
    leaving = [0.0] * (1 + host_of(gpus - 1))
    sent = [0.0] * gpus
    for a, b in product(range(gpus), repeat=2):
        if a != b and host_of(a) == host_of(b):
            sent[a] += num_bytes / gpus
        elif a != b:
            leaving[host_of(a)] += num_bytes / gpus
    seconds = max(max(leaving) / LINKS.between_bytes_s, max(sent) / LINKS.within_bytes_s)
    assert to_each(LINKS, gpus, num_bytes) == pytest.approx(seconds)


def test_an_all_reduce_sends_what_the_plan_counts() -> None:
    planned = sent_bytes(ExchangeConfig(), [(1000, 3000)], 4, 2)
    assert 2 * ring(LINKS, 4, 2 * 3e6) * LINKS.within_bytes_s == pytest.approx(planned)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.kind)
def test_what_must_hold_of_any_way(way: Way) -> None:
    """Faster links and more passes never harm, more hosts never help a GPU, and one GPU waits for nobody."""
    counts = (1, 4, 8, 64, 1024)
    by_count = [efficiency(MACHINE, way, gpus, 4) for gpus in counts]
    free = replace(MACHINE, links=replace(LINKS, within_bytes_s=1e18, between_bytes_s=1e18))
    for gpus, reached in zip(counts, by_count, strict=True):
        assert reached <= efficiency(free, way, gpus, 4) <= 1.0
        assert reached <= efficiency(MACHINE, way, gpus, 4, passes=8)
        assert step_of(free, way, gpus, 4).exposed_s == pytest.approx(0, abs=1e-6)
    assert by_count[1] > by_count[2]  # from one host to two
    wanted = fewest_passes(MACHINE, way, 64, 4, 0.8)
    if wanted is not None and wanted > 1:
        assert efficiency(MACHINE, way, 64, 4, wanted) >= 0.8 > efficiency(MACHINE, way, 64, 4, wanted // 2)


def test_averaging_less_often_sends_less_between_hosts() -> None:
    within = step_of(MACHINE, Way("averaging", every=10**9), 64, 4).exchange_s
    each, eighth = (step_of(MACHINE, Way("averaging", every=every), 64, 4).exchange_s - within for every in (1, 8))
    assert eighth == pytest.approx(each / 8)


def test_published_points() -> None:
    """What the page says of them."""
    fit = fit_a100()
    assert len(fit.points) == 10 and fit.error < 0.05 and fit.worst < 0.12
    passes_s, beside_s, rate = solve_rig()
    for passes, images_s in ((4, 3.26), (64, 4.00)):
        assert 4 * passes / (passes * passes_s + beside_s) == pytest.approx(images_s)
    assert 5e9 < rate < 16e9  # what four such cards reach together is less than their PCIe links


def test_measured_points() -> None:
    """What the page says of two hosts; what leaves one is what the formulas say, with headers and small sums on top."""
    fit = fit_hosts()
    assert len(fit.points) == 12 and fit.error < 0.15
    for way, _, measured in BYTES_POINTS:
        assert bytes_of_hosts(way) < measured < 1.06 * bytes_of_hosts(way)
