"""Safetensors files, against the library's own reading and writing; real full disks and real kills."""

import hashlib
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.model_files.header import read_header
from trainer.model_files.tensor_file import TensorSpec, aligned, read_tensor, write_tensor_file

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "ids": torch.arange(77).reshape(1, 77),
    "scalar": torch.tensor(4.6052),
    "marker": torch.tensor([]),
    "transposed": torch.randn(4, 6).T,
    "flags": torch.tensor([True, False, True]),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return aligned(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: str) -> str:
    specs = specs_of(tensors)
    return write_tensor_file(path, specs, (tensors[spec.name] for spec in specs), {"title": "Füchse"}, **options)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    digest = write(tmp_path / "a.safetensors", hash_key="modelspec.hash_sha256")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"title": "Füchse", "modelspec.hash_sha256": f"0x{digest}"}
    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert digest == hashlib.sha256(data[start:]).hexdigest()
    assert data[8:10] == b'{"' and start % 8 == 0  # as A1111 and the format's own writer want it
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_reading_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "b.safetensors").tensors
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = read_tensor(tmp_path / "b.safetensors", entries[name])
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a")
    entry = read_header(tmp_path / "a").tensors["half"]
    with (tmp_path / "a").open("rb+") as stream:
        stream.truncate(entry.begin + 7)
    with pytest.raises(UserError, match="shorter"):
        read_tensor(tmp_path / "a", entry)


def test_wrong_order_or_shape_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    half, wide = TensorSpec("half", torch.float16, (1,)), TensorSpec("wide", torch.float32, (1,))
    with pytest.raises(ValueError, match="not aligned"):
        write_tensor_file(tmp_path / "a", [half, wide], [torch.zeros(1).half(), torch.zeros(1)], {})
    with pytest.raises(ValueError, match="came for"):
        write_tensor_file(tmp_path / "a", [wide], [torch.zeros(2)], {})
    with pytest.raises(ValueError, match="zip"):
        write_tensor_file(tmp_path / "a", [wide, half], [torch.zeros(1)], {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "a", {"big": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"
    huge = [TensorSpec("huge", torch.float32, (1 << 45,))]
    with pytest.raises(OSError, match=r"bytes, .* are free"):
        write_tensor_file(tmp_path / "b", huge, [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.e2e
def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    script = """
        import sys, time, torch
        from pathlib import Path
        from trainer.model_files.tensor_file import TensorSpec, write_tensor_file
        def tensors():
            for _ in range(2):
                yield torch.zeros(1 << 18)
            print("two", flush=True)
            time.sleep(60)
        specs = [TensorSpec(str(n), torch.float32, (1 << 18,)) for n in range(4)]
        write_tensor_file(Path(sys.argv[1]), specs, tensors(), {})
    """
    path = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    for how, left in ((signal.SIGINT, set()), (signal.SIGKILL, {"a.safetensors.tmp"})):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None and child.stdout.readline() == b"two\n"
            child.send_signal(how)
        assert {p.name for p in tmp_path.iterdir()} == left
    write(path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"}
