"""Files that somebody made to crash, stall, fill or take over the program: each is told in one line or does no harm."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hostile_files import KINDS, Verdict, load_kinds
from tests.hostile_sources import EPS, encoded
from tests.warm_processes import sdxl_train

ROOT = Path(__file__).parent.parent
MOST_CPU_S, MOST_MB = 5.0, 1024.0
load_kinds()
# How many files of each kind are tried: each way that a kind has, some of them again with other numbers.
COUNTS = {
    "safetensors-header": 28, "safetensors-length": 20, "safetensors-names": 24, "no-model": 20, "pickle-program": 42,
    "pickle-archive": 24, "unet-config": 40, "text-encoder-config": 24, "model-folder-file": 24, "weights-index": 10,
    "tokenizer": 16, "yaml": 36, "no-yaml": 7, "override": 12, "manifest": 14, "prompts": 28,
    "two-models": 18, "path": 42,
}  # fmt: skip
OF_DATA = {
    "image-of-another-kind": 20, "image-bomb": 14, "large-image": 7, "damaged-image": 14, "odd-file-as-image": 10,
    "caption": 16, "mask": 20, "weight-file": 14, "folder": 10, "pixels-that-change": 16, "metadata": 40,
    "odd-file-as-table": 14, "webdataset": 48, "latent-tar": 24, "latents": 40, "parquet": 26, "hf-folder": 13,
    "tag-file": 30,
}  # fmt: skip
OF_ANOTHER_KIND = 12
# These import what networks are built of, or `datasets`, or are large.
SLOW = ("unet-config", "text-encoder-config", "hf-folder", "large-image")


def judged(files: Sequence[tuple[str, int]], model: Path, folder: Path) -> list[Verdict]:
    """What became of each file, in one process of its own."""
    result = folder / "verdicts.jsonl"
    environment = {**os.environ, "HOSTILE_MODEL": str(model), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    names = [f"{name}:{seed}" for name, seed in files]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_files", str(folder / "files"), str(result), *names],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    verdicts = [Verdict(**json.loads(line)) for line in result.read_text().splitlines()]
    assert done.returncode == 0, f"after {verdicts[-1:]}: {done.stderr[-2000:]}"
    assert len(verdicts) == len(files)
    return verdicts


def assert_harmless(verdicts: Sequence[Verdict]) -> None:
    """No code was run, no traceback, no hang, nothing that steers the terminal, little memory and time."""
    faults = [v for v in verdicts if v.fault or v.cpu_s > MOST_CPU_S or v.rss_mb > MOST_MB]
    assert not faults, "\n".join(map(str, faults))


def test_some_of_every_kind_that_needs_no_networks(model_folder: Path, tmp_path: Path) -> None:
    files = [(name, seed) for name in sorted(KINDS) if name not in SLOW for seed in (5, 10)]
    assert_harmless(judged(files, model_folder, tmp_path))


@pytest.mark.e2e
@pytest.mark.slow
def test_every_kind(model_folder: Path, tmp_path: Path) -> None:
    kinds = sorted(KINDS.keys() - OF_DATA)
    files = [(name, seed) for name in kinds for seed in range(COUNTS.get(name, OF_ANOTHER_KIND))]
    assert len(files) >= 300 and len(kinds) >= 12
    assert_all_harmless(files, model_folder, tmp_path)


@pytest.mark.e2e
@pytest.mark.slow
def test_every_kind_of_data(model_folder: Path, tmp_path: Path) -> None:
    files = [(name, seed) for name, count in OF_DATA.items() for seed in range(count)]
    assert len(files) >= 300 and OF_DATA.keys() <= KINDS.keys()
    assert_all_harmless(files, model_folder, tmp_path)


def assert_all_harmless(files: Sequence[tuple[str, int]], model_folder: Path, tmp_path: Path) -> None:
    verdicts = judged(files, model_folder, tmp_path)
    assert_harmless(verdicts)
    most = max(v.cpu_s for v in verdicts), max(v.rss_mb for v in verdicts)
    print(f"{len(files)} files of {len(dict(files))} kinds: at most {most[0]:.1f} s of CPU and {most[1]:.0f} MB each")


@pytest.mark.e2e
def test_a_run_trains_on_what_is_sound(model_folder: Path, tmp_path: Path) -> None:
    """`prepare` and `train` on a folder with hostile files among sound ones; a source that cannot be read is code 2."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(4):
        (photos / f"sound{n}.png").write_bytes(encoded("PNG", (128, 128)))
        (photos / f"sound{n}.txt").write_text("slanted stripes")
    for name, data in {"postscript": EPS, "cut": encoded("JPEG")[:400], "no-caption": encoded("PNG")}.items():
        (photos / f"{name}.jpg").write_bytes(data)
    os.mkfifo(photos / "no-caption.txt")
    os.mkfifo(photos / "fifo.png")
    (photos / "zero.png").symlink_to("/dev/zero")
    (photos / "again").symlink_to(".")
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "launch": {"workers": 1, "threads_per_worker": 1},
        "model": {"path": str(model_folder)},
        "data": {
            "sources": [{"path": str(photos)}],
            "prepared": str(tmp_path / "prepared"),
            "buckets": {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64},
            "workers": 0,
        },
        "train": {"steps": 2, "global_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    assert "prepared 4 images; 5 unusable" in _said(0, "prepare", file)
    lines = [json.loads(line) for line in (tmp_path / "prepared/bad.jsonl").read_text().splitlines()]
    assert {line["key"].partition("/")[2]: line["reason"].partition(" (")[0] for line in lines} == {
        "cut": "cannot be decoded: Truncated File Read",
        "fifo": "is a FIFO, not a regular file",
        "no-caption": "its caption is a FIFO, not a regular file",
        "postscript": "is not an image of a known kind",
        "zero": "is a device, not a regular file",
    }
    assert "done: step 2" in _said(0, "train", file)
    (tmp_path / "meta.json").write_text('{"a":' + "[" * 10**6)
    config["data"]["prepared"] += "-2"
    config["data"]["sources"] = [
        {"type": "kohya_json", "path": str(tmp_path / "meta.json"), "images": str(photos)}
    ]  # fmt: skip
    file.write_text(json.dumps(config))
    (line,) = _said(2, "prepare", file).splitlines()[-1:]
    assert line.endswith("meta.json: holds more than 64 levels inside one another, near byte 0")


def _said(code: int, *arguments: object) -> str:
    done = sdxl_train(*arguments, expect=code)
    return done.stdout + done.stderr
