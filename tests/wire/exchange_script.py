"""One of three workers that average made-up gradients in every way, inside a real DDP.

Argument: FOLDER, where each worker writes what it got as `RANK.safetensors`, and rank 0 what it saw as `seen.json`.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.parallel.comm import Comm, close, init_comm
from trainer.parallel.strategy import Sharing, Strategy, make_strategy
from trainer.parallel.worker import end_process
from trainer.wire.gradient_exchange import with_exchange
from trainer.wire.wire_cost import sent_bytes

SHAPES = {"wide": (40, 48), "conv": (16, 8, 3, 3), "bias": (70,), "small": (8, 8), "frozen": (50, 50)}
STEPS = 200  # over which means are taken
WAYS = {
    "plain": {"method": "plain"},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "int8 at random": {"method": "int8", "error_feedback": False},
    "int4 at random": {"method": "int4", "error_feedback": False},
    "powersgd": {"method": "powersgd", "rank": 2},
}


class Made(nn.Module):
    """A model whose gradients are what the loss says."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(s, dtype=dtype)) for name, s in SHAPES.items()})
        self.weights["frozen"].requires_grad_(False)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((self.weights[name] * gradient).sum() for name, gradient in gradients.items())  # pyright: ignore


def gradients_of(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A worker's; every tensor in a size of its own."""
    generator = torch.Generator().manual_seed(rank)
    sizes = {"wide": 1.0, "conv": 1e-3, "bias": 1e-6, "small": 10.0}
    return {name: (torch.randn(SHAPES[name], generator=generator) * size).to(dtype) for name, size in sizes.items()}


def strategy_of(way: str, comm: Comm, dtype: torch.dtype, **more: int) -> Strategy:
    strategy = make_strategy(Made(dtype).to("meta"), Sharing("ddp"), (), (), comm, _zero)
    return with_exchange(ExchangeConfig.model_validate(WAYS[way] | more), strategy, comm, seed=7)


@torch.no_grad()
def _zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def averaged(
    strategy: Strategy, gradients: dict[str, Tensor], step: int, scale: float = 1.0, takes_effect: bool = True
) -> dict[str, Tensor]:
    """What all workers get in a step: the mean of their gradients."""
    strategy.begin_exchange(step, scale)
    with strategy.reduction(last=True):
        (strategy.model(gradients) * scale).backward()
    found = {n.removeprefix("weights."): p.grad.clone() for n, p in strategy.parameters.items() if p.grad is not None}
    strategy.end_step(took_effect=takes_effect)
    return found


def kept(strategy: Strategy) -> dict[str, Tensor]:
    assert strategy.exchange
    return {n.removeprefix("weights."): error.float() for n, error in strategy.exchange.errors.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    comm = init_comm(timeout_s=600)
    out: dict[str, Tensor] = {}
    seen: dict[str, object] = {}
    for way in WAYS:
        for dtype in (torch.float32, torch.bfloat16):
            strategy, own = strategy_of(way, comm, dtype), gradients_of(comm.rank, dtype)
            label = f"{way}:{'fp32' if dtype == torch.float32 else 'bf16'}"
            strategy.model(own).backward()  # a rehearsal
            strategy.clear_gradients()
            assert not strategy.keeps_errors or not any(bool(error.any()) for error in kept(strategy).values())
            first = averaged(strategy, own, 0)
            out |= {f"{label}:first:{name}": tensor for name, tensor in first.items()}
            steps = STEPS if way != "plain" else 1
            sums = {name: tensor.double() for name, tensor in first.items()}
            for step in range(1, steps):
                for name, tensor in averaged(strategy, own, step).items():
                    sums[name] += tensor
            out |= {f"{label}:mean:{name}": total / steps for name, total in sums.items()}
            if strategy.keeps_errors:
                out |= {f"{label}:error:{name}": error for name, error in kept(strategy).items()}
    not_finite(comm, out, seen)
    loss_scale(comm, seen)
    plain_steps(comm, out)
    seen["traffic"] = {way: traffic(way, comm) for way in WAYS}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / f"{comm.rank}.safetensors")
    if comm.rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
    close(comm)
    end_process()


def not_finite(comm: Comm, out: dict[str, Tensor], seen: dict[str, object]) -> None:
    """One worker's infinity in each kind of tensor: all get what is not finite, and nothing is left of it."""
    for way in WAYS:
        strategy, own = strategy_of(way, comm, torch.float32), gradients_of(comm.rank)
        averaged(strategy, own, 0)
        bad = {name: tensor.clone() for name, tensor in own.items()}
        if comm.rank == 1:
            for tensor in bad.values():
                tensor.view(-1)[5] = torch.inf
        found = averaged(strategy, bad, 1, takes_effect=False)
        out |= {f"{way}:infinite:{name}": tensor for name, tensor in found.items()}
        after = averaged(strategy, own, 2)
        seen[f"{way}:finite again"] = all(bool(tensor.isfinite().all()) for tensor in after.values())


def loss_scale(comm: Comm, seen: dict[str, object]) -> None:
    """Errors are of gradients without the scale, so that another scale in the next step changes nothing."""
    for way in ("int4", "powersgd"):
        alike = []
        for scales in ((1.0, 1.0, 1.0), (1024.0, 512.0, 256.0)):
            strategy, own = strategy_of(way, comm, torch.float32), gradients_of(comm.rank)
            for step, scale in enumerate(scales):
                found = averaged(strategy, own, step, scale)
            alike.append({name: tensor / scales[-1] for name, tensor in found.items()})
        miss = [float((alike[1][name] - alike[0][name]).abs().max() / alike[0][name].abs().max()) for name in alike[0]]
        seen[f"{way}:scaled"] = max(miss)


def plain_steps(comm: Comm, out: dict[str, Tensor]) -> None:
    strategy, own = strategy_of("int4", comm, torch.float32, plain_steps=1), gradients_of(comm.rank)
    out |= {f"plain step:{name}": tensor for name, tensor in averaged(strategy, own, 0).items()}
    out |= {f"step after it:{name}": tensor for name, tensor in averaged(strategy, own, 1).items()}


def traffic(way: str, comm: Comm) -> list[float]:
    """Bytes that a worker sends, by what went into gloo's collectives, and by arithmetic."""
    strategy, own = strategy_of(way, comm, torch.float32), gradients_of(comm.rank)
    for step in range(2):
        averaged(strategy, own, step)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        averaged(strategy, own, 2)
    sent, others = 0.0, (comm.world - 1) / comm.world
    of = {
        "gloo:all_reduce": (0, 8 * others),
        "c10d::alltoall_base_": (1, others),
        "c10d::_allgather_base_": (0, others),
    }
    for event in watched.events() or ():
        if event.name in of:
            argument, each = of[event.name]
            sent += math.prod(event.input_shapes[argument]) * each
    shapes = [parameter.shape for parameter in strategy.parameters.values()]
    return [sent, sent_bytes(ExchangeConfig.model_validate(WAYS[way]), shapes, comm.world, 4)]


main()
