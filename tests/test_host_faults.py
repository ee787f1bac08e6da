"""Whole commands on a host that fails: a card that falls off the bus, a worker that leaks, a card that is full."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.warm_processes import WarmCommand, sdxl_train
from trainer.parallel.worker import process_name

pytestmark = pytest.mark.e2e

LONG_S = 600


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Twelve crops of a photograph, prepared once, and a short run on them."""
    from skimage import data

    folder = tmp_path_factory.mktemp("host")
    (folder / "photos").mkdir()
    picture = Image.fromarray(data.astronaut())
    for index in range(12):
        picture.crop((9 * index, 5 * index, 9 * index + 64, 5 * index + 64)).save(folder / f"photos/{index:02d}.png")
        (folder / f"photos/{index:02d}.txt").write_text(f"part {index}")
    config = {
        "run": {"dir": str(folder / "unused"), "seed": 3},
        "launch": {"threads_per_worker": 1, "watch_every_s": 0.2},
        "model": {"path": str(model_folder)},
        "data": {
            "sources": [{"path": str(folder / "photos")}],
            "prepared": str(folder / "prepared"),
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64, "step_px": 64},
            "workers": 0,
        },
        "train": {"steps": 40, "batch_size_per_gpu": 3, "precision": "fp32"},
        "optimizer": {"lr": 1e-5, "eps": 1e-6},
        "checkpoint": {"every_steps": 5},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    sdxl_train("prepare", path)
    return path


def finished(process: WarmCommand, expect: int = 0) -> str:
    """What the command printed."""
    with process:
        _, printed = process.communicate(timeout=LONG_S)
    assert process.returncode == expect, printed
    assert "Traceback" not in printed, printed
    return printed


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    return load_file(newest / "unet/diffusion_pytorch_model.safetensors")


def farthest(run_dir: Path, other: Path) -> float:
    """The largest difference between two weights."""
    first, second = weights(run_dir), weights(other)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def events(run_dir: Path) -> list[str]:
    return [line[21:] for line in (run_dir / "events.txt").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, process: WarmCommand) -> None:
    for _ in range(10 * LONG_S):
        metrics = run_dir / "metrics.jsonl"
        if metrics.is_file() and any(json.loads(line)["step"] >= step for line in metrics.read_text().splitlines()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def write_cards(path: Path, lost: int | None = None) -> None:
    """Four cards, one of them perhaps gone."""
    cards = [{"uuid": f"GPU-{n}000", "name": "RTX 3090", "lost": n == lost, "used_mib": 4} for n in range(4)]
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"cards": cards}))
    new.replace(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """Four workers with three images each, that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(WarmCommand(config_file, f"run.dir={run_dir}", "launch.workers=4"))
    return run_dir


def test_a_card_falls_off_the_bus_and_the_run_goes_on_with_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Path, undisturbed: Path
) -> None:
    """Twelve images a step as before, the same ones; then, with four cards again, the command takes all of them."""
    cards, run_dir = tmp_path / "cards.json", tmp_path / "run"
    write_cards(cards)
    monkeypatch.setenv("SDXL_TRAIN_FAKE_CARDS", str(cards))
    process = WarmCommand(config_file, f"run.dir={run_dir}")
    wait_for_step(run_dir, 12, process)
    write_cards(cards, lost=2)
    children = psutil.Process(process.pid).children()
    next(child for child in children if child.name() == process_name(2)).kill()
    printed = finished(process)
    assert "4 workers x 3 images x 1 accumulation = 12 images per step" in printed
    assert "3 workers x 3 images x 2 accumulation = 18 slots for 12 images per step" in printed
    told = events(run_dir)[-1]
    assert "going on with 3 of 4 cards, 12 images a step as before" in told
    assert any("the card of worker 2 (RTX 3090, GPU-2000) is gone from the bus" in line for line in events(run_dir))
    assert 0 < farthest(run_dir, undisturbed) <= 1e-6

    # A reboot later the card is still gone; then it is back.
    for lost, workers in ((2, 3), (None, 4)):
        write_cards(cards, lost)
        steps = 42 if lost else 44
        printed = finished(WarmCommand(config_file, f"run.dir={run_dir}", f"train.steps={steps}"))
        assert f"{workers} workers x 3 images" in printed and "12 images per step" in printed
    told = events(run_dir)[-1]
    assert told == "the run began with 4 cards and goes on with 3; each step has 12 images as before"


@pytest.mark.slow
def test_a_worker_that_leaks_is_started_anew_with_the_others_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    """From 200 steps on the watch knows the workers' level; worker 1 leaks from there on, in its first start."""
    shared = [config_file, "launch.workers=2", "train.batch_size_per_gpu=1", "train.steps=280"]
    shared += ["checkpoint.every_steps=1000", "launch.recycle_at_growth_gib=0.1"]
    finished(WarmCommand(*shared, f"run.dir={tmp_path / 'sound'}"))
    monkeypatch.setenv("FAULT", "leak@1:215-1000:4")
    printed = finished(WarmCommand(*shared, f"run.dir={tmp_path / 'leaking'}"))
    (told,) = events(tmp_path / "leaking")
    assert re.match(
        r"worker 1 has grown by 1\d\d MiB: the workers have ended, starting again from step-00000\d{3} ", told
    )
    assert "fault" not in printed
    assert farthest(tmp_path / "leaking", tmp_path / "sound") == 0


@pytest.mark.slow
def test_a_card_that_is_full_in_mid_run_is_told_plainly_and_planned_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("FAULT", "card_full@1:12")
    finished(WarmCommand(config_file, f"run.dir={run_dir}", "launch.workers=2", "train.steps=15"))
    (told,) = events(run_dir)
    assert told.startswith("worker 1 ran out of its card's memory: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert told.endswith("; trying again with less")


def test_a_run_that_gives_up_leaves_what_is_needed_to_look_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("FAULT", "hang@1:7:always")
    shared = [config_file, f"run.dir={run_dir}", "launch.workers=2", "train.steps=10", "launch.restarts=0"]
    printed = finished(WarmCommand(*shared, "launch.hang_after_s=2", "launch.hang_at_start_s=60"), expect=1)
    (folder,) = run_dir.glob("failure-*")
    assert f"logs, stacks, configuration and facts of the host are in {folder}" in printed
    names = {file.name for file in folder.iterdir()}
    assert names >= {"README.txt", "summary.json", "log.txt", "rank-1.log", "rank-1.stacks.txt", "config.resolved.yaml"}
    assert "act_out" in (folder / "rank-1.stacks.txt").read_text()
    assert json.loads((folder / "summary.json").read_text())["failure"]["kind"] == "hang"
