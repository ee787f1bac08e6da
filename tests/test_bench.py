"""`sdxl-train bench` as a command, and the benchmarks that need a GPU, in small on any machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.warm_processes import sdxl_train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.e2e


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"SDXL_TRAIN_PYTHON": sys.executable}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def without_cards(*arguments: object, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return sdxl_train(*arguments, cwd=cwd, expect=expect, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def config_in(folder: Path, model: Path, **memory: str) -> Path:
    (folder / "images").mkdir()
    config = {
        "run": {"dir": "run"},
        "launch": {"workers": 2, "threads_per_worker": 1},
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": "images"}],
            "prepared": "prepared",
            "cache_text": True,
            "workers": 0,
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64},
        },
        "train": {"steps": 10, "precision": "fp32", "gradient_accumulation_steps": 2},
        "optimizer": {"lr": 1e-6},
        "ema": {"averages": [{}]},
        "memory": memory,
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_two_strategies(model_folder: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, model_folder)
    options = ("--steps", 2, "--warmup", 1, "--batch-sizes", 1, "--strategies", "ddp,zero2", "--bucket-sizes", 0.5)
    done = without_cards("bench", config, *options, cwd=tmp_path)
    assert "ddp, batch 1, buckets of 0.5 MiB" in done.stdout and "zero2, batch 1 " in done.stdout
    report = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert [(row["strategy"], row["error"]) for row in report["rows"]] == [("ddp", None), ("zero2", None)]
    assert [row["bucket_mib"] for row in report["rows"]] == [0.5, None]
    for row in report["rows"]:
        assert (row["workers"], row["accumulation"], row["bucket"]) == (2, 2, [64, 64])
        assert row["images_per_s"] == pytest.approx(4 / row["step_s"])
        assert sum(row["split"].values()) == pytest.approx(row["step_s"], rel=0.3)
        assert row["mfu"] > 0 and row["rss_bytes"] > 100e6
    assert report["rows"][0]["exposed_s"] is not None and report["rows"][1]["exposed_s"] is None
    assert "best: " in done.stdout and "batch_size_per_gpu: 1" in done.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["bench.json"]


@pytest.mark.slow
def test_what_cannot_fit_ends_its_row_alone(model_folder: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, model_folder, budget="1MiB")
    options = ("--steps", 1, "--warmup", 1, "--batch-sizes", "1,2", "--strategies", "ddp")
    done = without_cards("bench", config, *options, cwd=tmp_path, expect=1)
    rows = json.loads((tmp_path / "run" / "bench.json").read_text())["rows"]
    assert len(rows) == 2 and all("memory: each worker needs" in row["error"] for row in rows)
    assert "nothing could be measured" in done.stdout


def test_optimizers_are_compared_and_the_plan_tells_their_seconds(model_folder: Path, tmp_path: Path) -> None:
    """Spread over two workers; what the run does not go with is told, with the reason, and nothing else is left."""
    config = config_in(tmp_path, model_folder, strategy="zero2")
    options = ("--steps", 1, "--warmup", 1, "--optimizers", "adamw,came,schedule_free_adamw")
    done = without_cards("bench", config, *options, cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "bench_optimizers.json").read_text())
    assert (report["workers"], report["own_kind"], report["strategy"]) == (2, "adamw", "zero2")
    adamw, came, schedule_free = report["rows"]
    for row in (adamw, came):
        assert (row["error"], row["strategy"]) == (None, "zero2")
        assert row["alone_s"] > 0 and 0 < row["share"] < 1
        assert row["state_bytes"] == pytest.approx(row["planned_bytes"], rel=0.01)
    assert came["state_bytes"] < 0.6 * adamw["state_bytes"]
    assert schedule_free["refused"] and "ema.averages" in schedule_free["error"]
    assert "* adamw" in done.stdout and "refused: ema.averages" in done.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["bench_optimizers.json"]
    planned = without_cards("plan", config, cwd=tmp_path)
    told = {line.split()[0]: line for line in planned.stdout.splitlines() if " bytes a weight " in line}
    assert f"{adamw['alone_s']:.4f} s/step  chosen" in told["adamw"] and f"{came['alone_s']:.4f} s/step" in told["came"]
    assert "not measured" in told["muon"]
    assert "measured by `sdxl-train bench` on CPU" in planned.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--optimizers", "adamw,adam"), "adam: must be `all`, or of adamw, adamw_8bit, lion,"),
        (("--optimizers", "all", "--batch-sizes", "1"), "leave out --batch-sizes, --strategies, --bucket-sizes and"),
        (("--bucket-sizes", "16,0"), "16,0: must be numbers of MiB from 0.01 to 65536, such as 16,64"),
        (("--bucket-sizes", "16", "--strategies", "zero2"), "--bucket-sizes: belongs to `ddp`, which is not among"),
        (
            ("--bucket-sizes", "16", "exchange.average_every=8"),
            "--bucket-sizes: with exchange.average_every no gradients",
        ),
        (("--bucket-sizes", "16", "launch.workers=1"), "--bucket-sizes: one worker shares its model with nobody"),
    ],
)
def test_ways_that_cannot_be_compared(model_folder: Path, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    done = run(sys.executable, "-m", "trainer", "bench", config_in(tmp_path, model_folder), *options, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_gpu_benchmarks_dry(tmp_path: Path) -> None:
    """All sections but the one that runs a part of this suite; rows go between the markers."""
    docs = tmp_path / "docs.md"
    begin, end = "<!-- gpu rows: begin -->", "<!-- gpu rows: end -->"
    docs.write_text(f"above\n{begin}\n| - | - | everything | not measured: no GPU here |\n{end}\nbelow\n")
    sections = ("environment", "exactness", "bench", "attention", "tf32", "optimizer", "full-size")
    done = run("benchmarks/gpu.sh", "--dry", "--docs", docs, "--only", *sections)
    assert done.returncode == 0, done.stderr
    head, rows = docs.read_text().split(begin)
    rows, tail = rows.split(end)
    assert (head, tail) == ("above\n", "\nbelow\n")
    assert all(row.split(" | ")[1] == "CPU, dry run" for row in rows.strip().splitlines())
    for told in ("NCCL", "exactness", "bench: everything, 1 x single, batch 1", "SDPA", "product", "optimizer"):
        assert told in rows
    assert "full size" in rows and "failed" not in rows
    lean = "bench: UNet, train.precision=bf16_stochastic optimizer.kind=adamw_8bit, 1 x single, batch 1"
    assert re.search(rf"{lean} \| [0-9.]+ img/s at 64 x 64 px, bf16_stochastic.* libraries included", rows)
    assert "not measured: no GPU here" in rows and "| - | - |" not in rows


@pytest.mark.slow
def test_the_proof_tells_rows_as_they_come_and_leaves_out_what_takes_too_long(
    model_folder: Path, tmp_path: Path
) -> None:
    """Weights stay between batch sizes; FSDP2 in a group of one takes the plain steps; no time, no task."""
    config = config_in(tmp_path, model_folder, budget="8GiB")
    command = (sys.executable, "-m", "benchmarks.gpu_proof", "--dry", "--unet", config, "--everything", config)
    overrides = config.read_text().replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 1")
    config.write_text(overrides.replace("path: images", f"path: {tmp_path / 'images'}"))
    done = run(*command, "--seconds", 300, "--only", "agreement", "unet-2", "save", "fsdp2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    begun = [line["begins"] for line in lines if isinstance(line, dict)]
    assert begun == ["agreement", "unet-2", "save", "fsdp2"]
    told = {line[0]: line[1] for line in lines if isinstance(line, list)}
    assert len(told) == 6 and all(measured for measured in told.values())
    assert "0.0e+00" in told["tiny model in fp32 against fp32 on the CPU, relative L2"]
    assert re.search(r"differ by at most (0\.0e\+00|\d\.\de-0[6-9]) from single", told["proof: UNet, batch 1, zero2"])
    done = run(*command, "--seconds", 20, "--only", "compile")
    ((name, told_now),) = [json.loads(line) for line in done.stdout.splitlines()]
    assert name == "compile" and told_now.startswith("left out: it would take about 120 s")


@pytest.mark.slow
def test_exactness_compares_losses_and_weights() -> None:
    command = (sys.executable, "benchmarks/gpu_exactness.py", "--device", "cpu", "--workers", 2, "--steps", 1)
    done = run(*command, "--runs", "zero2:fp32:3")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [what for what, _ in rows] == [
        "exactness: single:fp32:1, one worker against itself, 1 steps",
        "exactness: zero2:fp32:3, 2 workers over gloo against one worker, 1 steps",
    ]
    (itself, shared) = (list(map(float, re.findall(r"\d\.\de[+-]\d+", told))) for _, told in rows)
    assert itself == [0.0, 0.0]
    assert len(shared) == 2 and max(shared) < 1e-6


def test_without_a_gpu_it_says_so() -> None:
    done = run("benchmarks/gpu.sh")
    assert done.returncode == 1 and "not measured: no GPU here" in done.stderr
