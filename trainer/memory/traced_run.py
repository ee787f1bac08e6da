"""Passes of a run's model without memory, at the run's real shapes: what `trainer.memory.choice` chooses by."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.initial_values import AdapterStart
from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.data.buckets import Bucket
from trainer.memory.choice import NOTHING_MOVES, Moving, scattered_alike, spread
from trainer.memory.holdings import Holding, Kernels, Peak, StrategyName
from trainer.memory.planned_run import PlannedRun
from trainer.memory.strategy_peak import strategy_peak
from trainer.memory.trace import Block, Trace, trace_pass, trace_peak
from trainer.model.adapted import lay_out_run
from trainer.model.denoiser import TrainedModel
from trainer.model.frozen.packed_layers import packed_bytes
from trainer.model.load_weights import empty_text_encoders, empty_vae
from trainer.model.new_tokens import NewTokens
from trainer.model.recompute import (
    apply_recompute,
    embeddings,
    gathered_units,
    offloaded_activations,
    release_blocks,
    repeated_blocks,
)
from trainer.model.text import TextEncoders, text_positions
from trainer.optim.adamw import CHUNK_ELEMENTS
from trainer.optim.ema_memory import EmaMemory, memory_of_averages
from trainer.optim.hosted.hosted_activations import PATIENCE, HostedActivations
from trainer.optim.kinds.rule_table import RULES, state_bytes
from trainer.optim.precision import DTYPES, precision_of
from trainer.parallel.strategy import bucket_bytes, copies_gradients_in_batches

POSITIONS_PER_CHUNK = 77
_LATE = PATIENCE + 4
"""Blocks at the end of the forward pass, where most is held: by then, all that is moved has left."""
_SCRATCH_BYTES = 40  # of the optimizer, for each element of a chunk


@dataclass(frozen=True)
class Shape:
    """One pass: images of one bucket."""

    bucket: Bucket
    batch: int


@dataclass(frozen=True)
class _Way:
    """What a trace hangs on, apart from the run."""

    dtype: torch.dtype
    autocast: torch.dtype | None
    recomputed: int
    offloads: bool
    moved: Moving


class TracedRun:
    """The run's passes, each traced when it is first asked for."""

    def __init__(self, run: PlannedRun, shape: Shape, kernels: Kernels) -> None:
        self._run, self.shape = run, shape
        self.kernels: Kernels = kernels
        self._traces: dict[_Way, Trace] = {}
        self._orders: dict[bool | None, tuple[str, ...]] = {}

    def trace(
        self, strategy: StrategyName, recomputed: int = 0, offloads: bool = False, moved: Moving = NOTHING_MOVES
    ) -> Trace:
        """The pass with the first `recomputed` of `blocks` recomputed, and so many of the others moved."""
        way = self._way(strategy, recomputed, offloads, moved)
        if way not in self._traces:
            again = self.blocks(strategy, moved)[:recomputed] if recomputed else ()
            self._traces[way] = self._traced(way, again, self.moved_blocks(strategy, recomputed, moved))
        return self._traces[way]

    def moved_blocks(self, strategy: StrategyName, recomputed: int, moved: Moving) -> tuple[str, ...]:
        """So many of the blocks that can be moved and are not recomputed, or all, spread over the forward pass."""
        if not moved.count:
            return ()
        again = {*self.blocks(strategy, moved)[:recomputed]}
        left = [name for name in self.movable(strategy) if name not in again]
        return spread(left, min(moved.count, len(left)))

    def movable(self, strategy: StrategyName) -> tuple[str, ...]:
        """All blocks that can be moved, in the order of the forward pass."""
        blocks = (*self.trace(strategy).blocks(),)
        return blocks[:-_LATE] if len(blocks) > 2 * _LATE else blocks

    def blocks(self, strategy: StrategyName, moved: Moving = NOTHING_MOVES) -> tuple[str, ...]:
        """All blocks that can be recomputed; first those that save most bytes for their operations.

        Where others are moved, those of alike ones that are left over after the first few lie far apart in the pass.
        """
        late_first = moved.late_first if moved.count else None
        if late_first not in self._orders:
            blocks = self.trace(strategy).blocks()
            order = sorted(blocks, key=lambda name: -_worth(blocks[name]))
            if moved.count:
                order = scattered_alike(order, {name: _worth(block) for name, block in blocks.items()})
            if late_first:
                movable = {*self.movable(strategy)}
                order.sort(key=lambda name: name in movable)
            self._orders[late_first] = tuple(order)
        return self._orders[late_first]

    def peak(self, holding: Holding, recomputed: int, offloads: bool, moved: Moving = NOTHING_MOVES) -> Peak:
        """The fullest moment of a step."""
        return strategy_peak(self.trace(holding.strategy, recomputed, offloads, moved), holding)

    def saved_bytes(self, strategy: StrategyName, recomputed: int) -> int:
        """What the first so many blocks keep for the backward pass when they are not recomputed."""
        blocks = self.trace(strategy).blocks()
        return sum(blocks[name].saved_bytes for name in self.blocks(strategy)[:recomputed])

    def recomputed_flops(self, strategy: StrategyName, recomputed: int, moved: Moving = NOTHING_MOVES) -> int:
        """Operations that so many recomputed blocks add to a pass."""
        blocks = self.trace(strategy).blocks()
        return sum(blocks[name].flops for name in self.blocks(strategy, moved)[:recomputed])

    def _way(self, strategy: StrategyName, recomputed: int, offloads: bool, moved: Moving = NOTHING_MOVES) -> _Way:
        precision = precision_of(self._run.precision)
        gathers = strategy in ("zero2", "zero3") and not self._run.only_additions_train
        return _Way(
            dtype=precision.compute if gathers else precision.weights,
            autocast=None if gathers else precision.autocast,
            recomputed=recomputed,
            offloads=offloads,
            moved=moved,
        )

    def _model(self, way: _Way, again: tuple[str, ...]) -> tuple[TrainedModel, Callable[[], Tensor], list[Tensor]]:
        """The model, its pass, and the weights of frozen models that run within the pass."""
        run, frozen = self._run, None
        dtypes = way.dtype, precision_of(run.precision).compute
        model = lay_out_planned(run, *dtypes).train()
        if model.text_encoders is None and not run.cache_text:
            frozen = frozen_text_encoders(run)
        apply_recompute(model, again)
        held = [] if frozen is None else _tensors(frozen.one, frozen.two)
        return model, _loss(run, model, frozen, self.shape, way), held

    def peak_without_gradients(self, strategy: StrategyName) -> int:
        """The most that a forward pass keeps alive beside the weights."""
        model, loss, held = self._model(self._way(strategy, 0, False), ())
        with torch.no_grad():
            return trace_peak(loss, [*_tensors(model), *held], self.kernels, self._way(strategy, 0, False).autocast)

    def _traced(self, way: _Way, again: tuple[str, ...], moved: tuple[str, ...]) -> Trace:
        model, loss, held = self._model(way, again)
        units, kinds = gathered_units(model), (repeated_blocks(model), embeddings(model))
        hosted = HostedActivations(kinds[0], moved, torch.device("meta"))
        trace = trace_pass(model, loss, units, self.kernels, way.autocast, held)
        held_packed = packed_bytes(model)
        return replace(
            trace,
            recomputable=frozenset(kinds[0]),
            embeddings=frozenset(kinds[1]),
            packed_bytes=held_packed,
            moved_bytes=hosted.moved_bytes,
        )


def _worth(block: Block) -> float:
    return block.saved_bytes / max(block.flops, 1)


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def frozen_text_encoders(run: PlannedRun) -> TextEncoders:
    """The frozen text encoders, without memory."""
    encoders = empty_text_encoders(run.model, run.chunk_join)
    for module in (encoders.one, encoders.two):
        module.to(dtype=DTYPES[run.text_encoder_precision])  # pyright: ignore[reportCallIssue]
        module.requires_grad_(False).eval()
    return encoders


def lay_out_planned(run: PlannedRun, weights: torch.dtype, compute: torch.dtype) -> TrainedModel:
    """The run's model without memory; dtypes as in `lay_out_run`."""
    adapter, new_tokens = AdapterStart(run.adapter), NewTokens(run.new_tokens)
    return lay_out_run(
        run.model,
        run.trainable,
        adapter,
        weights,
        compute,
        run.chunk_join,
        new_tokens=new_tokens,
        frozen_weights=run.frozen_weights,
    )


def _loss(
    run: PlannedRun, model: TrainedModel, frozen: TextEncoders | None, shape: Shape, way: _Way
) -> Callable[[], Tensor]:
    """The step's loss of one micro-batch; `trainer.model.denoiser.image_losses` with its noise left out."""
    batch = shape.batch
    unet = dict(model.unet.config)
    pooled_width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    latents_shape = (batch, unet["in_channels"], shape.bucket.height_px // 8, shape.bucket.width_px // 8)

    def text() -> dict[str, Tensor]:
        ids = torch.empty(batch, 2, run.chunks, POSITIONS_PER_CHUNK, dtype=torch.int64, device="meta")
        if model.text_encoders is not None:
            return {"input_ids": ids}
        if frozen is not None:
            with torch.no_grad():
                found = frozen.encode(ids)
            return {"text_hidden": found.hidden, "text_pooled": found.pooled}
        positions = text_positions(run.chunks, run.chunk_join)
        return {
            "text_hidden": torch.empty(batch, positions, unet["cross_attention_dim"], device="meta"),
            "text_pooled": torch.empty(batch, pooled_width, device="meta"),
        }

    def loss() -> Tensor:
        target, noisy = (torch.empty(latents_shape, device="meta") for _ in range(2))
        noises = torch.empty(run.extra_noises, *latents_shape, device="meta")  # noqa: F841 - held until the pass ends
        timesteps = torch.empty(batch, dtype=torch.int64, device="meta")
        time_ids = torch.empty(batch, 6, device="meta")
        arguments: dict[str, Any] = text()
        if not way.offloads:
            return F.mse_loss(model(noisy.to(way.dtype), timesteps, time_ids, **arguments).float(), target)
        with offloaded_activations(model):
            return F.mse_loss(model(noisy.to(way.dtype), timesteps, time_ids, **arguments).float(), target)

    return loss


def holdings(
    run: PlannedRun, trace: Trace, workers: int, accumulation: int, kernels: Kernels, within: int | None = None
) -> dict[str, Holding]:
    """The strategies that the configuration allows, by their description.

    Args:
        within: workers over which weights are spread; None: all.
    """
    within = within or workers
    precision, wish = precision_of(run.precision), run.strategy if run.may_be_spread else "ddp"
    state = optimizer_bytes(run, trace)
    trained = sum(math.prod(trace.shapes[name]) for name in trace.trains)
    swap = _swap_bytes(run, trace, kernels)
    released_with = release_blocks(trace.trains, {*trace.unit_of.values()}) if run.releases_gradients else {}
    averages = {shards: averages_memory(run, trace, shards, kernels) for shards in {1, within}}

    def holding(strategy: StrategyName, each_pass: bool = True) -> Holding:
        gathers = strategy in ("zero2", "zero3")
        casts = gathers and not run.only_additions_train
        narrow = precision.compute.itemsize if casts else precision.weights.itemsize
        shards = within if gathers else 1
        average = averages[shards]
        in_model = average.swap if run.scores_averages else 0
        if strategy == "ddp" and run.exchange.averages_weights and narrow < 4:  # own weights wait beside common ones
            in_model = max(in_model, trained * narrow)
        return Holding(
            strategy=strategy,
            world=workers,
            stored_bytes=precision.weights.itemsize,
            base_bytes=precision.compute.itemsize if run.only_additions_train else None,
            compute_bytes=narrow,
            reduce_bytes=narrow,
            optimizer_bytes=state.spread / trained,
            optimizer_everywhere_bytes=state.everywhere,
            accumulation=accumulation,
            reduce_each_pass=each_pass,
            batched_copy=copies_gradients_in_batches(),
            pools_by_stream=kernels == "cuda",
            optimizer_temporary_bytes=optimizer_scratch(run, trace, kernels, shards),
            average_bytes=average.device,
            average_update_bytes=average.update,
            average_swap_bytes=in_model + swap // shards,
            released_with=released_with,
            exchange=run.exchange if strategy == "ddp" else ExchangeConfig(),
            bucket_bytes=bucket_bytes(trained * precision.weights.itemsize, run.exchange.wished_bucket_mib),
            replicas=workers // within if gathers else 1,
        )

    if workers == 1:
        return {"one worker": holding("single")}
    found = {"ddp": holding("ddp")}
    if accumulation > 1:
        found["zero2, gradients kept whole between passes"] = holding("zero2", each_pass=False)
        found["zero2, gradients exchanged in each pass"] = holding("zero2")
    else:
        found["zero2"] = holding("zero2")
    found["zero3"] = holding("zero3")
    return {label: each for label, each in found.items() if wish in ("auto", each.strategy)}


def averages_memory(run: PlannedRun, trace: Trace, shards: int, kernels: Kernels) -> EmaMemory:
    """What the run's averages take on a worker that holds one of so many shards of the weights."""
    if not run.averages:
        return EmaMemory(0, 0, 0, 0)
    shapes, weights = [trace.shapes[name] for name in trace.trains], precision_of(run.precision).weights
    return memory_of_averages(
        shapes, averages=run.averages, shards=shards, place=run.averages_place, weights=weights, device=kernels
    )


class StateBytes(NamedTuple):
    """Bytes of the optimizer's state: of the whole model, and of each worker beside its share of that."""

    spread: int
    everywhere: int

    @property
    def total(self) -> int:
        """What a checkpoint holds."""
        return self.spread + self.everywhere


def optimizer_bytes(run: PlannedRun, trace: Trace) -> StateBytes:
    """State of the optimizer for the whole model, on however many workers it lies."""
    each = [parameter_state(run, trace, name) for name in trace.trains]
    return StateBytes(sum(state.spread for state in each), sum(state.everywhere for state in each))


def parameter_state(run: PlannedRun, trace: Trace, name: str) -> StateBytes:
    """State of the optimizer for one weight."""
    weights, shape = precision_of(run.precision).weights, tuple(trace.shapes[name])
    spread, everywhere = state_bytes(run.optimizer, name, shape, weights)
    if run.precision == "bf16_kahan":
        spread += math.prod(shape) * weights.itemsize
    return StateBytes(spread, everywhere)


def optimizer_scratch(run: PlannedRun, trace: Trace, kernels: Kernels, shards: int) -> int:
    """What the optimizer's step holds beside weights, gradients and state, on a worker with one of so many shards."""
    wide, chunk = precision_of(run.precision).weights == torch.float32, CHUNK_ELEMENTS[kernels]
    sizes = [math.prod(trace.shapes[name]) for name in trace.trains]
    if run.optimizer not in RULES:
        return 0 if wide and run.optimizer == "adamw" else _SCRATCH_BYTES * min(chunk, max(sizes))
    rule = RULES[run.optimizer]
    if rule.in_chunks:
        return rule.scratch_bytes * min(chunk, max(sizes))
    # All rows of a tensor at once, and of as many small ones as one exchange serves.
    at_once = -(-max(sizes) // shards) + (0 if shards == 1 else min(chunk, sum(sizes) // shards))
    return (rule.scratch_bytes + (0 if wide else 4)) * at_once + rule.whole_bytes * max(sizes)


def _swap_bytes(run: PlannedRun, trace: Trace, kernels: Kernels) -> int:
    """The weights that train, kept in the host's memory while their average is in the model."""
    scored = run.validates or run.sample_px is not None
    if run.optimizer != "schedule_free_adamw" or not scored or kernels == "cuda":
        return 0
    return sum(math.prod(trace.shapes[name]) for name in trace.trains) * precision_of(run.precision).weights.itemsize


def peaks_beside(run: PlannedRun, traced: TracedRun, strategy: StrategyName) -> tuple[int, dict[str, int]]:
    """What encoding the images of a pass takes beside the VAE, and what is done between steps, by its name."""
    encoding, between = 0, dict[str, int]()
    dtype, images, shape = DTYPES[run.vae_precision], run.holds_images, traced.shape
    if run.validates:
        between["validation"] = traced.peak_without_gradients(strategy)
    if not images and run.sample_px is None:
        return encoding, between
    vae = empty_vae(run.model)
    nn.Module.to(vae, dtype=dtype)  # not diffusers' own, which warns of what it does not do here
    vae.requires_grad_(False).eval()
    held = _tensors(vae)
    with torch.no_grad():
        if images:
            size = (run.vae_batch_size, 3, shape.bucket.height_px, shape.bucket.width_px)
            encoding = trace_peak(partial(_run, vae.encode, size, dtype), held, traced.kernels)
        if run.sample_px is not None:
            height, width = run.sample_px
            size = (1, vae.config["latent_channels"], height // 8, width // 8)
            own = 0 if images else sum(tensor.nbytes for tensor in held)
            between["samples"] = trace_peak(partial(_run, vae.decode, size, dtype), held, traced.kernels) + own
    return encoding, between


def _run(function: Callable[[Any], object], size: tuple[int, ...], dtype: torch.dtype) -> object:
    return function(torch.empty(size, dtype=dtype, device="meta"))


def frozen_bytes(run: PlannedRun) -> int:
    """Weights of the frozen models that lie beside the trained one."""
    total = 0
    needs_text = not run.cache_text or run.sample_px is not None
    if needs_text and not run.text_encoders_train:
        encoders = frozen_text_encoders(run)
        total += sum(tensor.nbytes for tensor in _tensors(encoders.one, encoders.two))
    if run.holds_images:
        vae = empty_vae(run.model)
        total += sum(p.numel() for p in vae.parameters()) * DTYPES[run.vae_precision].itemsize
    return total
