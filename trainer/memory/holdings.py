"""What a worker holds in a strategy, and the fullest moment of a step: values; no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.sections.exchange_config import ExchangeConfig

Kernels = Literal["cuda", "cpu"]
StrategyName = Literal["single", "ddp", "zero2", "zero3"]
PARTS = ("weights", "masters", "gradients", "optimizer", "averages", "activations", "communication", "frozen")
Split = dict[str, int]


@dataclass(frozen=True)
class ParameterSize:
    """A parameter as a strategy sees it."""

    name: str
    shape: tuple[int, ...]
    trains: bool = True

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded_numel(self, world: int) -> int:
        """Elements when the first dimension is cut into equal parts for `world` workers."""
        first = self.shape[0] if self.shape else 1
        return -(-first // world) * world * (self.numel // max(first, 1))


@dataclass(frozen=True)
class Holding:
    """How the parameters of a run are held.

    Attributes:
        strategy: `single`: one process, no wrapper; `ddp`: all of it on every worker; `zero2`: shards, gathered for
            each pass; `zero3`: gathered for each unit.
        world: workers of the run.
        replicas: of zero2 and zero3: how many of them hold the same; the others share the state.
        stored_bytes: of one weight as the optimizer sees it (its master, where `compute_bytes` is smaller).
        base_bytes: of one weight below an adapter, which does not train, as it is held and gathered; None: as those
            that train.
        compute_bytes: of one weight in the forward pass. Differs from `stored_bytes` with zero2 and zero3 only;
            autocast's copies are part of the trace.
        reduce_bytes: of one gradient on the wire.
        optimizer_bytes: state per weight that trains, such as 8 for AdamW in fp32.
        optimizer_everywhere_bytes: state that every worker has, however the rest is spread.
        accumulation: passes per optimizer step.
        reduce_each_pass: zero2 and zero3 with accumulation: reduce in every pass, or keep whole gradients.
        bucket_bytes: of one DDP bucket.
        bucket_views: `gradient_as_bucket_view`.
        batched_copy: `batched_grad_copy`: gradients wait until their bucket is full.
        pools_by_stream: memory that FSDP2 frees on streams of its own serves those streams alone, as CUDA's allocator
            has it; so it stays taken all through the step.
        optimizer_temporary_bytes: alive at once within the optimizer's step.
        average_bytes: running averages of what trains, all through the step.
        average_update_bytes: alive at once while they are updated; `average_swap_bytes`: while one is in the model.
        frozen_bytes: parts that do not train and lie on the same device, all through the step.
        before_pass_bytes: of work done before each pass, such as the VAE's over the pass's images.
        between_steps: bytes of work done between steps by name, such as the VAE's pass that draws a sample.
        between_steps_gathered: those of them for which spread weights are gathered.
        released_with: of one worker that updates the model block by block as gradients arrive: the block of each
            parameter, by name; empty where the update comes after all of them.
        hosted_bytes: of the optimizer's state in the host's memory; what is on the card at a time is then
            `optimizer_everywhere_bytes`.
        hosted_weight_bytes: of the weights, there too; `weight_slot_bytes`: of the slots that serve them on the card.
        exchange: how the gradients of `ddp` travel.
    """

    strategy: StrategyName
    world: int
    stored_bytes: int
    compute_bytes: int
    reduce_bytes: int
    optimizer_bytes: float
    accumulation: int = 1
    reduce_each_pass: bool = True
    bucket_bytes: int = 64 * 2**20
    bucket_views: bool = True
    batched_copy: bool = True
    pools_by_stream: bool = False
    optimizer_temporary_bytes: int = 0
    optimizer_everywhere_bytes: int = 0
    average_bytes: int = 0
    average_update_bytes: int = 0
    average_swap_bytes: int = 0
    frozen_bytes: int = 0
    base_bytes: int | None = None
    before_pass_bytes: int = 0
    between_steps: Mapping[str, int] = field(default_factory=dict)
    between_steps_gathered: frozenset[str] = frozenset()
    released_with: Mapping[str, str] = field(default_factory=dict)
    hosted_bytes: int = 0
    hosted_weight_bytes: int = 0
    weight_slot_bytes: int = 0
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    replicas: int = 1

    @property
    def shares(self) -> int:
        """Over how many workers weights and state are spread."""
        return self.world // self.replicas if self.strategy in ("zero2", "zero3") else 1

    def held_width(self, *, trains: bool) -> int:
        """Bytes of one weight as it is held."""
        return self.stored_bytes if trains or self.base_bytes is None else self.base_bytes

    def gathered_width(self, *, trains: bool) -> int:
        """Bytes of one weight as `zero2` and `zero3` gather it."""
        return self.compute_bytes if trains or self.base_bytes is None else self.base_bytes

    @property
    def keeps_views(self) -> bool:
        """Gradients are zeroed in place and stay views of their buckets: see `trainer.parallel.strategy.Sharing`."""
        return self.is_wrapped and self.bucket_views and self.accumulation > 1

    @property
    def is_wrapped(self) -> bool:
        """Whether gradients lie in DDP's buckets."""
        return self.strategy == "ddp" and not self.exchange.averages_weights


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step.

    Attributes:
        phase: forward, backward, optimizer, or a name from `Holding.between_steps`.
        split: bytes by part.
    """

    phase: str
    split: Split

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.split.values())


@dataclass
class Ledger:
    """What is held now, and the fullest moment so far."""

    held: Split
    activations: int = 0
    phase: str = "forward"
    peak: Peak = field(default_factory=lambda: Peak("", {}))

    def add(self, part: str, amount: int) -> None:
        self.held[part] += amount
        self.note(0)

    def note(self, above: int) -> None:
        """The activations rise `above` their level for a moment."""
        total = sum(self.held.values()) + self.activations + above
        if total > self.peak.total:
            self.peak = Peak(self.phase, self.held | {"activations": self.activations + above})
