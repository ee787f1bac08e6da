"""Two workers take the steps of one."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.adapter_config_of import KINDS, adapted
from tests.data.small_set import write_small_set
from tests.worker_group import run_group
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.load import to_yaml
from trainer.data.buckets import Bucket

SCRIPT = Path(__file__).parent / "shared_adapter_script.py"
SHARED = ("lora", "lokr", "dora")


def run(folder: Path, model: Path, prepared: Path, world: int) -> Path:
    """One run of each kind: 4 steps of 4 images, of which each worker takes its part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = []
    for kind in SHARED:
        settings = KINDS[kind] | {"text_encoders": kind == "lora"} | ({"dropout": 0.2} if kind != "lokr" else {})
        train = {"steps": 4, "batch_size_per_gpu": 4 // world}
        config = adapted(model, prepared, folder / kind, settings, train=train, optimizer={"lr": 1e-4})
        files.append(folder / f"{kind}.yaml")
        files[-1].write_text(to_yaml(config))
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2])}  # the script reads what tests share
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SDXL_TRAIN_DEVICE": "cpu"}
    environments = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    run_group([[sys.executable, str(SCRIPT), *map(str, files)]] * world, environments, folder)
    return folder


@pytest.mark.e2e
def test_two_workers_take_the_steps_of_one(
    model_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prepared = write_small_set(tmp_path_factory.mktemp("shared") / "prepared", {Bucket(64, 64): 8})
    folders = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        folders.append(run(tmp_path / str(world), model_folder, prepared, world))
    for kind in SHARED:
        file = "adapter/adapter_model.safetensors"
        one, two = (load_file(checkpoint_dir(folder / kind, 4) / file) for folder in folders)
        assert one.keys() == two.keys()
        worst = max(float((one[name] - two[name]).abs().max()) for name in one)
        assert worst < 1e-6, (kind, worst)
        assert any(torch.count_nonzero(tensor) for name, tensor in one.items() if "lora_B" in name or "w2_b" in name)
