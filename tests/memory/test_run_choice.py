"""What the plan chose is what runs; what does not fit is found before the first step, and less is tried."""

import re
from pathlib import Path

import pytest

from tests.test_end_to_end import config_file, losses, photos, typed, unet_hash  # noqa: F401 - fixtures
from tests.warm_processes import sdxl_train

pytestmark = pytest.mark.e2e


def test_a_dry_run_changes_nothing(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    """The same bits with and without it, and when recomputed or offloaded."""
    runs = {
        "plain": [],
        "dry, recomputed": ["memory.budget=8GiB", "memory.recompute=all"],
        "offloaded": ["memory.offload_activations=true"],
    }
    for name, overrides in runs.items():
        done = sdxl_train(config_file, f"run.dir={tmp_path / name}", "train.steps=3", *overrides)
        assert ("dry run of the fullest step: it fits" in done.stderr) == ("memory.budget=8GiB" in overrides)
    assert len({unet_hash(tmp_path / name, 3) for name in runs}) == 1


def test_a_budget_that_nothing_fits_is_one_line(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    done = sdxl_train(config_file, f"run.dir={tmp_path}", "memory.budget=4MiB", expect=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sdxl-train: memory:")]
    assert "each worker needs" in line and "may use 0.00 GiB (memory.budget)" in line


def test_a_wish_to_share_that_comes_to_nothing_is_told(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    """Without a budget nothing has to be spread on the CPU; a configuration for cards can be tried there."""
    wish = ["launch.workers=2", "memory.shard_within=2"]
    for name, strategy in (("auto", "auto"), ("spread", "zero2")):
        overrides = [f"run.dir={tmp_path / name}", f"memory.strategy={strategy}", "train.steps=1", *wish]
        said = sdxl_train(config_file, *overrides).stderr
        lines = [line for line in said.splitlines() if "memory.shard_within = 2: has no effect" in line]
        assert len(lines) == (strategy == "auto"), said
        assert all("memory.strategy = auto comes to ddp" in line for line in lines)


# In worker 1, in the first attempt: a module's `train_step` finds no memory after so many steps.
_NO_MEMORY = """
import builtins, os, sys

MODULE, STEPS = {module!r}, {steps}
usual = builtins.__import__

def is_meant():  # asked in the worker: the process that it is a fork of has imported the module
    return os.environ.get("RANK") == "1" and os.environ.get("SDXL_TRAIN_MEMORY_ATTEMPT") == "0"

def watching(*args, **kwargs):
    imported = usual(*args, **kwargs)
    module = sys.modules.get(MODULE)
    if hasattr(module, "_log"):
        builtins.__import__ = usual
        take_step, taken = module.train_step, []

        def train_step(*args, **named):
            import torch

            taken.append(1)
            if len(taken) > STEPS and is_meant():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return take_step(*args, **named)

        module.train_step = train_step
    return imported

builtins.__import__ = watching
"""


def memory_ends(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, steps: int) -> None:
    """In the processes that are started from now on, and import it anew."""
    (folder / "sitecustomize.py").write_text(_NO_MEMORY.format(module=module, steps=steps))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")


def test_what_does_not_fit_is_tried_again_with_less(
    tmp_path: Path,
    config_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One worker of two finds no memory in the dry run: both start again, with a tighter plan, and the run goes on."""
    memory_ends(tmp_path, monkeypatch, "trainer.train.dry_run", 0)
    run_dir = tmp_path / "run"
    done = typed(config_file, f"run.dir={run_dir}", "train.steps=2", "launch.workers=2", "memory.budget=8GiB")
    (failed,) = [line for line in done.stderr.splitlines() if "trying again with less" in line]
    assert "128 px did not fit" in failed
    first, second = [line for line in done.stderr.splitlines() if line.startswith("chosen: ")]
    assert "of 8.00 GiB" in first and "less than what was planned before, and did not fit" in second
    assert (run_dir / "checkpoints/step-00000002/manifest.json").is_file()


def test_a_card_that_is_full_in_mid_run_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path,
    config_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the run was told to start fresh."""
    memory_ends(tmp_path, monkeypatch, "trainer.train.loop", 7)
    overrides = ["train.steps=8", "launch.workers=2", "checkpoint.every_steps=2", "run.resume=false"]
    done = typed(config_file, f"run.dir={tmp_path / 'run'}", *overrides)
    told = "worker 1 ran out of its card's memory: CUDA out of memory. Tried to allocate 2.00 GiB; trying again"
    assert told in done.stderr
    # The save after step 6 waits for that after step 4, and may not be at its end itself.
    assert re.search(r"goes on after step [46]\b", done.stderr)
    assert len(losses(tmp_path / "run")) == 8
