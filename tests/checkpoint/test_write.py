"""Checkpoints: complete or not there, damage found, the newest ones kept."""

from pathlib import Path

import pytest
import torch

from trainer.checkpoint.manifest import find_damage
from trainer.checkpoint.resume_point import resume_newest
from trainer.checkpoint.run_dir import (
    checkpoint_dir,
    checkpoint_step,
    list_checkpoints,
    only_writer,
    prune_checkpoints,
    read_state,
)
from trainer.checkpoint.saver import Folder, save_now
from trainer.checkpoint.share_of_save import NotFinite
from trainer.checkpoint.write import OPTIMIZER, TensorFile, read_tensors
from trainer.errors import UserError
from trainer.parallel.local_shard import held

TENSORS = {"a.exp_avg": torch.arange(6.0).reshape(2, 3), "a.step": torch.tensor(3.0)}


def save(run_dir: Path, step: int) -> Path:
    path = checkpoint_dir(run_dir, step)
    save_now(Folder(path, files(step), {"step": step}))
    return path


def files(step: int) -> list[TensorFile]:
    unet = {"weight": held(torch.full((4,), float(step)))}
    return [
        TensorFile("unet/diffusion_pytorch_model.safetensors", unet, {"config.json": "{}"}),
        TensorFile(OPTIMIZER, {name: held(tensor) for name, tensor in TENSORS.items()}, {}),
    ]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint_step(path) == 7
    assert read_state(path) == {"step": 7}
    found = dict(read_tensors(path / OPTIMIZER))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert find_damage(path) is None


def test_what_is_not_finite_is_not_saved_and_leftovers_go(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    poisoned = TensorFile("unet/weights.safetensors", {"weight": held(torch.tensor([1.0, float("nan")]))}, {})
    with pytest.raises(NotFinite, match=r"unet/weights\.safetensors: weight holds NaN or infinity"):
        save_now(Folder(checkpoint_dir(tmp_path, 2), [*files(2), poisoned], {}))
    assert list_checkpoints(tmp_path) == [good]
    assert list((tmp_path / "checkpoints").iterdir()) == [good], "a full disk is not to stay full of it"
    checkpoint_dir(tmp_path, 3).with_suffix(".cafe-1.tmp").mkdir()  # of a process that was killed
    prune_checkpoints(tmp_path, keep=2)
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_permanent_ones_stay(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 10, 11)]
    prune_checkpoints(tmp_path, keep=2, always=2)
    assert list_checkpoints(tmp_path) == paths[1:]


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, harm: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = newer / OPTIMIZER
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 4
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[:-1])
    elif harm == "delete":
        file.unlink()
    else:
        (newer / "manifest.json").write_text('{"version": 1')
    lines: list[str] = []
    assert resume_newest(tmp_path, lines.append) == older
    aside = newer.with_name("step-00000002.damaged")
    assert len(lines) == 1 and lines[0].startswith(f"{newer}: ")
    assert lines[0].endswith("; set aside as step-00000002.damaged, its steps are done anew from step-00000001")
    prune_checkpoints(tmp_path, keep=1)
    assert aside.is_dir() and list_checkpoints(tmp_path) == [older]
    assert find_damage(save(tmp_path, 2)) is None, "its place is free"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 10, 11)]
    prune_checkpoints(tmp_path, keep=2)
    assert list_checkpoints(tmp_path) == paths[2:]
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[2:]


def test_a_run_directory_has_one_writer(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(UserError, match="another sdxl-train"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass
