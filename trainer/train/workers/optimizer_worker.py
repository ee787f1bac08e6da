"""Measures one kind of optimizer in a run: its step alone on random gradients, whole steps, and its state's bytes."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

from trainer.config.schema import Config
from trainer.measure.optimizer_bench import OptimizerRow
from trainer.memory.run_plan import memory_plan
from trainer.model.recompute import gathered_units, release_blocks
from trainer.model_files.run_model import RunModel
from trainer.optim.kinds.stored_names import COLUMNS
from trainer.optim.optimizers import take_optimizer_step
from trainer.parallel.comm import Comm, barrier, gather_objects, sum_floats
from trainer.parallel.local_shard import local_part
from trainer.parallel.sharding import local_tensor
from trainer.train.step import StepParts
from trainer.train.workers.bench_worker import build_way, out_of_memory_told, synthetic_data, timed_row, wait_for

_GRADIENT_SIZE = 1e-3  # standard deviation


def bench_optimizer(
    config: Config, model: RunModel, comm: Comm, steps: int, warmup: int, prepared: bool, result: Path
) -> None:
    """Measure, and let rank 0 write the row to `result`.

    Args:
        steps, warmup: optimizer steps that count, and before them.
        prepared: the data are there: their largest bucket is taken.
    """
    data = synthetic_data(config, model, prepared)
    way = build_way(config, model, comm, data)
    row = timed_row(config, way.parts, data, steps, warmup, finds_exposed=False)
    alone_s = seconds_alone(way.parts, steps)
    plan = memory_plan(way.planned, way.setting)
    in_step_s = (row.split or {})["optimizer"] if way.parts.release is None else alone_s
    found = OptimizerRow(
        kind=config.optimizer.kind,
        strategy=row.strategy,
        num_weights=sum(parameter.numel() for parameter in way.parts.strategy.parameters.values()),
        alone_s=alone_s,
        step_s=row.step_s,
        in_step_s=in_step_s,
        images_per_s=row.images_per_s,
        state_bytes=state_bytes_of(way.parts),
        planned_bytes=plan.optimizer_bytes[config.optimizer.kind],
        recomputed=f"{len(way.choice.recompute)} of {plan.num_blocks}",
    )
    if comm.rank == 0:
        result.write_text(json.dumps(asdict(found)), encoding="utf-8")


def seconds_alone(parts: StepParts, steps: int) -> float:
    """The median of so many steps of the optimizer, of the slowest worker; all workers must ask. The weights move.

    Norm and clipping are no part of it. Gradients are random numbers, the same in each place on all workers. Where
    updates are made block by block, only one block's gradients are there at once, as in training.

    Raises:
        OutOfMemory: a step did not fit.
    """
    comm, strategy, groups = parts.comm, parts.strategy, list(_updated_together(parts))
    draw = torch.Generator(comm.device)
    seconds = []
    with out_of_memory_told():
        # The first makes what state there is not yet.
        for _ in tqdm(range(1 + steps), desc="  alone", disable=None if comm.rank == 0 else True, leave=False):
            draw.manual_seed(0)
            own_s = 0.0
            for group in groups:
                _put_random_gradients(group, draw)
                barrier(comm)
                wait_for(comm.device)
                begin = time.perf_counter()
                take_optimizer_step(parts.optimizer, 1.0)
                wait_for(comm.device)
                own_s += time.perf_counter() - begin
                if len(groups) > 1:
                    for parameter in group:
                        parameter.grad = None
            seconds.append(own_s)
            strategy.clear_gradients()
    return max(gather_objects(comm, median(seconds[1:])))


def _updated_together(parts: StepParts) -> Iterator[list[nn.Parameter]]:
    """All that trains; or a block at a time, where gradients are released."""
    named = parts.strategy.parameters
    if parts.release is None:
        yield list(named.values())
        return
    block_of, blocks = release_blocks(named, gathered_units(parts.strategy.model)), dict[str, list[nn.Parameter]]()
    for name, parameter in named.items():
        blocks.setdefault(block_of[name], []).append(parameter)
    yield from blocks.values()


def _put_random_gradients(parameters: Sequence[nn.Parameter], draw: torch.Generator) -> None:
    """Where gradients are; what is there, a view of DDP's buckets perhaps, is filled."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        local_tensor(parameter.grad).normal_(0, _GRADIENT_SIZE, generator=draw)


def state_bytes_of(parts: StepParts) -> int:
    """Bytes of the tensors of the optimizer's state, of all workers together; all workers must ask.

    What every worker has alike is counted once, as it is in a checkpoint.
    """
    comm, spread, alike = parts.comm, 0, 0
    for state in parts.optimizer.state.values():
        for key, value in state.items():
            num_bytes = local_part(value)[0].nbytes
            if value.ndim == 0 or key.endswith(COLUMNS) or not parts.strategy.sharing.is_sharded:
                alike += num_bytes
            else:
                spread += num_bytes
    return round(sum_floats(comm, [float(spread)])[0]) + alike
