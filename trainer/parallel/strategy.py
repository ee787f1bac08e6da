"""How the workers share one model: whole on each (DDP), or spread over them (FSDP2)."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trainer.parallel.comm import Comm
from trainer.parallel.exchange_times import Timeline, mark_when_computed, time_waits
from trainer.parallel.sharding import (
    gathered,
    local_tensor,
    materialize,
    prepare_pass,
    shard_model,
)

_BUCKET_BYTES = 64 * 2**20  # fewer, larger reductions than DDP's 25 MiB: 1,680 tensors, most of them small
_SMALLEST_BUCKET_BYTES = 2**20
_BUCKETS = 16  # at least: the last one's exchange is behind the backward pass, and hidden by nothing

StrategyKind = Literal["single", "ddp", "zero2", "zero3"]


@dataclass(frozen=True)
class Sharing:
    """What decides how a model is shared.

    Attributes:
        kind: `single` for one worker; `ddp`; `zero2` and `zero3` as in ZeRO (Rajbhandari et al. 2020), by FSDP2.
        compute_dtype: of the gathered weights of `zero2` and `zero3`; None: that of the weights.
        reduce_dtype: in which their gradients travel; None: that of the weights.
        exchange_every_pass: `zero2` and `zero3` with accumulation: average gradients in every backward pass, which
            costs time on the wire, and not in the last only, which costs a whole copy of the gradients in memory.
        passes: of a step.
        steps_alone: `ddp`: workers exchange no gradients, and average their weights now and then (`Outer`).
        within: `zero2` and `zero3`: so many workers share a whole model, and as many groups of them as there are hold
            the same; None: all.
        bucket_mib: of gradients of `ddp` that travel together; None: see `bucket_bytes`.
    """

    kind: StrategyKind
    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    exchange_every_pass: bool = False
    passes: int = 1
    steps_alone: bool = False
    within: int | None = None
    bucket_mib: float | None = None

    def shares(self, world: int) -> int:
        """Over how many of so many workers the weights are spread; 1: each has all of them."""
        return (self.within or world) if self.is_sharded else 1

    def replicas(self, world: int) -> int:
        """How many of so many workers hold the same weights, each of them all or the same share."""
        return world // self.shares(world)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over the workers."""
        return self.kind in ("zero2", "zero3")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are zeroed in place and stay views of DDP's buckets.

        With accumulation, freed ones would come back in passes without exchange as tensors of their own: a second
        copy beside the buckets. Without, they arrive one bucket at a time, and are better freed.
        """
        return self.is_wrapped and self.passes > 1

    @property
    def is_wrapped(self) -> bool:
        """Whether DDP averages gradients."""
        return self.kind == "ddp" and not self.steps_alone


class Exchange(Protocol):
    """How DDP's gradients travel, where it is not by its own all-reduce (`trainer.wire`).

    Attributes:
        errors: of this worker's gradients by name, what is to be added to the next ones.
        bases: what all workers have in common beside it, by name.
    """

    errors: dict[str, Tensor]
    bases: dict[str, Tensor]

    @property
    def keeps_errors(self) -> bool:
        """Whether anything is kept, and changes in the backward pass."""
        ...

    def begin(self, step: int, loss_scale: float) -> None:
        """Before the passes of a step, after so many of the run."""
        ...

    def end(self, *, took_effect: bool) -> None:
        """After a step, which was skipped or not."""
        ...


class Outer(Protocol):
    """What workers that take steps each by itself have in common (`trainer.wire.outer_average`).

    Attributes:
        common: the weights of the latest average by name, fp32, the same on all workers.
        momentum: of these, likewise.
        is_common: this worker's own weights are the common ones, and so are all others'.
        is_renewed: with the step that has just ended, all common weights are others than at the last such step.
    """

    common: dict[str, Tensor]
    momentum: dict[str, Tensor]
    is_common: bool
    is_renewed: bool

    def begin(self, step: int, *, is_last: bool) -> None:
        """Before a step, after so many of the run; `is_last`: the run ends with it."""
        ...

    def end(self) -> None:
        """After a step."""
        ...

    def pending(self) -> dict[str, Tensor]:
        """Mean differences that have been exchanged and have not taken effect, by name; waits for them."""
        ...

    def take_up(self, pending: Mapping[str, Tensor], *, is_common: bool) -> None:
        """Go on with such differences, and with own weights that are the common ones or not."""
        ...

    def in_model(self) -> AbstractContextManager[None]:
        """Around what is done with the common weights; own ones come back afterwards, to the bit."""
        ...


@dataclass(frozen=True)
class Strategy:
    """The model as the step sees it.

    Attributes:
        model: called in the forward pass; exchanges gradients in the backward pass.
        parameters: what trains, by name in the plain model; of a spread model, this worker's shares.
        world: gradients are averaged over this many workers, so `backward` multiplies the loss by it:
            the step's loss is a sum over workers.
        embeddings: of a spread model, what is not gathered for the backward pass.
        resting: what trains at another time of the run and not now, by name.
        exchange: of DDP's gradients, or of what `outer` averages; None: its own.
        timeline: where the end of a backward pass marks how long it waits for the others; None: nowhere.
        outer: the average of workers that take steps each by itself; None: they share each step.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter] = field(repr=False)
    world: int
    sharing: Sharing
    embeddings: tuple[nn.Module, ...] = field(default=(), repr=False)
    resting: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    exchange: Exchange | None = field(default=None, repr=False)
    timeline: Timeline | None = field(default=None, repr=False)
    outer: Outer | None = field(default=None, repr=False)

    @property
    def ever_trained(self) -> dict[str, nn.Parameter]:
        """What trains at any time of the run, by name."""
        return self.parameters | self.resting if self.resting else self.parameters

    @contextmanager
    def reduction(self, *, last: bool) -> Iterator[None]:
        """Around one micro-batch: workers exchange gradients in the last one only, unless memory forbids it.

        `zero2` gathers weights once per step: after the last one, when they are about to change, they are let go.
        """
        if self.sharing.is_sharded:
            exchanges = last or self.sharing.exchange_every_pass
            prepare_pass(
                self.model,
                exchanges_gradients=exchanges,
                keeps_gathered=self.sharing.kind == "zero2" and not last,
                between_replicas=last or self.sharing.within is None,
            )
            yield
        elif last or self.world == 1 or not self.sharing.is_wrapped:
            yield
        else:
            with self.model.no_sync():  # pyright: ignore[reportCallIssue]
                yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this worker's part of the step's loss."""
        scaled = loss * self.world
        if self.timeline is None or self.world == 1:
            scaled.backward()
            return
        mark_when_computed(scaled, self.timeline)
        scaled.backward()
        if self.timeline.current is not None:
            self.timeline.mark("backward")

    def begin_exchange(self, step: int, loss_scale: float, *, is_last: bool = False) -> None:
        """Before the passes of a step, after so many of the run; until then, nothing that is kept changes."""
        if self.exchange:
            self.exchange.begin(step, 1.0 if self.outer else loss_scale)
        if self.outer:
            self.outer.begin(step, is_last=is_last)

    @property
    def keeps_errors(self) -> bool:
        """Whether what a checkpoint holds changes in the backward pass already, and not in the update alone."""
        return self.exchange is not None and self.outer is None and self.exchange.keeps_errors

    def end_step(self, *, took_effect: bool) -> None:
        """After a step, which was skipped or not."""
        if self.exchange and not self.outer:
            self.exchange.end(took_effect=took_effect)
        self.clear_gradients()
        if self.outer:  # of workers that skip a step, the steps before are averaged
            self.outer.end()

    def clear_gradients(self) -> None:
        """Before the next step: zero them in place, or give their memory back."""
        # Not by the model's `zero_grad`, which looks through all its modules: 2 % of a small model's step.
        if self.sharing.keeps_gradients:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_zero_(gradients)  # pyright: ignore[reportPrivateImportUsage]
            return
        for parameter in self.parameters.values():
            parameter.grad = None

    def grad_norm(
        self, gradients: Sequence[Tensor], blocks: Tensor | None = None, num_blocks: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Global L2 norm of the gradients, a scalar on their device and the same on all workers; and norms by block.

        Args:
            blocks, num_blocks: the number of each gradient's block, [gradients] int64 below `num_blocks`; None: none.

        Returns:
            The norm, float32, and those of the blocks, [num_blocks] float64.
        """
        # Put together in fp32: the norms of bf16 tensors have three digits, their sum should not round again. Norms
        # with fp32 results would take a tenth of a step on the CPU.
        norms = torch._foreach_norm([local_tensor(gradient) for gradient in gradients])  # pyright: ignore[reportPrivateImportUsage]
        each = torch.stack(norms).float()
        norm, of_blocks = torch.linalg.vector_norm(each), each.new_zeros(0, dtype=torch.float64)
        if blocks is not None:
            of_blocks = each.new_zeros(num_blocks, dtype=torch.float64)
            of_blocks.index_add_(0, blocks, each.double().square())
        if self.sharing.is_sharded:
            squares = torch.cat([norm.double().square().view(1), of_blocks])
            # Of all workers, although a group has all shares: so they are the same to the bit on all replicas, and with
            # them the scale of the update. What has been counted several times is divided out again.
            torch.distributed.all_reduce(squares)
            if self.sharing.within is not None:
                squares /= self.sharing.replicas(self.world)
            norm, of_blocks = squares[0].sqrt().float(), squares[1:]
        return norm, of_blocks.sqrt()

    def gathered(self) -> AbstractContextManager[None]:
        """Around forward passes that workers run each by itself; all must enter."""
        if not self.sharing.is_sharded:
            return nullcontext()
        return gathered(self.model, self.embeddings, keep_gathered=self.sharing.kind == "zero2")


def make_strategy(
    model: nn.Module,
    sharing: Sharing,
    units: Iterable[nn.Module],
    embeddings: Iterable[nn.Module],
    comm: Comm,
    fill: Callable[[nn.Module], None],
    resting: Collection[str] = (),
    elsewhere: Collection[nn.Parameter] = (),
) -> Strategy:
    """Give a model that lies on the meta device its memory, fill it, and wrap it for `comm.world` workers.

    Args:
        units: what a spread model gathers one by one.
        embeddings: those of them whose backward pass needs no weights.
        fill: puts the weights in place, of a spread model into this worker's shares (`copy_share`).
        resting: names of parameters that train at another time of the run.
        elsewhere: parameters of a model of one worker that have memory already.
    """
    embeddings = tuple(embeddings)
    if sharing.is_sharded:
        shard_model(
            model,
            units,
            embeddings,
            comm,
            compute_dtype=sharing.compute_dtype,
            reduce_dtype=sharing.reduce_dtype,
            keep_gathered=sharing.kind == "zero2",
            within=sharing.within,
        )
    materialize(model, comm.device, elsewhere)
    fill(model)
    named = dict(model.named_parameters())
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    wrapped = model
    if sharing.is_wrapped:
        of_gradients = sum(parameter.nbytes for parameter in parameters.values())
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[comm.device.index] if comm.device.type == "cuda" else None,
            bucket_cap_mb=bucket_bytes(of_gradients, sharing.bucket_mib) / 2**20,
            gradient_as_bucket_view=True,
            **_newer_ddp_arguments(),
        )
    at_rest = {name: parameter for name, parameter in named.items() if name in resting}
    return Strategy(wrapped, parameters, comm.world, sharing, embeddings, at_rest)


def bucket_bytes(of_gradients: int, wished_mib: float | None = None) -> int:
    """How many bytes of gradients DDP lets travel together, of so many in all.

    Small models and adapters would have one bucket otherwise, which begins to travel when the backward pass is over.
    """
    if wished_mib is not None:
        return round(wished_mib * 2**20)
    return max(min(_BUCKET_BYTES, of_gradients // _BUCKETS), _SMALLEST_BUCKET_BYTES)


def timed(strategy: Strategy, timeline: Timeline, device: torch.device) -> tuple[Strategy, bool]:
    """The strategy with marks on a timeline of what it waits for other workers, and whether these are all waits.

    They are not where a spread model's waits have other names in this PyTorch, and where the exchange of DDP's
    gradients blocks within the backward pass, as `trainer.wire` does on the CPU.
    """
    if strategy.sharing.is_sharded:
        is_known = time_waits(strategy.model, timeline, device)
    else:
        is_known = strategy.exchange is None or device.type == "cuda"
    return replace(strategy, timeline=timeline), is_known


def copies_gradients_in_batches() -> bool:
    """Whether this PyTorch's DDP puts the gradients of a bucket into it all at once, with two kernels: from 2.12 on."""
    return "batched_grad_copy" in signature(nn.parallel.DistributedDataParallel).parameters


def _newer_ddp_arguments() -> dict[str, Any]:
    """What DDP is given by names that PyTorch 2.11 does not have."""
    known = signature(nn.parallel.DistributedDataParallel).parameters
    # Buffers are the same on all workers, for ever.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {buffers: False} | ({"batched_grad_copy": True} if copies_gradients_in_batches() else {})


def warm_up(strategy: Strategy, throw_away_loss: Callable[[nn.Module], Tensor]) -> None:
    """One forward and backward pass whose gradients are thrown away, before the first real step.

    DDP orders its buckets by registration in its first backward pass and by arrival afterwards. With
    three or more workers the ring then sums in another order, so a resumed run's first step would
    differ in the last bit from the same step of an uninterrupted run. After this both are alike.
    FSDP2 learns here which module is the outermost one, before a part of the model is called alone.
    Gradients that stay views of DDP's buckets need a second pass: the first one's buckets are given up.
    """
    if strategy.world > 1:
        throw_away_loss(strategy.model).backward()
        strategy.model.zero_grad(set_to_none=True)
    if strategy.sharing.keeps_gradients:
        throw_away_loss(strategy.model).backward()
        strategy.clear_gradients()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode without gradients; its mode is put back afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield module
    finally:
        module.train(training)
