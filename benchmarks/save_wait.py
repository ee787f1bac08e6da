"""How long training waits for a checkpoint of full size, by the length of a step.

    python benchmarks/save_wait.py --dir /nvme/scratch

All of SDXL's UNet as one worker holds it in bf16 with 8-bit moments, 10.3 GB (`--fp32`: as each of four workers holds
its quarter with fp32 weights and moments, 7.7 GB), is saved by the run's own saver. A step computes (products of
matrices) and then waits, as the loop does, until weights may change: for the copies, which wait for the disk where
`--staging` holds less than all of it. The disk is that of `--dir`.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.big_modeling import init_empty_weights
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tqdm import tqdm

from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.checkpoint.saver import Folder, Saver
from trainer.checkpoint.write import OPTIMIZER, TensorFile
from trainer.memory.choice import parse_size
from trainer.model_files.presets import preset
from trainer.parallel.environment import free_memory_bytes
from trainer.parallel.local_shard import held

CPU = torch.device("cpu")
SHARE_OF_RAM = 1 / 4  # as a run takes by default


def state(fp32: bool) -> list[TensorFile]:
    """Weights and moments of one worker, in the shapes that the UNet has."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(preset("unet"))
    assert isinstance(unet, UNet2DConditionModel)
    weights, moments = {}, {}
    for name, parameter in tqdm(list(unet.named_parameters()), desc="filling memory", unit="tensor", disable=None):
        shape = list(parameter.shape)
        if fp32:
            shape[0] = math.ceil(shape[0] / 4)
        weights[name] = held(_filled(shape, torch.float32 if fp32 else torch.bfloat16))
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{moment}"] = held(_filled(shape, torch.float32 if fp32 else torch.uint8))
    return [
        TensorFile("unet/diffusion_pytorch_model.safetensors", weights, {"config.json": "{}"}),
        TensorFile(OPTIMIZER, moments, {}),
    ]


def _filled(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Pages of its own, not those of zeros that the kernel lends out."""
    return torch.full(shape, 1, dtype=dtype)


def compute(seconds: float) -> None:
    """Keep the cores busy."""
    ends, matrix = time.monotonic() + seconds, torch.randn(512, 512)
    while time.monotonic() < ends:
        matrix = (matrix @ matrix).clamp_(-1, 1)


def steps(files: list[TensorFile], place: Path, step_s: float, staging: int | None) -> Iterator[float]:
    """Save once and go on in steps; yields how long each waited, until the save is whole."""
    saver = Saver(0, 1, "0", CPU, staging)
    begin = time.monotonic()
    saver.begin([Folder(checkpoint_dir(place, 1), files, {"step": 1})])
    yield time.monotonic() - begin
    while saver.phase != "idle":
        compute(step_s)
        begin = time.monotonic()
        saver.wait_copied()
        yield time.monotonic() - begin
        if (reason := saver.after_exchange(*saver.flags())) is not None:
            raise reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where it is written (default: the system's temporary folder)")
    parser.add_argument("--fp32", action="store_true", help="a quarter in fp32, as with zero2 on four cards")
    parser.add_argument("--staging", help="size of the copies, such as 8GiB (default: a quarter of the free memory)")
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[1.0, 5.0, 15.0])
    arguments = parser.parse_args()
    files = state(arguments.fp32)
    num_bytes = sum(each.part.nbytes for file in files for each in file.tensors.values())
    free = free_memory_bytes()
    staging = parse_size(arguments.staging) if arguments.staging else int((free or 0) * SHARE_OF_RAM) or None
    held_at_once = "all" if staging is None else f"{staging / 1e9:.2f} GB"
    print(f"{num_bytes / 1e9:.2f} GB to save, copies of at most {held_at_once} at once")
    print(f"{'step':>8}{'saved in':>12}{'training waited':>18}{'longest':>10}")
    for step_s in arguments.step_seconds:
        with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="save-wait-") as folder:
            begin = time.monotonic()
            waited = list(steps(files, Path(folder), step_s, staging))
            seconds = time.monotonic() - begin
        print(f"{step_s:6.1f} s{seconds:10.1f} s{sum(waited):16.2f} s{max(waited):8.2f} s")


if __name__ == "__main__":
    main()
