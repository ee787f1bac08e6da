"""Pickled checkpoints: tensors come out as torch saved them; nothing else in one is looked up, run or unpacked."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from trainer.errors import UserError
from trainer.guards import Limits
from trainer.model_files.pickle_file import read_pickle
from trainer.model_files.pickle_program import BadProgram, NotTensors, read_program


def test_tensors_of_every_kind_come_out_as_they_were(tmp_path: Path) -> None:
    kinds = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16,
    )}  # fmt: skip
    shared = torch.randn(4, 6)
    views = {"transposed": shared.T, "part": shared[1:3, 2:], "scalar": shared[0, 0], "none": torch.zeros(0)}
    linear = torch.nn.Linear(2, 2)
    saved = kinds | views | {"parameter": torch.nn.Parameter(shared)} | linear.state_dict()
    trained = torch.optim.AdamW(linear.parameters()).state_dict()
    torch.save({"state_dict": saved, "optimizer": trained, "bytes": b"ab", "set": {1}}, tmp_path / "a.ckpt")
    read = read_pickle(tmp_path / "a.ckpt")
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (read[name].dtype, read[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(bits(read[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What can be compared of every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Runs:
    """Unpickled by Python, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_runs(tmp_path: Path, protocol: int) -> None:
    for content in (Runs(tmp_path / "ran"), {"a": [Runs(tmp_path / "ran")]}):
        with pytest.raises((NotTensors, BadProgram)):
            read_program(pickle.dumps(content, protocol))
    assert not (tmp_path / "ran").exists()


PROGRAMS = {
    "a class by text": (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    "a class from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "operation 0x93"),
    "an instance": (b"(ios\nsystem\n.", "operation 0x69"),
    "an extension": (b"\x80\x02\x82\x01.", "operation 0x82"),
    "a key of nested tuples": (b"\x80\x02})" + b"2\x86" * 100 + b"K\x01s.", "neither text nor whole numbers"),
    "more operations": (b"\x80\x02" + b"]0" * 600_000 + b".", "more than 1,000,000 operations"),
    "a call of a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "no function"),
    "a call with many arguments": (b"\x80\x02cbuiltins\nset\n(" + b"N" * 40 + b"tR.", "with 40 arguments"),
    "bytes without memory": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R.", ""),
    "a reference to nothing": (b"\x80\x02K\x01Q.", "a reference that is none"),
    "an empty stack": (b"\x80\x020.", "pop from empty list|list index"),
    "an end in the middle": (b"\x80\x02(X\xff\xff\xff\x7fa", "exhausted|EOFError"),
    "a frame without end": (b"\x80\x04\x95" + b"\xff" * 8, "frame size"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_no_checkpoint_has(name: str) -> None:
    program, words = PROGRAMS[name]
    if name == "bytes without memory":
        assert read_program(program) is None  # Python would fill a gigabyte
        return
    with pytest.raises((NotTensors, BadProgram), match=words):
        read_program(program)


def rewritten(path: Path, change: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with members replaced, added (by their end) or packed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for info in old.infolist():
            own = change.get(info.filename.partition("/")[2], b"")
            if own is not None:
                new.writestr(info.filename, own or old.read(info))
    changed = path.with_name("changed.ckpt")
    changed.write_bytes(buffer.getvalue())
    return changed


def test_archives_that_mislead(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.ckpt")
    good = rewritten(tmp_path / "a.ckpt", {})
    assert torch.equal(read_pickle(good)["a"], torch.ones(100))
    cases: tuple[tuple[dict[str, bytes | None], int, str], ...] = (
        ({"data.pkl": None}, zipfile.ZIP_STORED, "0 members data.pkl"),
        ({"data/0": None}, zipfile.ZIP_STORED, "has no data in the file"),
        ({"data/0": b"1234"}, zipfile.ZIP_STORED, r"shape \[100\] is larger than its data in the file, 4 bytes"),
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "byte order"),
        ({}, zipfile.ZIP_DEFLATED, "is packed; the weights of a checkpoint are not"),
    )
    for change, method, words in cases:
        with pytest.raises(UserError, match=words):
            read_pickle(rewritten(tmp_path / "a.ckpt", change, method))
    with pytest.raises(UserError, match=r"data.pkl unpacks to [\d,]+ bytes; at most 50 are read"):
        read_pickle(good, Limits(pickle_bytes=50))
    # 8 bytes that would be 8 TB as torch's own reader expands them.
    stretched = torch.ones(1).expand(2, 1 << 40)
    torch.save({"a": stretched}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="is larger than its data"):
        read_pickle(tmp_path / "b.ckpt")
