"""Real runs with faults made on purpose: bad steps change nothing, bad data is gone round, a bad card is found."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.run_dir import list_checkpoints
from trainer.cli.start_workers import start_workers
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.loader import BatchReader, Request
from trainer.data.sampler import Position, StepRows, planned_steps, same_each_epoch
from trainer.errors import NumbersGoneWrong, UserError
from trainer.faults import FAULT
from trainer.model.text import load_tokenizers
from trainer.train.build import build_run
from trainer.train.guard.left_out_record import read_left_out
from trainer.train.step import batch_losses

pytestmark = pytest.mark.e2e

ROWS = {Bucket(64, 64): 30, Bucket(128, 64): 26}
SMOOTH = {"lr": 1e-2, "eps": 1e-2}  # by which the rounding of small gradients makes no steps of full length
GUARD: dict[str, Any] = {"window": 16, "replica_check_every": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "prepared", ROWS)


def config_of(model: Path, prepared: Path, run_dir: Path, workers: int = 1, steps: int = 12, **sections: Any) -> Config:
    """Steps of 4 images, a checkpoint after every 5."""
    config = run_config(model, prepared, run_dir).model_dump(mode="json")
    train = {"steps": steps, "batch_size_per_gpu": 1 if workers > 1 else 4, "global_batch_size": 4}
    return Config.model_validate(
        config
        | {"launch": {"workers": workers, "threads_per_worker": 1}, "guard": GUARD}
        | {"checkpoint": {"every_steps": 5, "keep": 20}, "train": config["train"] | train}
        | sections
    )


def started(config: Config) -> int:
    """The exit code of the run, whose workers are processes that are started again after a fault."""
    return start_workers("train", config, config.run.dir, {})


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step-{step:08d}/unet/diffusion_pytorch_model.safetensors")


def tensor_hashes(run_dir: Path, step: int) -> dict[str, str]:
    entries = read_manifest(run_dir / f"checkpoints/step-{step:08d}")
    return {name: entry["xxh3_128"] for name, entry in entries.items() if name.endswith(".safetensors")}


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def planned() -> Iterator[StepRows]:
    for rows, _ in planned_steps(same_each_epoch([*ROWS.values()]), 5, Position.start(2, 4)):
        yield rows


@pytest.mark.parametrize(("strategy", "fault"), [("ddp", "nan_gradient@1:7"), ("zero2", "nan_loss@1:7")])
def test_a_step_with_one_workers_nan_changes_nothing_anywhere(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, fault: str
) -> None:
    """Weights, moments and averages are the same files before and after it; the workers stay alike."""
    monkeypatch.setenv(FAULT, fault)
    ema = {"averages": [{"kind": "power", "length": 0.1}]}
    saves = {"every_steps": 1, "keep": 20}
    sections = {"memory": {"strategy": strategy}, "ema": ema, "checkpoint": saves}
    guard = GUARD | {"replica_check_every": 1}
    config = config_of(model_folder, prepared, tmp_path / "run", 2, 8, guard=guard, **sections)
    assert started(config) == 0
    run_dir = config.run.dir
    hashes = [tensor_hashes(run_dir, step) for step in range(1, 9)]
    assert hashes[5] == hashes[6] and len(hashes[5]) == 3
    assert all(one[name] != other[name] for one, other in ((hashes[4], hashes[5]), (hashes[6], hashes[7]))
               for name in one)  # fmt: skip
    lines = skipped(run_dir)
    assert [(line["step"], line["rank"]) for line in sorted(lines, key=lambda line: line["rank"])] == [(7, 0), (7, 1)]
    assert all("not finite" in line["reason"] and len(line["keys"]) == 2 for line in lines)
    state = json.loads((run_dir / "checkpoints/step-00000008/training_state/state.json").read_text())
    sizes = [rows.weights.sum() for _, rows in zip(range(8), planned(), strict=False)]
    assert state["images_seen"] == sum(sizes) - sizes[6] and len(state["guard"]["taken"]) == 7
    assert not (run_dir / "left_out.json").exists()


def test_a_batch_that_is_a_thousand_times_too_large_is_skipped(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "loss_spike@0:10:1e3")
    run = watched_run(config_of(model_folder, prepared, tmp_path / "run"))
    assert [step + 1 for step, result in enumerate(run.results) if not result.took_effect] == [10]
    reason = run.results[9].verdict.reason
    assert reason.startswith("loss ") and "gradient norm" in reason
    (line,) = skipped(tmp_path / "run")
    assert line["keys"] == run.keys[9] and line["loss"] > line["loss_limit"] and line["step"] == 10


@pytest.mark.slow
def test_a_run_that_is_resumed_with_other_workers_decides_alike(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers for 9 steps; three for the rest, or one: the same limits, the same step is skipped."""
    config = config_of(model_folder, prepared, tmp_path / "three", 4, steps=9, optimizer=SMOOTH)
    assert started(config) == 0
    straight = config_of(model_folder, prepared, tmp_path / "straight", optimizer=SMOOTH)
    monkeypatch.setenv(FAULT, "loss_spike@*:11:1e3")
    assert started(config_of(model_folder, prepared, tmp_path / "three", 3, optimizer=SMOOTH)) == 0
    watched_run(straight)
    (alone,), by_three = skipped(tmp_path / "straight"), skipped(tmp_path / "three")
    assert Counter(key for line in by_three for key in line["keys"]) == Counter(alone["keys"])
    numbers = ("step", "loss", "grad_norm", "loss_limit", "grad_norm_limit")
    for line in by_three:
        assert [line[name] for name in numbers] == pytest.approx([alone[name] for name in numbers], rel=1e-4)
    one, other = weights_of(tmp_path / "straight", 12), weights_of(tmp_path / "three", 12)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-6


def test_three_bad_steps_in_a_row_are_gone_round(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 7 to 9 are bad: from the checkpoint of step 5 on, without the batches of steps 6 to 9.

    The weights are those of a training by hand that never had these batches.
    """
    monkeypatch.setenv(FAULT, "nan_gradient@1:7-9")
    config = config_of(model_folder, prepared, tmp_path / "run", 2, steps=10, optimizer=SMOOTH)
    assert started(config) == 0
    (event,) = (tmp_path / "run/events.txt").read_text().splitlines()
    assert "3 steps in a row were skipped, the last of them step 9 (gradients not finite)" in event
    assert "goes on from step-00000005, without the data of the 4 steps that ended with it (left_out.json)" in event
    kept = [rows for number, rows in zip(range(1, 15), planned(), strict=False) if not 6 <= number <= 9]
    by_hand = _trained_by_hand(config_of(model_folder, prepared, tmp_path / "by hand", optimizer=SMOOTH), kept)
    start, ours = weights_of(tmp_path / "run", 5), weights_of(tmp_path / "run", 10)
    assert max(float((ours[name] - start[name]).abs().max()) for name in ours) > 1e-3
    for name, weights in ours.items():
        torch.testing.assert_close(weights, by_hand[f"unet.{name}"].detach(), rtol=0, atol=2e-6)
    state = json.loads((tmp_path / "run/checkpoints/step-00000010/training_state/state.json").read_text())
    assert len(state["left_out"]) == 1 and state["position"]["step"] == 14
    assert state["images_seen"] == sum(rows.weights.sum() for rows in kept)
    assert not (tmp_path / "run/roll_back.json").exists()


def _trained_by_hand(config: Config, steps: list[StepRows]) -> dict[str, torch.nn.Parameter]:
    run = build_run(config, model_of(config), ALONE)
    parameters = run.parts.strategy.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=SMOOTH["lr"], eps=SMOOTH["eps"], weight_decay=0.01)
    reader = BatchReader(run.prepared, "train", config.run.seed, load_tokenizers(model_of(config).tokenizers))
    for rows in steps:
        batch = reader.read(Request(rows.epoch, rows.bucket, rows.ids, rows.weights))
        ((batch.weights * batch_losses(run.parts, batch, 0, 4.0).losses).sum() / batch.weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def test_going_back_that_does_not_help_ends_the_run(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun or SLURM, where others start it again: the order lies in the run directory."""
    monkeypatch.setenv(FAULT, "nan_gradient@0:7-9:always")
    config = config_of(model_folder, prepared, tmp_path / "run", checkpoint={"every_steps": 4})
    with pytest.raises(NumbersGoneWrong, match=r"the next start goes on from step-00000004, without .* 5 steps"):
        watched_run(config)
    with pytest.raises(UserError) as raised:
        watched_run(config)
    (line,) = raised.value.lines
    assert "going back once has not helped" in line and "skipped.jsonl has their images" in line and "\n" not in line
    assert len(read_left_out(tmp_path / "run").stretches) == 1
    # Each of both ways has one between its bad steps, with the weights of before them.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000008"]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("rolled-back-*/*")] == ["step-00000008"]


def test_a_checkpoint_between_bad_steps_is_moved_aside(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "nan_gradient@0:5-7")
    config = config_of(model_folder, prepared, tmp_path / "run", steps=8, checkpoint={"every_steps": 1, "keep": 20})
    with pytest.raises(NumbersGoneWrong, match=r"goes on from step-00000004, without the data of the 3 steps"):
        watched_run(config)
    assert (tmp_path / "run/checkpoints/step-00000005").is_dir()
    monkeypatch.delenv(FAULT)
    run = watched_run(config)
    assert len(run.results) == 4
    (aside,) = (tmp_path / "run/checkpoints").glob("rolled-back-*")
    assert "step-00000005" in [path.name for path in aside.iterdir()]
    never = Counter(key for keys in watched_run(config_of(model_folder, prepared, tmp_path / "other")).keys[4:7]
                    for key in keys)  # fmt: skip
    assert not never & Counter(key for keys in run.keys for key in keys)


def test_no_roll_back_if_none_is_wished(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "nan_loss@0:2-4")
    config = config_of(model_folder, prepared, tmp_path / "run", guard=GUARD | {"rollback": False})
    with pytest.raises(UserError, match=r"3 steps in a row were skipped, the last of them step 4 \(loss and gradients"):
        watched_run(config)
    assert not (tmp_path / "run/roll_back.json").exists()


def test_a_flipped_bit_is_found_and_undone(
    tmp_path: Path, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers nobody can say which; the run ends with the bits of an undisturbed one."""
    assert started(config_of(model_folder, prepared, tmp_path / "straight", 2)) == 0
    monkeypatch.setenv(FAULT, "flip_bit@1:6")
    assert started(config_of(model_folder, prepared, tmp_path / "run", 2)) == 0
    (event,) = (tmp_path / "run/events.txt").read_text().splitlines()
    assert "the weights of one of worker 0, worker 1 are not those of the other workers after step 8; they were the " \
        "same after step 5; the next start goes on from step-00000005" in event  # fmt: skip
    assert tensor_hashes(tmp_path / "run", 12) == tensor_hashes(tmp_path / "straight", 12)


@pytest.mark.slow
def test_the_same_card_twice_ends_the_run(
    tmp_path: Path,
    model_folder: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of four workers it is known which; and that before a checkpoint, too."""
    monkeypatch.setenv(FAULT, "flip_bit@3:2:always")
    config = config_of(model_folder, prepared, tmp_path / "run", 4, steps=6, checkpoint={"every_steps": 3})
    assert started(config) == 2
    (event,) = (tmp_path / "run/events.txt").read_text().splitlines()
    assert "the weights of worker 3 are not those of the other workers after step 3" in event
    assert "goes on from where this one began" in event
    assert "it is not the first time for worker 3: test the card" in capfd.readouterr().err
    assert not [*(tmp_path / "run/checkpoints").glob("step-*")]


@pytest.mark.slow
def test_a_flipped_bit_of_a_share_is_found(
    tmp_path: Path,
    model_folder: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the worker that holds the same share in the other group."""
    monkeypatch.setenv(FAULT, "flip_bit@3:2:always")
    memory = {"strategy": "zero2", "shard_within": 2}
    config = config_of(
        model_folder, prepared, tmp_path / "run", 4, steps=6, checkpoint={"every_steps": 3}, memory=memory
    )
    assert started(config) == 2
    (event,) = (tmp_path / "run/events.txt").read_text().splitlines()
    assert "the weights of one of worker 1, worker 3 are not those of the other workers after step 3" in event
    assert "it is not the first time for worker 1 and worker 3" in capfd.readouterr().err
