"""One of several workers that hold rows of the same parameters; run by test_sharded_optimizer.py.

    python sharded_optimizer_script.py FOLDER RANK WORLD [WITHIN]

For each kind: three steps from the start, written as `<kind>-sharded-3.safetensors`; then three more from what a
single process wrote, as `<kind>-sharded-6.safetensors`. With WITHIN, so many workers share the rows, and what others of
them hold once more is compared with what the first have.
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.config.schema import OptimizerConfig
from trainer.optim.loss_scale import LossScale
from trainer.optim.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors
from trainer.parallel.local_shard import local_part, part_of, whole_of
from trainer.parallel.worker import end_process

KINDS = {
    "fused": (OptimizerConfig(lr=1e-3), None),
    "8bit": (OptimizerConfig(lr=1e-3, kind="adamw_8bit"), None),
    "8bit-stochastic": (OptimizerConfig(lr=1e-3, kind="adamw_8bit"), "stochastic"),
    "kahan": (OptimizerConfig(lr=1e-3), "kahan"),
    "lion": (OptimizerConfig(lr=1e-3, kind="lion"), "stochastic"),
    "lion_8bit": (OptimizerConfig(lr=1e-3, kind="lion_8bit"), "kahan"),
    "adopt": (OptimizerConfig(lr=1e-3, kind="adopt"), "stochastic"),
    "schedule_free_adamw": (OptimizerConfig(lr=1e-3, kind="schedule_free_adamw"), "stochastic"),
    "muon": (OptimizerConfig(lr=1e-3, kind="muon"), "stochastic"),
    "prodigy": (OptimizerConfig(lr=1.0, kind="prodigy", d0=1e-4), None),
    "dadapt_adam": (OptimizerConfig(lr=1.0, kind="dadapt_adam", d0=1e-4, growth_rate=2.0), None),
    "stable_adamw": (OptimizerConfig(lr=1e-3, kind="stable_adamw"), None),
    "adafactor": (OptimizerConfig(lr=1e-2, kind="adafactor"), None),
    "came": (OptimizerConfig(lr=1e-3, kind="came"), None),
}
SUMS = ("prodigy", "dadapt_adam", "stable_adamw", "adafactor", "came")
"""Kinds that add up over rows: another number of workers, another last bit."""


class Weights(nn.Module):
    """Rows that three workers share unevenly, down to none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"matrix": (70, 320), "conv": (64, 8, 3, 3), "bias": (77,), "two": (2, 3000)}.items():
            value = torch.randn(shape, generator=generator) * 0.02
            setattr(self, name, nn.Parameter(value.to(dtype)))


def gradient_of(parameter: nn.Parameter, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    whole = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(parameter.dtype)
    return whole_of(part_of(whole, parameter).clone(), parameter)


def run(kind: str, weights: Weights, state: dict[str, Tensor] | None, steps: range) -> dict[str, Tensor]:
    """Weights and state after `steps`; still sharded where the weights are."""
    config, rounding = KINDS[kind]
    named = dict(weights.named_parameters())
    optimizer = make_optimizer(named, config, rounding=rounding, seed=3)
    if state is not None:
        load_optimizer_tensors(optimizer, named, state.items())
    for step in steps:
        for index, parameter in enumerate(named.values()):
            parameter.grad = gradient_of(parameter, step, index)
        optimizer.step()
    tensors = {**{name: p.detach() for name, p in named.items()}, **optimizer_tensors(optimizer, named)}
    return {name: tensor.clone() for name, tensor in tensors.items()}  # no two of them in the same memory


def load_weights(weights: Weights, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the whole weights' rows into their places; return the rest, the optimizer's state."""
    rest = dict(tensors)
    with torch.no_grad():
        for name, parameter in weights.named_parameters():
            local_part(parameter)[0].copy_(part_of(rest.pop(name), parameter))
    return rest


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if KINDS[kind][1] else torch.float32


def assert_same_on_replicas(tensor: Tensor, group: dist.ProcessGroup) -> None:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    others = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(others, part.contiguous(), group)
    assert all(torch.equal(other, part) for other in others)


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    within = int(sys.argv[4]) if len(sys.argv) > 4 else world
    shape, names = ((world,), ("shard",)) if within == world else ((world // within, within), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        if within < world:
            for tensor in tensors.values():
                assert_same_on_replicas(tensor, mesh.get_group("replicate"))
        whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()}
        if rank == 0:
            save_file({key: t.contiguous() for key, t in whole.items()}, folder / name)

    for kind in KINDS:
        weights = Weights(dtype_of(kind))
        fully_shard(weights, mesh=mesh)
        write(f"{kind}-sharded-3.safetensors", run(kind, weights, None, range(3)))
        state = load_weights(weights, load_file(folder / f"{kind}-whole-3.safetensors"))
        write(f"{kind}-sharded-6.safetensors", run(kind, weights, state, range(3, 6)))
    # An overflow in one worker's rows (and its replicas'): all workers halve the loss scale.
    gradient = gradient_of(weights.matrix, 0, 0)
    if rank % within == 1:
        gradient.to_local()[0, 0] = math.inf
    norm = nn.utils.get_total_norm([gradient])
    assert isinstance(norm, DTensor)
    assert LossScale(1024.0).after(math.isfinite(norm.full_tensor().item())) == LossScale(512.0)
    dist.barrier()
    dist.destroy_process_group()
    end_process()


if __name__ == "__main__":
    main()
