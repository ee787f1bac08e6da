"""Checkpoints of torch's old format beside torch's own reader; damaged and hostile ones cost a line."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model_files.pickle_file import read_old_pickle


def saved(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(2)
    base = torch.randn(6, 5)
    return OrderedDict(
        whole=torch.randn(3, 4, dtype=torch.float64), half=torch.randn(7).half(), count=torch.tensor(5), base=base,
        turned=base.t(), part=base[2:4, 1:], empty=torch.zeros(0, 3), last=torch.arange(9, dtype=torch.uint8),
    )  # fmt: skip


def test_every_tensor_is_what_torch_reads(tmp_path: Path) -> None:
    for content in (tensors(), {"state_dict": tensors(), "step": 3}):
        file = saved(tmp_path / "old.pth", content)
        expected = torch.load(file, weights_only=True)
        expected = expected.get("state_dict", expected)
        found = read_old_pickle(file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_what_is_none_or_damaged_is_a_line(tmp_path: Path) -> None:
    file = saved(tmp_path / "old.pth", tensors())
    whole = file.read_bytes()

    def said() -> str:
        with pytest.raises(UserError) as told:
            read_old_pickle(file)
        assert len(told.value.lines) == 1 and told.value.lines[0].startswith(f"{file}: ")
        return told.value.lines[0]

    for size in (0, 1, 40, 300, 700, len(whole) - 60, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "cannot be read as a checkpoint" in said() or "is larger than its data" in said()
    file.write_bytes(whole + b"x")
    assert "bytes where its tensors take" in said()
    at = whole.index((9).to_bytes(8, "little") + bytes(range(9)))  # one tensor's data, after their number
    file.write_bytes(whole[:at] + (1 << 62).to_bytes(8, "little") + whole[at + 8 :])
    assert "data of another size than its tensors say" in said()
    torch.save(tensors(), file)
    assert "cannot be read as a checkpoint" in said()
    saved(file, [1, 2])
    assert "is a pickle of a list, not of named tensors" in said()


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.file,))


def test_nothing_in_it_runs(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    with pytest.raises(UserError, match="holds more than tensors"):
        read_old_pickle(saved(tmp_path / "old.pth", {**tensors(), "more": Hostile(victim)}))
    assert not victim.exists()
