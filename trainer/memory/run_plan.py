"""The memory plan of a run: worked out from its configuration on tensors without memory, and kept for the next time."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.config.sections.optimizer_config import KINDS, OptimizerKind
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.memory.choice import (
    GIB,
    NOTHING_MOVES,
    Budget,
    Choice,
    Measures,
    Moving,
    Rung,
    Ways,
    choose,
    parse_size,
    smallest,
)
from trainer.memory.holdings import Holding, Kernels, StrategyName
from trainer.memory.planned_run import PlannedRun
from trainer.memory.report import MemoryPlan
from trainer.memory.strategy_peak import may_fit, parameter_sizes, wire_bytes
from trainer.package_files import is_installed
from trainer.parallel.shard_groups import workers_within
from trainer.wire.wire_cost import outer_bytes, saved_bytes, saved_of_average

if TYPE_CHECKING:
    from trainer.memory.step_cost import StepCosts
    from trainer.memory.trace import Trace
    from trainer.memory.traced_run import TracedRun

MIB = 2**20
# On a card, before the first tensor and beside them; see docs/benchmarks.md.
CUDA_CONTEXT = 512 * MIB
NCCL_BUFFERS = 256 * MIB
MARGIN_SHARE = 0.02
DESKTOP = 256 * MIB  # of a card's memory that `auto` leaves to others
_WORKER_RAM = {"cuda": 3 * GIB, "cpu": GIB}  # PyTorch, its libraries and the model's code
_DATA_WORKER_RAM = 300 * MIB
_SMALLER: dict[OptimizerKind, OptimizerKind] = {
    "lion": "lion_8bit",
    "lion_8bit": "lion_8bit",
    **dict.fromkeys(("adamw", "adamw_8bit", "stable_adamw", "adopt", "schedule_free_adamw", "muon"), "adamw_8bit"),
}  # kinds that a learning rate can be kept with
_HOSTED = "optimizer's state in the host's memory"
_ALL_HOSTED = "optimizer's state and weights in the host's memory"
_PINNED_SHARE = 1.5  # the host allocator rounds each tensor up to a power of two: between 1 and 2


@dataclass(frozen=True)
class Setting:
    """What a plan hangs on beside the configuration.

    Attributes:
        workers: of the whole run; `workers_here`: of this host.
        accumulation: passes of a usual optimizer step.
        buckets: of the data, with the images of one pass.
        budget: of each worker.
    """

    kernels: Kernels
    workers: int
    workers_here: int
    accumulation: int
    buckets: tuple[tuple[Bucket, int], ...]
    budget: Budget


def make_budget(wish: str, kernels: Kernels, card_bytes: int | None, workers: int, groups: int = 1) -> Budget:
    """What `memory.budget` (`wish`) says, or the card's memory but for a little; nothing limits the CPU by default.

    Where workers share the model in several groups, each talks to those of its group and to its replicas apart.
    """
    total, given = None, ""
    if wish != "auto":
        total, given = parse_size(wish), "memory.budget"
        if kernels == "cuda" and card_bytes is not None and card_bytes < total:
            total, given = card_bytes, "all that the card has, less than memory.budget"
    elif kernels == "cuda" and card_bytes is not None:
        total, given = card_bytes - DESKTOP, "the card's memory less 0.25 GiB"
    if kernels == "cpu":
        return Budget(total, given=given)
    buffers = NCCL_BUFFERS * (0 if workers == 1 else 1 if groups == 1 else 3)
    return Budget(total, CUDA_CONTEXT, buffers, MARGIN_SHARE, given)


def memory_plan(run: PlannedRun, setting: Setting, cache: Path | None = None) -> MemoryPlan:
    """The plan, from `cache` if it was made before.

    Args:
        cache: folder of plans by what they hang on; default: `sdxl-train/plans` in the user's cache.
    """
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-train" / "plans"
    file = folder / f"{_digest(run, setting)}.json"
    try:
        return MemoryPlan.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        plan = _worked_out(run, setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_name(f"{file.name}.{os.getpid()}")
        partial_file.write_text(json.dumps(plan.to_json()), encoding="utf-8")
        partial_file.replace(file)
    except OSError:
        pass  # a plan that is not kept is worked out again
    return plan


def require_fit(plan: MemoryPlan) -> None:
    """Refuse a run that cannot fit.

    Raises:
        UserError: with what it needs at least, what it may use, and the smallest changes that help.
    """
    if plan.chosen is not None:
        return
    assert plan.budget.total is not None
    least = min(rung.needed for rung in plan.looked_at)
    may = f"{plan.budget.total / GIB:.2f} GiB ({plan.budget.given})"
    need = f"each worker needs {least / GIB:.2f} GiB, and may use {may}"
    change = f"; it fits with {plan.advice[0]}" if plan.advice else ""
    raise UserError(f"memory: {need}{change}")


def _digest(run: PlannedRun, setting: Setting) -> str:
    """Of all that the plan hangs on: settings, shapes of the model, code that counts, versions."""
    parts: list[Any] = [
        run.values(),
        repr(setting),
        [version(name) for name in ("torch", "diffusers", "transformers")],
    ]
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))  # all of the package; milliseconds
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for file in sources:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _worked_out(run: PlannedRun, setting: Setting) -> MemoryPlan:
    traced, held, choice, costs = _chosen(run, setting)
    report = partial(costs.report, setting.budget)
    chosen = choice.chosen or smallest(choice.looked_at)
    holding = chosen.holding
    trace = traced.trace(holding.strategy, chosen.recomputed, chosen.offloads, chosen.moved)
    plain = traced.trace(holding.strategy)
    batch = traced.shape.batch
    again = traced.recomputed_flops(holding.strategy, chosen.recomputed, chosen.moved)
    per_image = (plain.forward_flops // batch, (plain.flops - plain.forward_flops) // batch, again // batch)
    checkpoint, snapshot = (
        _checkpoint_bytes(run, trace) + _exchange_bytes(holding, trace),
        run.snapshot_averages * run.snapshot_bytes * _stored(run, trace),
    )
    bucket = traced.shape.bucket
    return MemoryPlan(
        kernels=setting.kernels,
        workers=setting.workers,
        accumulation=setting.accumulation,
        image=(bucket.height_px, bucket.width_px, batch),
        budget=setting.budget,
        chosen=report(choice.chosen) if choice.chosen else None,
        looked_at=tuple(map(report, choice.looked_at)),
        num_blocks=held,
        recompute=traced.blocks(holding.strategy, chosen.moved)[: chosen.recomputed] if choice.chosen else (),
        link_bytes_per_s=run.link_bytes_per_s,
        moved=traced.moved_blocks(holding.strategy, chosen.recomputed, chosen.moved) if choice.chosen else (),
        advice=() if choice.chosen else tuple(_advice(run, setting)),
        wire_bytes=wire_bytes(trace, holding),
        flops_per_image=per_image,
        host_bytes=_host_bytes(run, setting, chosen, trace),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * run.checkpoints,
        snapshot_bytes=snapshot,
        num_trained=_num_elements(trace, trace.trains),
        optimizer_bytes={kind: _state_bytes(run, kind, trace) for kind in KINDS},
    )


def _chosen(
    run: PlannedRun, setting: Setting, *, only_whether: bool = False
) -> "tuple[TracedRun, int, Choice, StepCosts]":
    """The traces, the number of blocks, what was chosen of them, and what it costs.

    Args:
        only_whether: something fits; then only what takes least is looked at, for each look is a pass of the model.
    """
    from trainer.memory.hosted_holding import with_state_in_host, with_weights_in_host
    from trainer.memory.step_cost import StepCosts
    from trainer.memory.traced_run import Shape, TracedRun, frozen_bytes, holdings, parameter_state, peaks_beside
    from trainer.optim.hosted.hosted_activations import IN_FLIGHT, PATIENCE

    bucket, batch = max(setting.buckets, key=fullness)
    shape = Shape(bucket, batch)
    traced = TracedRun(run, shape, setting.kernels)
    workers, within = setting.workers, workers_within(run.shard_within, setting.workers, setting.workers_here)
    first: StrategyName = "single" if workers == 1 else "zero2"
    first = "ddp" if run.strategy == "ddp" and workers > 1 else first
    trace = traced.trace(first)
    encoding, beside = peaks_beside(run, traced, first)
    frozen = frozen_bytes(run)
    ways = {
        label: replace(
            holding,
            frozen_bytes=frozen,
            before_pass_bytes=encoding,
            between_steps=beside,
            between_steps_gathered=frozenset(beside),
        )
        for label, holding in holdings(run, trace, workers, setting.accumulation, setting.kernels, within).items()
    }
    last, state = dict[str, Holding](), dict[str, int]()
    if run.releases_gradients and run.offload_optimizer is not False:
        state = {name: parameter_state(run, trace, name).total for name in trace.trains}
        last = {f"{label}, {_HOSTED}": with_state_in_host(each, state) for label, each in ways.items()}
    final: dict[str, Holding] = {}
    if last and run.offload_weights is not False:
        sizes, hosted = parameter_sizes(trace), trace.blocks().keys()
        for label, each in ways.items():
            in_host = with_state_in_host(each, state)
            final[f"{label}, {_ALL_HOSTED}"] = with_weights_in_host(in_host, sizes, trace.unit_of, hosted)
    if run.offload_weights is True:
        ways, last, final = final, {}, {}
    elif run.offload_optimizer is True:
        ways, last = last, {}
    num_blocks, first_strategy = len(trace.blocks()), next(iter(ways.values())).strategy
    fewest = num_blocks if run.recompute == "all" else 0
    most = 0 if run.recompute == "none" else num_blocks
    offload = run.offload_activations
    if setting.budget.total is None:  # nothing is planned then, see `choose_memory`
        ways, last, final = dict([*ways.items()][:1]), {}, {}
    if only_whether:
        fewest = most
        ways, last, final = (
            {label: holding for label, holding in each.items() if may_fit(trace, holding, setting.budget.total)}
            for each in (ways, last, final)
        )
    moved = Moving(offload) if type(offload) is int else NOTHING_MOVES
    if offload == "some" and not only_whether:
        moved = None
    costs = StepCosts(traced, run.link_bytes_per_s, (IN_FLIGHT, PATIENCE))
    choice = choose(
        Ways(ways, num_blocks, fewest, most, offload in ("auto", "some"), offload is True, last, final, moved),
        Measures(traced.peak, partial(traced.saved_bytes, first_strategy), costs.extra_s, costs.moving),
        setting.budget,
    )
    return traced, num_blocks, choice, costs


def fullness(pass_: tuple[Bucket, int]) -> tuple[int, int]:
    """Pixels of a pass; among equals, the squarest."""
    (bucket, batch) = pass_
    return bucket.height_px * bucket.width_px * batch, -abs(bucket.height_px - bucket.width_px)


def _advice(run: PlannedRun, setting: Setting) -> Iterator[str]:
    """The smallest change that makes the run fit, if one is known."""
    for text, changed in _changes(run, setting):
        _, _, choice, _ = _chosen(changed, _batch_of(changed, run, setting), only_whether=True)
        if choice.chosen is not None:
            yield text
            return


def _changes(run: PlannedRun, setting: Setting) -> Iterator[tuple[str, PlannedRun]]:
    wish = run.offload_activations
    recompute, offload = run.recompute == "none", wish is not True and wish not in ("auto", "some")
    if recompute:
        yield "memory.recompute: auto", replace(run, recompute="auto")
    if offload:
        yield "memory.offload_activations: auto", replace(run, offload_activations="auto")
    if recompute and offload:
        freed = replace(run, recompute="auto", offload_activations="auto")
        yield "memory.recompute: auto and memory.offload_activations: auto", freed
    if run.exchange.keeps_errors and run.exchange.method != "powersgd" and setting.workers > 1:
        without = run.exchange.model_copy(update={"error_feedback": False})
        yield "exchange.error_feedback: false", replace(run, exchange=without)
    if run.exchange.averages_weights and run.exchange.outer_place == "device" and setting.workers > 1:
        in_host = run.exchange.model_copy(update={"outer_place": "host"})
        yield "exchange.outer_place: host", replace(run, exchange=in_host)
    if run.shard_within != "all" and run.strategy != "ddp" and setting.workers > 1 and run.may_be_spread:
        yield "memory.shard_within: all", replace(run, shard_within="all")
    if run.strategy != "auto" and setting.workers > 1 and run.may_be_spread:
        plain = replace(run, strategy="auto", exchange=ExchangeConfig())
        also = "" if run.exchange.method == "plain" else "exchange.method: plain and "
        also += "exchange.average_every: 1 and " if run.exchange.averages_weights else ""
        yield f"{also}memory.strategy: auto", plain
    batch = run.batch_size
    if batch > 1:
        smaller = batch // 2
        yield f"train.batch_size_per_gpu: {smaller}", replace(run, batch_size=smaller)
        if smaller > 1:
            yield "train.batch_size_per_gpu: 1", replace(run, batch_size=1)
    if run.averages and run.averages_place == "device":
        yield "ema.place: host", replace(run, averages_place="host")
    smaller = _SMALLER.get(run.optimizer, run.optimizer)
    kind = f"optimizer.kind: {smaller}"
    if smaller != run.optimizer:
        yield kind, replace(run, optimizer=smaller)
    if run.precision in ("bf16", "fp32") and not run.only_additions_train:
        stochastic, with_kind = replace(run, optimizer=smaller, precision="bf16_stochastic"), run.optimizer in _SMALLER
        rounded = "train.precision: bf16_stochastic"
        yield f"{rounded} and {kind}" if with_kind else rounded, stochastic
        if batch > 1:
            more = f"{rounded}, {kind}" if with_kind else rounded
            yield f"{more} and train.batch_size_per_gpu: 1", replace(stochastic, batch_size=1)
    if run.releases_gradients and run.offload_optimizer is False:
        yield "memory.offload_optimizer: auto", replace(run, offload_optimizer="auto")
    if run.releases_gradients and run.offload_weights is False and run.offload_optimizer is not False:
        yield "memory.offload_weights: auto", replace(run, offload_weights="auto")
    if setting.workers == setting.accumulation == 1 and run.precision != "fp16" and not run.releases_gradients:
        yield "memory.release_gradients: true", replace(run, releases_gradients=True)
    # Last: it is not the same model any more.
    packs = run.only_additions_train and run.strategy in ("auto", "ddp")
    if packs and run.frozen_weights != "nf4" and is_installed("bitsandbytes"):
        for held in ("int8", "nf4") if run.frozen_weights == "compute" else ("nf4",):
            yield f"model.frozen_weights: {held}", replace(run, frozen_weights=held)


def _batch_of(changed: PlannedRun, run: PlannedRun, setting: Setting) -> Setting:
    """The setting with as many images in a pass as `changed` says."""
    old, new = run.batch_size, changed.batch_size
    if old == new:
        return setting
    buckets = tuple((bucket, max(1, batch * new // old)) for bucket, batch in setting.buckets)
    return replace(setting, buckets=buckets, accumulation=-(-setting.accumulation * old // new))


def _checkpoint_bytes(run: PlannedRun, trace: Any) -> int:
    from trainer.memory.traced_run import optimizer_bytes
    from trainer.optim.precision import precision_of

    weights = precision_of(run.precision).weights.itemsize
    each = weights + 4 * run.averages
    if run.optimizer == "schedule_free_adamw":  # the average in fp32, and the weights that train
        each += 4
    return _stored(run, trace) * each + optimizer_bytes(run, trace).total


def _exchange_bytes(holding: Holding, trace: "Trace") -> int:
    """What a checkpoint holds of the exchange of gradients."""
    shapes = [p.shape for p in parameter_sizes(trace) if p.trains]
    saved = saved_bytes(holding.exchange, shapes, holding.world)
    if holding.strategy == "ddp" and holding.exchange.averages_weights:
        state = holding.optimizer_bytes
        saved += saved_of_average(shapes, holding.world, holding.stored_bytes, state)
    return saved


def _stored(run: PlannedRun, trace: "Trace") -> int:
    """Weights that a checkpoint holds: of an adapter, or of the components of which anything trains."""
    if run.only_additions_train:
        return sum(math.prod(trace.shapes[name]) for name in trace.trains)
    parts = {name.split(".", 1)[0] for name in trace.trains}
    return sum(math.prod(shape) for name, shape in trace.shapes.items() if name.split(".", 1)[0] in parts)


def _state_bytes(run: PlannedRun, kind: OptimizerKind, trace: "Trace") -> int:
    from trainer.memory.traced_run import optimizer_bytes

    return optimizer_bytes(replace(run, optimizer=kind), trace).total


def _num_elements(trace: "Trace", names: Iterable[str]) -> int:
    return sum(math.prod(trace.shapes[name]) for name in names)


def _host_bytes(run: PlannedRun, setting: Setting, chosen: Rung, trace: "Trace") -> int:
    from trainer.memory.traced_run import averages_memory

    offloaded = trace.saved_bytes if chosen.offloads else 0
    pinned = offloaded * _PINNED_SHARE if setting.kernels == "cuda" else offloaded
    averages = averages_memory(run, trace, chosen.holding.shares, setting.kernels).host
    each = round(_WORKER_RAM[setting.kernels] + run.data_workers * _DATA_WORKER_RAM + pinned) + averages
    each += sum(trace.moved_bytes.values()) + chosen.holding.hosted_bytes + chosen.holding.hosted_weight_bytes
    if run.exchange.averages_weights and run.exchange.outer_place == "host" and setting.workers > 1:
        each += outer_bytes(trace.shapes[name] for name in trace.trains)
    return setting.workers_here * (each + (chosen.peak.total if setting.kernels == "cpu" else 0))
