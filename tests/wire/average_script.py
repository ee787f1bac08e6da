"""One of three workers whose weights move by made-up steps, and are averaged in every way.

Argument: FOLDER, where each worker writes `RANK.safetensors`: after each step of each way, own weights before and after
what is averaged then, the common weights and their momentum. Rank 0 writes what it saw sent as `seen.json`.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.parallel.comm import Comm, close, init_comm
from trainer.parallel.strategy import Sharing, Strategy, make_strategy
from trainer.parallel.worker import end_process
from trainer.wire.outer_average import with_average
from trainer.wire.wire_cost import sent_bytes

SHAPES = {"one": (40, 48), "two": (48, 40), "three": (16, 16, 3, 3), "four": (192,)}
STEPS = 10
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"average_every": 4},
    "simple mean": {"average_every": 2, "outer_lr": 1.0, "outer_momentum": 0.0},
    "host": {"average_every": 4, "outer_place": "host"},
    "bf16": {"average_every": 4, "method": "bf16"},
    "int8": {"average_every": 4, "method": "int8"},
    "int4 at random": {"average_every": 4, "method": "int4", "error_feedback": False},
    "powersgd": {"average_every": 4, "method": "powersgd", "rank": 8},
    "fragments": {"average_every": 4, "fragments": 2},
    "late": {"average_every": 4, "overlap_steps": 3},
    "streamed": {"average_every": 4, "fragments": 2, "overlap_steps": 2},
    "streamed int8": {"average_every": 4, "fragments": 2, "overlap_steps": 2, "method": "int8"},
    "mixed": {"average_every": 4, "own_share": 0.25},
}
PAPER = {"outer_lr": 0.7, "outer_momentum": 0.9}
WAYS = {name: PAPER | way for name, way in WAYS.items()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Held(nn.Module):
    """Weights, and nothing that is computed with them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        self.register_parameter("frozen", nn.Parameter(torch.zeros(50, 50, dtype=dtype), requires_grad=False))


@torch.no_grad()
def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def strategy_of(way: str, comm: Comm, dtype: torch.dtype) -> Strategy:
    strategy = make_strategy(Held(dtype).to("meta"), Sharing("ddp", steps_alone=True), (), (), comm, fill)
    return with_average(ExchangeConfig.model_validate(WAYS[way]), strategy, comm, seed=7)


@torch.no_grad()
def move(strategy: Strategy, rank: int, step: int) -> None:
    """A step of this worker: a little in a direction of all, and a little in its own."""
    ours, own = torch.Generator().manual_seed(step), torch.Generator().manual_seed(1000 * rank + step)
    for parameter in strategy.parameters.values():
        both = torch.randn(parameter.shape, generator=ours) + torch.randn(parameter.shape, generator=own)
        parameter.add_((0.05 * both).to(parameter.dtype))


def main() -> None:
    folder = Path(sys.argv[1])
    comm = init_comm(timeout_s=600)
    out: dict[str, Tensor] = {}
    for way in WAYS:
        for precision, dtype in DTYPES.items():
            strategy = strategy_of(way, comm, dtype)
            outer = strategy.outer
            assert outer
            strategy.end_step(took_effect=True)  # a rehearsal
            for step in range(STEPS):
                strategy.begin_exchange(step, 1.0, is_last=step + 1 == STEPS)
                move(strategy, comm.rank, step)
                put(out, f"{way}:{precision}:{step + 1}:before", strategy.parameters)
                strategy.end_step(took_effect=True)
                put(out, f"{way}:{precision}:{step + 1}:after", strategy.parameters)
                put(out, f"{way}:{precision}:{step + 1}:common", outer.common)
                put(out, f"{way}:{precision}:{step + 1}:momentum", outer.momentum)
                with outer.in_model():
                    put(out, f"{way}:{precision}:{step + 1}:inside", strategy.parameters)
                for name, parameter in strategy.parameters.items():
                    assert torch.equal(parameter.detach(), out[f"{way}:{precision}:{step + 1}:after:{name}"])
    seen = {way: traffic(way, comm) for way in WAYS}
    save_file(out, folder / f"{comm.rank}.safetensors")
    if comm.rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
    close(comm)
    end_process()


def put(out: dict[str, Tensor], label: str, tensors: Any) -> None:
    for name, tensor in tensors.items():
        out[f"{label}:{name}"] = tensor.detach().clone().contiguous()


def traffic(way: str, comm: Comm) -> list[float]:
    """Bytes that a worker sends in a step, in the mean over twice H steps: what went into the collectives, and by
    arithmetic; and the most in one step."""
    strategy, config = strategy_of(way, comm, torch.float32), ExchangeConfig.model_validate(WAYS[way])
    others, each = (comm.world - 1) / comm.world, []
    of = {
        "gloo:all_reduce": (0, 8 * others),
        "c10d::alltoall_base_": (1, others),
        "c10d::_allgather_base_": (0, others),
    }
    steps = 2 * config.average_every
    for step in range(2 * steps):
        strategy.begin_exchange(step, 1.0)
        move(strategy, comm.rank, step)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
            strategy.end_step(took_effect=True)
            strategy.outer.pending()  # pyright: ignore[reportOptionalMemberAccess]
        sent = 0.0
        for event in watched.events() or ():
            if event.name in of:
                argument, size = of[event.name]
                sent += math.prod(event.input_shapes[argument]) * size
        each.append(sent)
    shapes = [parameter.shape for parameter in strategy.parameters.values()]
    return [sum(each[steps:]) / steps, sent_bytes(config, shapes, comm.world, 4), max(each)]


if __name__ == "__main__":
    main()
