"""How long a step takes on so many GPUs, by formulas: pure functions of the work, the cards, the links and the way.

Bytes follow from the way alone (ring collectives: Patarasuk and Yuan 2009; the exchange of shares: `trainer/wire`);
what hardware does with them is a bandwidth and a latency for each kind of link. Nothing is random.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["ddp", "shares", "zero2", "zero3", "hsdp", "averaging"]
_BUCKET_BYTES = 64e6  # as `trainer.parallel.strategy.bucket_bytes` has it for a whole UNet
_STATE_BYTES = 28  # that AdamW reads and writes of each weight: fp32 weight, gradient and two moments, and a bf16 copy


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        weights: that train.
        flops: of one image, forward and backward.
        recomputed_flops: of these, done once more in the backward pass, on top.
    """

    weights: float
    flops: float
    recomputed_flops: float = 0.0


@dataclass(frozen=True)
class Card:
    """A GPU: operations a second at most, the share of them that training reaches, bytes a second of its memory."""

    peak_flops: float
    mfu: float
    memory_bytes_s: float = 936e9


@dataclass(frozen=True)
class Links:
    """How GPUs are joined.

    Attributes:
        host_gpus: GPUs of a host.
        within_bytes_s: that a GPU sends to a neighbour of its host, while all others do so too.
        between_bytes_s: that a host sends to others, all its GPUs together.
        latency_s: of one message within a host, and between hosts.
    """

    host_gpus: int
    within_bytes_s: float
    between_bytes_s: float
    latency_s: tuple[float, float] = (10e-6, 30e-6)


@dataclass(frozen=True)
class Way:
    """How the work is shared.

    Attributes:
        kind: `ddp`: all-reduce by a ring; `shares`: each worker adds up a share of all (`exchange.method`); `zero2`,
            `zero3`; `hsdp`: as `zero2` within each host, and an all-reduce of the shares between hosts; `averaging`:
            all-reduce within each host, and the weights averaged between hosts every `every` steps.
        gradient_bytes: of a weight's gradient on the wire.
        weight_bytes: of a weight that is gathered, or averaged.
        every: steps between averages.
    """

    kind: Kind
    gradient_bytes: float = 2.0
    weight_bytes: float = 2.0
    every: int = 1


@dataclass(frozen=True)
class Machine:
    """All that is not the way.

    Attributes:
        overlap: share of the backward (and forward) pass behind which an exchange can hide.
        spread: standard deviation of one GPU's time for a step, over its mean: all wait for the slowest.
        fixed_s: of a step, whatever is done in it.
    """

    work: Work
    card: Card
    links: Links
    overlap: float = 0.9
    spread: float = 0.01
    fixed_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and what they are made of."""

    compute_s: float
    exchange_s: float
    exposed_s: float
    optimizer_s: float
    waiting_s: float
    images: int

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.exposed_s + self.optimizer_s + self.waiting_s

    @property
    def images_s(self) -> float:
        """Images a second of all GPUs."""
        return self.images / self.total_s


def step_of(machine: Machine, way: Way, gpus: int, batch: int, passes: int = 1) -> Step:
    """One optimizer step.

    Args:
        batch: images of a GPU in a pass.
        passes: of accumulation.
    """
    forward, backward = pass_seconds(machine, batch)
    hidden_forward, hidden_backward = machine.overlap * forward, machine.overlap * backward
    exposed = exchange = 0.0
    for bytes_s, behind_backward, times in exchanges(machine, way, gpus, passes):
        exchange += bytes_s * times
        exposed += times * max(0.0, bytes_s - (hidden_backward if behind_backward else hidden_forward))
    if way.kind == "averaging":
        between = _between_hosts(machine.links, gpus, way.weight_bytes * machine.work.weights)
        exchange, exposed = exchange + between / way.every, exposed + between / way.every
    compute = passes * (forward + backward) + machine.fixed_s
    waiting = compute * machine.spread * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0
    optimizer = machine.work.weights * _STATE_BYTES / machine.card.memory_bytes_s / _shards(way, machine.links, gpus)
    return Step(compute, exchange, exposed, optimizer, waiting, gpus * batch * passes)


def pass_seconds(machine: Machine, batch: int) -> tuple[float, float]:
    """Forward and backward pass of one GPU: a third and two thirds of the operations, and what is recomputed."""
    each = batch / (machine.card.peak_flops * machine.card.mfu)
    return machine.work.flops / 3 * each, (machine.work.flops * 2 / 3 + machine.work.recomputed_flops) * each


def exchanges(machine: Machine, way: Way, gpus: int, passes: int) -> list[tuple[float, bool, int]]:
    """Of a step: (seconds, whether it hides behind a backward pass, how many times)."""
    links, weights = machine.links, machine.work.weights
    gradients, gathered = way.gradient_bytes * weights, way.weight_bytes * weights
    here = min(gpus, links.host_gpus)
    if gpus == 1:
        return []
    if way.kind == "ddp":
        return [(2 * ring(links, gpus, gradients), True, 1)]
    if way.kind == "shares":
        return [(shares(links, gpus, gradients), True, 1)]
    if way.kind == "averaging":
        return [(2 * ring(links, here, gradients), True, 1)] if here > 1 else []
    if way.kind == "zero2":
        return [(ring(links, gpus, gathered), False, 1), (ring(links, gpus, gradients), True, 1)]
    if way.kind == "zero3":  # weights for both passes, gradients in the last alone
        again = ring(links, gpus, gathered)
        return [(again, False, passes), (again, True, passes - 1), (again + ring(links, gpus, gradients), True, 1)]
    reduced = ring(links, here, gradients) + _between_hosts(links, gpus, gradients)
    return [(ring(links, here, gathered), False, 1), (reduced, True, 1)]


def ring(links: Links, gpus: int, num_bytes: float) -> float:
    """Seconds of a reduce-scatter or an all-gather through all GPUs; an all-reduce is two of them.

    Each link carries (W-1)/W of the bytes; where the ring goes through several hosts, each host's link as well. The
    messages of a bucket go round W-1 hops, or up and down a tree if that is shorter, as NCCL chooses.
    """
    if gpus == 1:
        return 0.0
    spans = gpus > links.host_gpus
    rate = min(links.within_bytes_s, links.between_bytes_s) if spans else links.within_bytes_s
    hops = min(gpus - 1, 2 * math.ceil(math.log2(gpus)))
    return (gpus - 1) / gpus * num_bytes / rate + _buckets(num_bytes) * hops * links.latency_s[spans]


def shares(links: Links, gpus: int, num_bytes: float) -> float:
    """Seconds in which each GPU gets a share of all, and its sum, by a ring, goes to all: an all-reduce."""
    return to_each(links, gpus, num_bytes) + ring(links, gpus, num_bytes)


def to_each(links: Links, gpus: int, num_bytes: float) -> float:
    """Seconds in which each GPU sends a share to each other one: what leaves a host is all its GPUs'."""
    here = min(gpus, links.host_gpus)
    within = (here - 1) / gpus * num_bytes / links.within_bytes_s
    between = here * (gpus - here) / gpus * num_bytes / links.between_bytes_s
    spans = gpus > links.host_gpus
    return max(within, between) + _buckets(num_bytes) * (gpus - 1) * links.latency_s[spans]


def _between_hosts(links: Links, gpus: int, num_bytes: float) -> float:
    """Seconds of an all-reduce over hosts, each GPU of a host with its share of the bytes, all at once."""
    hosts = -(-gpus // links.host_gpus)
    if hosts == 1:
        return 0.0
    hops = 2 * min(hosts - 1, 2 * math.ceil(math.log2(hosts)))
    return 2 * (hosts - 1) / hosts * num_bytes / links.between_bytes_s + (
        _buckets(num_bytes / links.host_gpus) * hops * links.latency_s[1]
    )


def _buckets(num_bytes: float) -> int:
    return max(1, math.ceil(num_bytes / _BUCKET_BYTES))


def _shards(way: Way, links: Links, gpus: int) -> int:
    """Among how many GPUs the optimizer's work is spread."""
    if way.kind in ("zero2", "zero3"):
        return gpus
    return min(gpus, links.host_gpus) if way.kind == "hsdp" else 1


def efficiency(machine: Machine, way: Way, gpus: int, batch: int, passes: int = 1) -> float:
    """Images a second of each GPU over those of one alone that waits for nobody (which may not fit its memory)."""
    alone = replace(machine, spread=0.0)
    forward, backward = pass_seconds(alone, batch)
    return step_of(machine, way, gpus, batch, passes).images_s / gpus / (batch / (forward + backward))


def fewest_passes(machine: Machine, way: Way, gpus: int, batch: int, wanted: float, most: int = 4096) -> int | None:
    """Passes of accumulation with which a way reaches an efficiency; None: not with `most`."""
    passes = 1
    while passes <= most:
        if efficiency(machine, way, gpus, batch, passes) >= wanted:
            return passes
        passes *= 2
    return None
