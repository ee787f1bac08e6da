"""One of several workers that hold rows of the same parameters; run by test_sharded_ema.py.

    python sharded_ema_script.py FOLDER RANK WORLD

Four workers average five steps and write; three read that, average five more, and write. Then an average goes into
the shards and back.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.optim.ema import Averages, Place, start_averages, update_averages
from trainer.optim.ema_contents import ema_parts, load_ema_tensors, load_progress
from trainer.optim.ema_profile import PlainEma, PowerEma, Profile
from trainer.optim.ema_swap import averaged_weights
from trainer.parallel.local_shard import local_part, part_of, whole_of
from trainer.parallel.worker import end_process

PROFILES: dict[str, Profile] = {"ema": PlainEma(0.9), "short": PowerEma(0.05), "long": PowerEma(0.10)}
PLACES: tuple[Place, ...] = ("device", "host")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Weights(nn.Module):
    """Rows that workers share unevenly, down to none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in {"matrix": (70, 321), "conv": (64, 8, 3, 3), "bias": (77,), "two": (2, 3001)}.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        set_weights(self, 0)


def whole_tensor(tensor: Tensor) -> Tensor:
    """On each of the workers, who must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_weights(weights: nn.Module, step: int) -> None:
    """As they are after a step; of sharded ones this worker's rows."""
    for index, parameter in enumerate(weights.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        whole = (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.dtype)
        local_part(parameter)[0].copy_(part_of(whole, parameter))


def run(weights: nn.Module, averages: Averages, steps: range) -> dict[str, Tensor]:
    """All averages as wholes, after `steps`."""
    parameters = dict(weights.named_parameters())
    for step in steps:
        set_weights(weights, step)
        update_averages(averages, parameters, step)
    return {
        f"{average}/{name}": whole_tensor(whole_of(held.part, parameters[name])).contiguous().clone()
        for average in PROFILES
        for name, held in ema_parts(averages, average, parameters).items()
    }


def load(weights: nn.Module, averages: Averages, stored: dict[str, Tensor], record: dict[str, object]) -> None:
    for average in PROFILES:
        mine = {name.split("/")[1]: tensor for name, tensor in stored.items() if name.startswith(f"{average}/")}
        load_ema_tensors(averages, average, dict(weights.named_parameters()), mine.items())
    load_progress(averages, record)


def check_swap(weights: nn.Module, averages: Averages, wanted: dict[str, Tensor]) -> None:
    parameters = dict(weights.named_parameters())
    before = {name: whole_tensor(parameter.detach()).clone() for name, parameter in parameters.items()}
    with averaged_weights(averages, "short", parameters):
        for name, parameter in parameters.items():
            assert torch.equal(whole_tensor(parameter.detach()), wanted[f"short/{name}"].to(parameter.dtype)), name
    for name, parameter in parameters.items():
        assert torch.equal(whole_tensor(parameter.detach()), before[name]), name


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for kind, dtype in DTYPES.items():
        for place in PLACES:
            weights = Weights(dtype)
            fully_shard(weights, mesh=mesh)
            first = folder / f"{kind}-{place}-5"
            averages = start_averages(dict(weights.named_parameters()), PROFILES, place=place)
            assert averages.shards["ema"]["matrix"].shape[0] < 70
            if world == 4:
                found = run(weights, averages, range(1, 6))
                if rank == 0:
                    save_file(found, first.with_suffix(".safetensors"))
                    first.with_suffix(".json").write_text(json.dumps(averages.to_json()))
                continue
            record = json.loads(first.with_suffix(".json").read_text())
            load(weights, averages, load_file(first.with_suffix(".safetensors")), record)
            found = run(weights, averages, range(6, 11))
            check_swap(weights, averages, found)
            if rank == 0:
                save_file(found, folder / f"{kind}-{place}-10.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    end_process()


if __name__ == "__main__":
    main()
