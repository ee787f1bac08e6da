"""How this run's workers use their memory: chosen before the model is built, tried out before the first step.

The fullest step, on the largest bucket, runs two or three times with a learning rate of 0. What does not fit then fails
within the first minute; the command starts the workers again, and the next attempt plans with less.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from trainer.memory.choice import spread
from trainer.memory.planned_run import PlannedRun
from trainer.memory.run_plan import CUDA_CONTEXT, Setting, memory_plan, require_fit
from trainer.memory.traced_run import lay_out_planned
from trainer.model.denoiser import TrainedModel
from trainer.model.recompute import offloaded_activations, repeated_blocks
from trainer.optim.precision import precision_of
from trainer.parallel.comm import Comm, broadcast_object, gather_objects
from trainer.parallel.failure import card_is_full
from trainer.parallel.shard_groups import workers_within
from trainer.parallel.strategy import Sharing, StrategyKind
from trainer.parallel.worker import MEMORY_ATTEMPT

_log = logging.getLogger(__name__)
# A few megabytes more or less of a desktop shall not make another plan of the same run.
_CARD_STEP = 128 * 2**20
# Of the memory that was planned for the attempt before: what an attempt after a failure may use.
_LESS = 0.93


@dataclass(frozen=True)
class MemoryChoice:
    """What was chosen.

    Attributes:
        kind, exchange_every_pass: see `Sharing`.
        recompute: names of blocks; empty for none.
        offloads: all saved activations wait in the host's memory.
        moved: names of blocks whose activations do.
        hosts_state: the optimizer's state lies there; `hosts_weights`: and the weights of all blocks.
        within: see `Sharing`.
        needed: bytes that the plan counts with for this worker, all in all; None where nothing was planned.
        tensors: of these, what PyTorch's tensors take.
        limit: what PyTorch's allocator may take, by the budget; None: no limit.
        fullest: height and width in px and number of the images of the pass that takes most, by the plan.
        passes: of a step.
        flops_per_px: operations of an image's forward and backward pass by its pixels, recomputed ones not counted;
            None where nothing was planned.
    """

    kind: StrategyKind
    exchange_every_pass: bool = False
    recompute: tuple[str, ...] = ()
    offloads: bool = False
    needed: int | None = None
    tensors: int = 0
    limit: int | None = None
    fullest: tuple[int, int, int] = (0, 0, 0)
    passes: int = 1
    hosts_state: bool = False
    flops_per_px: float | None = None
    hosts_weights: bool = False
    within: int | None = None
    moved: tuple[str, ...] = ()

    def sharing(self, precision_name: str, *, only_additions: bool = False) -> Sharing:
        """With the dtypes that follow from `train.precision`.

        Args:
            only_additions: what trains is small, beside frozen weights that are held in the passes' own dtype: all is
                gathered as it is held, and autocast does what it does on one worker.
        """
        precision = precision_of(precision_name)
        casts = self.kind in ("zero2", "zero3") and precision.autocast and not only_additions
        narrow = precision.compute if casts else None
        return Sharing(self.kind, narrow, narrow, self.exchange_every_pass, self.passes, within=self.within)

    def around_forward(self, model: TrainedModel) -> Callable[[], AbstractContextManager[None]]:
        """What every forward pass of the training runs in."""
        return partial(offloaded_activations, model) if self.offloads else nullcontext


def memory_attempt() -> int:
    """How many times these workers were started again because what was planned did not fit."""
    return int(os.environ.get(MEMORY_ATTEMPT, "0"))


def choose_memory(run: PlannedRun, comm: Comm, setting: Setting) -> MemoryChoice:
    """Rank 0 decides, for all. On the CPU, where nothing limits the memory, there is nothing to plan.

    Raises:
        UserError: nothing fits, or workers do not make such groups as `memory.shard_within` says.
    """
    within = workers_within(run.shard_within, setting.workers, setting.workers_here)  # all workers refuse it
    attempt = memory_attempt()
    chosen: dict[str, Any] | None = None
    if comm.rank == 0:
        unlimited = comm.device.type == "cpu" and run.budget == "auto" and not attempt
        choice = _unplanned(run, setting) if unlimited else _planned(run, setting, attempt)
        is_grouped = choice.kind in ("zero2", "zero3") and within < setting.workers
        chosen = asdict(replace(choice, within=within if is_grouped else None))
    agreed = broadcast_object(comm, chosen)
    assert agreed is not None
    choice = MemoryChoice(**{**agreed, **{name: tuple(agreed[name]) for name in ("recompute", "fullest", "moved")}})
    if comm.rank == 0 and (line := _not_spread(run, choice)):
        _log.warning("%s", line)
    if comm.device.type == "cuda" and choice.limit is not None:
        _keep_to(choice.limit, comm.device)
    return choice


def _unplanned(run: PlannedRun, setting: Setting) -> MemoryChoice:
    kind: StrategyKind = "ddp" if run.strategy == "auto" else run.strategy
    blocks: tuple[str, ...] = ()
    hosts_weights, count = run.offload_weights is True, run.offload_activations
    # Without a budget there is nothing in whose place `some` could be moved.
    moves = type(count) is int
    if run.recompute == "all" or hosts_weights or moves:
        precision = precision_of(run.precision)
        dtypes = precision.weights, precision.compute
        blocks = tuple(repeated_blocks(lay_out_planned(run, *dtypes)))
    return MemoryChoice(
        kind if setting.workers > 1 else "single",
        recompute=() if moves else blocks,
        moved=spread(blocks, min(count, len(blocks))) if moves else (),
        offloads=run.offload_activations is True,
        passes=setting.accumulation,
        hosts_state=run.offload_optimizer is True or hosts_weights,
        hosts_weights=hosts_weights,
    )


def _not_spread(run: PlannedRun, choice: MemoryChoice) -> str | None:
    """A line if `memory.shard_within` was given and nothing is spread; the configuration alone does not tell that."""
    if run.shard_within == "all" or choice.kind in ("zero2", "zero3"):
        return None
    why = (
        "one worker" if choice.kind == "single" else f"memory.strategy = {run.strategy} comes to ddp, where each worker"
    )
    mend = "" if choice.kind == "single" else "; `zero2` or `zero3` would spread it"
    return f"memory.shard_within = {run.shard_within}: has no effect; {why} holds all of it{mend}"


def _planned(run: PlannedRun, setting: Setting, attempt: int) -> MemoryChoice:
    plan = memory_plan(run, setting)
    for _ in range(attempt):
        if plan.chosen is not None:
            less = round(plan.chosen.needed * _LESS)
            budget = replace(setting.budget, total=less, given="less than what was planned before, and did not fit")
            plan = memory_plan(run, replace(setting, budget=budget))
    require_fit(plan)
    for line in plan.describe():
        _log.info("%s", line)
    rung = plan.chosen
    assert rung is not None
    budget = setting.budget
    return MemoryChoice(
        kind=rung.strategy,
        exchange_every_pass=rung.exchanges_every_pass,
        recompute=plan.recompute,
        offloads=rung.offloads,
        needed=rung.needed,
        tensors=sum(rung.split.values()),
        limit=None if budget.total is None else budget.total - budget.context - budget.buffers,
        fullest=plan.image,
        passes=plan.accumulation,
        hosts_state=rung.hosts_state,
        flops_per_px=sum(plan.flops_per_image[:2]) / (plan.image[0] * plan.image[1]),
        hosts_weights=rung.hosts_weights,
        moved=plan.moved,
    )


def _keep_to(limit: int, device: torch.device) -> None:
    """Have PyTorch's allocator give back what it keeps, and then fail, where it would take more."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(max(limit / total, 0.0), 1.0), device)


def smallest_card(comm: Comm) -> int | None:
    """Bytes that a worker has on the fullest of all cards, CUDA's own included; None on the CPU. All must ask."""
    mine = None
    if comm.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(comm.device)
        mine = min(total, free + torch.cuda.memory_reserved(comm.device) + CUDA_CONTEXT)
        mine -= mine % _CARD_STEP
    found = [size for size in gather_objects(comm, mine) if size is not None]
    return min(found, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave this error, of the card or of the host."""
    return card_is_full(error) or "DefaultCPUAllocator" in str(error)
