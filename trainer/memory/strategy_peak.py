"""What a strategy holds while a pass runs: weights, gradients, optimizer state and buffers, mark by mark; no torch.

Every figure is in bytes on one worker. `strategy_peak` walks through the passes of one optimizer step in steady
state and returns the moment at which most is held, split by what holds it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from trainer.memory.holdings import PARTS, Holding, Ledger, ParameterSize, Peak
from trainer.memory.sharded_peak import Sharded
from trainer.wire.wire_cost import (
    average_scratch_bytes,
    kept_bytes,
    outer_bytes,
    scratch_bytes,
    sent_bytes,
    travelling_bytes,
)

if TYPE_CHECKING:
    from trainer.memory.trace import Segment, Trace


class _Accountant(Protocol):
    """What a strategy does at the marks."""

    def begin_pass(self, index: int) -> None: ...
    def at(self, kind: str, name: str) -> None: ...
    def end_step(self) -> None: ...
    def between_steps(self, gathers: bool) -> Mapping[str, int]: ...


def strategy_peak(trace: "Trace", holding: Holding) -> Peak:
    """The fullest moment of an optimizer step in steady state; all of its passes are like the traced one."""
    parameters, segments, unit_of = parameter_sizes(trace), trace.segments, trace.unit_of
    ledger = Ledger(dict.fromkeys(PARTS, 0))
    ledger.held["frozen"], ledger.held["averages"] = holding.frozen_bytes, holding.average_bytes
    if holding.strategy in ("single", "ddp"):
        accountant: _Accountant = _Replicated(ledger, parameters, holding, gradient_order(segments))
        ledger.held["weights"] += trace.packed_bytes
    else:
        accountant = Sharded(ledger, parameters, unit_of, holding, trace.embeddings)
    for _ in range(2):  # the first one brings everything into its steady state
        ledger.peak = Peak("", {})
        for index in range(holding.accumulation):
            ledger.phase = "VAE"
            ledger.note(holding.before_pass_bytes)
            ledger.phase = "forward"
            accountant.begin_pass(index)
            for segment in segments:
                ledger.note(segment.peak)
                ledger.activations += segment.net
                accountant.at(segment.mark, segment.name)
                if segment.mark == "end of forward":
                    ledger.phase = "backward"
            ledger.activations = 0
        ledger.phase = "optimizer"
        ledger.note(holding.optimizer_temporary_bytes)
        accountant.end_step()
        ledger.phase = "averages"
        ledger.note(holding.average_update_bytes)
        for phase, amount in holding.between_steps.items():
            ledger.phase = phase
            changes = accountant.between_steps(phase in holding.between_steps_gathered)
            for part, change in changes.items():
                ledger.held[part] += change
            ledger.note(amount + holding.average_swap_bytes)
            for part, change in changes.items():
                ledger.held[part] -= change
    return ledger.peak


def wire_bytes(trace: "Trace", holding: Holding) -> int:
    """What each worker sends in one optimizer step, by ring algorithms; scalars not counted.

    DDP: an all-reduce of all gradients, or what `holding.exchange` says. ZeRO-2: an all-gather of the weights and a
    reduce-scatter of the gradients, in the last pass or in each; ZeRO-3 gathers twice in each pass. Embeddings are
    gathered once in each pass. Where several workers hold the same share, all this goes on among those that share, and
    what is added up there is all-reduced once among those that hold the same.
    """
    return sum(wire_split(trace, holding))


def wire_split(trace: "Trace", holding: Holding) -> tuple[int, int]:
    """The bytes of `wire_bytes` that a step's forward passes wait for, and those of its backward passes."""
    world, sizes = holding.world, parameter_sizes(trace)
    if world == 1:
        return 0, 0
    if holding.strategy == "ddp":
        return 0, sent_bytes(holding.exchange, [p.shape for p in sizes if p.trains], world, holding.stored_bytes)
    shares, replicas = holding.shares, holding.replicas
    padded = {p.name: p.padded_numel(shares) * holding.gathered_width(trains=p.trains) for p in sizes}
    embedded = sum(size for name, size in padded.items() if trace.unit_of.get(name) in trace.embeddings)
    weights = sum(padded.values()) - embedded
    gradients = sum(p.padded_numel(shares) for p in sizes if p.trains) * holding.reduce_bytes
    each = holding.accumulation if holding.strategy == "zero3" else 0
    forward = weights * (each or 1) + embedded * holding.accumulation
    reductions = holding.accumulation if holding.reduce_each_pass else 1
    sent = forward + weights * each + gradients * reductions
    total = sent * (shares - 1) // shares + 2 * (gradients // shares) * (replicas - 1) // replicas
    return forward * (shares - 1) // shares, total - forward * (shares - 1) // shares


def may_fit(trace: "Trace", holding: Holding, budget: int | None) -> bool:
    """Whether there is room for weights, gradients and optimizer state alone in so many bytes; None: any number."""
    trained = sum(p.numel for p in parameter_sizes(trace) if p.trains)
    kept = 1 if holding.released_with else 2  # weights and gradients
    least = (
        trained * (kept * holding.stored_bytes + holding.optimizer_bytes) / holding.shares - holding.hosted_weight_bytes
    )
    return budget is None or least <= budget


def parameter_sizes(trace: "Trace") -> list[ParameterSize]:
    """The parameters of a traced model."""
    return [ParameterSize(name, shape, name in trace.trains) for name, shape in trace.shapes.items()]


def gradient_order(segments: Sequence["Segment"]) -> list[str]:
    """Parameters in the order in which their gradients arrive."""
    return [segment.name for segment in segments if segment.mark == "gradient"]


class _Replicated:
    """Plain training in one process, or DDP with buckets that stay."""

    def __init__(
        self,
        ledger: Ledger,
        parameters: Sequence[ParameterSize],
        holding: Holding,
        order: Sequence[str],
    ) -> None:
        self._ledger, self._holding = ledger, holding
        size = holding.stored_bytes
        self._bytes = {p.name: p.numel * size for p in parameters if p.trains}
        total = sum(self._bytes.values())
        ledger.held["weights"] = sum(p.numel * holding.held_width(trains=p.trains) for p in parameters)
        ledger.held["weights"] += holding.weight_slot_bytes - holding.hosted_weight_bytes
        ledger.held["optimizer"] = round(holding.optimizer_bytes * total / size) + holding.optimizer_everywhere_bytes
        self._wrapped = holding.is_wrapped
        if self._wrapped:
            ledger.held["gradients"] = total  # the buckets
        self._bucket_of = _buckets(order, self._bytes, holding.bucket_bytes)
        self._scratch = self._exchange({p.name: p.shape for p in parameters if p.trains})
        last = {bucket: name for name, bucket in self._bucket_of.items()}
        self._full = {name: bucket for bucket, name in last.items()}  # with which gradient a bucket is
        self._waiting: dict[int, set[str]] = {}
        self._loose: set[str] = set()  # gradients with memory of their own
        self._synchronizes = True

    def _exchange(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
        """Hold what is kept for the exchange; and how much more each bucket takes for a moment."""
        exchange, members = self._holding.exchange, dict[int, list[str]]()
        self._average_scratch = 0
        if self._holding.strategy == "ddp" and exchange.averages_weights:
            kept = kept_bytes(exchange, shapes.values()) + travelling_bytes(exchange, shapes)
            kept += outer_bytes(shapes.values()) if exchange.outer_place == "device" else 0
            self._ledger.held["communication"] = kept
            self._average_scratch = average_scratch_bytes(exchange, shapes, self._holding.world)
        if not self._wrapped or exchange.method == "plain":
            return dict.fromkeys(self._bucket_of.values(), 0)
        for name, bucket in self._bucket_of.items():
            members.setdefault(bucket, []).append(name)
        scratch = {
            bucket: scratch_bytes(exchange, [shapes[name] for name in names], self._holding.world)
            for bucket, names in members.items()
        }
        self._ledger.held["communication"] = kept_bytes(exchange, shapes.values())
        if not self._holding.pools_by_stream:
            return scratch
        self._ledger.held["communication"] += max(scratch.values(), default=0)  # of a stream of its own
        return dict.fromkeys(scratch, 0)

    def begin_pass(self, index: int) -> None:
        self._synchronizes = index == self._holding.accumulation - 1
        self._waiting = {}
        for name, bucket in self._bucket_of.items():
            self._waiting.setdefault(bucket, set()).add(name)

    def at(self, kind: str, name: str) -> None:
        if kind != "gradient":
            return
        ledger, holding, size = self._ledger, self._holding, self._bytes[name]
        viewed = self._wrapped and holding.bucket_views
        if name not in self._loose and not (viewed and holding.keeps_views):
            self._loose.add(name)
            ledger.add("gradients", size)
        if holding.released_with:
            self._release(name)
        if viewed and self._synchronizes and not holding.keeps_views:
            self._put_into_bucket(name)
        if self._wrapped and self._synchronizes and name in self._full:
            ledger.note(self._scratch[self._full[name]])

    def _put_into_bucket(self, name: str) -> None:
        """A gradient has arrived; its own memory is freed, at once or with that of its bucket's others."""
        if not self._holding.batched_copy:
            self._drop(name)
            return
        waiting = self._waiting[self._bucket_of[name]]
        waiting.discard(name)
        if not waiting:
            for member, bucket in self._bucket_of.items():
                if bucket == self._bucket_of[name]:
                    self._drop(member)

    def _release(self, name: str) -> None:
        """A gradient has arrived; if it was its block's last one, the block is updated."""
        block_of = self._holding.released_with
        block = [other for other in self._bytes if block_of[other] == block_of[name]]
        if self._loose.issuperset(block):
            self._ledger.note(self._holding.optimizer_temporary_bytes)
            for member in block:
                self._drop(member)

    def end_step(self) -> None:
        for name in tuple(self._loose):
            self._drop(name)
        if self._average_scratch:
            self._ledger.phase = "average"
            self._ledger.note(self._average_scratch)

    def between_steps(self, gathers: bool) -> Mapping[str, int]:
        return {}

    def _drop(self, name: str) -> None:
        if name in self._loose:
            self._loose.remove(name)
            self._ledger.add("gradients", -self._bytes[name])


def _buckets(order: Sequence[str], sizes: Mapping[str, int], capacity: int) -> dict[str, int]:
    """DDP's buckets after it has seen one backward pass: filled in the order of arrival until they are full."""
    bucket, filled, found = 0, 0, {}
    for name in order:
        found[name] = bucket
        filled += sizes[name]
        if filled >= capacity:
            bucket, filled = bucket + 1, 0
    return found
