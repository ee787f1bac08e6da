"""Rows that cannot be read: they cost themselves alone, are listed and counted, and too many end the run."""

import json
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.loader import BatchReader, Request
from trainer.data.sampler import Position, planned_steps, same_each_epoch
from trainer.data.store import snapshot
from trainer.data.store.rows import RowProblem
from trainer.errors import UserError
from trainer.model.text import load_tokenizers
from trainer.train import bad_rows
from trainer.train.bad_rows import BAD_FILE, BadRows, forget_bad_rows_after, record_bad_rows
from trainer.train.build import build_run, make_scorer
from trainer.train.step import batch_losses

SQUARE, TALL = Bucket(64, 64), Bucket(128, 64)
ROW_BYTES = 4 * 8 * 8 * 2


def _flip(shard: Path, offset: int) -> None:
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)


def _lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / BAD_FILE).read_text().splitlines()]


@pytest.mark.e2e
def test_a_flipped_bit_costs_its_row_alone(tmp_path: Path, model_folder: Path) -> None:
    """The weights are those of a training in which that row has weight 0, computed here by hand."""
    root = write_small_set(tmp_path / "prepared", {SQUARE: 12, TALL: 4})
    _flip(root / "64x64-5.safetensors", 4096 + 2 * ROW_BYTES + 100)  # image 7
    config = run_config(model_folder, root, tmp_path / "run", steps=8)
    run = watched_run(config)
    assert all(math.isfinite(result.loss) for result in run.results)
    steps = [step + 1 for step, result in enumerate(run.results) if result.bad_rows]
    assert len(steps) == 2 and Counter(key for keys in run.keys for key in keys)["64x64/7"] == 0
    place = {"file": "64x64-5.safetensors", "row": 2, "offset": 4096 + 2 * ROW_BYTES}
    expected = [{"step": step, "rank": 0, **place, "reason": "checksum mismatch in the latents"} for step in steps]
    assert [{key: line[key] for key in expected[0]} for line in _lines(tmp_path / "run")] == expected

    whole = write_small_set(tmp_path / "whole", {SQUARE: 12, TALL: 4})
    ours = build_run(config, model_of(config), ALONE).parts.strategy.parameters  # as saved at the end
    for name, weights in _trained_by_hand(run_config(model_folder, whole, tmp_path / "by hand", steps=8)).items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-6)


def _trained_by_hand(config: Config) -> dict[str, torch.nn.Parameter]:
    run = build_run(config, model_of(config), ALONE)
    parameters = run.parts.strategy.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.optimizer.lr, weight_decay=0.01)
    reader = BatchReader(run.prepared, "train", config.run.seed, load_tokenizers(model_of(config).tokenizers))
    rows_per_bucket = run.prepared.rows_per_bucket("train")
    for rows, _ in planned_steps(
        same_each_epoch(rows_per_bucket), config.run.seed, Position.start(len(rows_per_bucket), 4)
    ):
        batch = reader.read(Request(rows.epoch, rows.bucket, rows.ids, rows.weights))
        weights = batch.weights * torch.tensor([key != "64x64/7" for key in batch.keys])
        ((weights * batch_losses(run.parts, batch, 0, 4.0).losses).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.state[next(iter(parameters.values()))]["step"] == config.train.steps:
            return parameters
    raise AssertionError


@pytest.mark.e2e
@pytest.mark.parametrize("break_it", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:5000])])
def test_a_shard_that_is_lost_while_running_costs_its_rows(
    tmp_path: Path, model_folder: Path, break_it: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 15, TALL: 4})
    monkeypatch.setattr(snapshot, "OPEN_FILES", 1)  # a deleted file stays readable while it is open
    shard = root / "64x64-5.safetensors"
    config = run_config(model_folder, root, tmp_path / "run", steps=10)
    run = watched_run(config, before_step=lambda step: break_it(shard) if step == 5 else None)
    lines = _lines(tmp_path / "run")
    assert 0 < len(lines) <= 5 and {(line["file"], line["step"] > 5) for line in lines} == {(shard.name, True)}
    assert len(lines) == sum(result.bad_rows for result in run.results)
    assert run.state is not None and run.state.images_seen == 2 * 19 - len(lines)
    assert all(math.isfinite(result.grad_norm) for result in run.results)


@pytest.mark.e2e
def test_too_many_bad_rows_end_the_run_with_a_checkpoint(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_rows, "JUDGED_FROM", 20)
    root = write_small_set(tmp_path / "prepared", {SQUARE: 10})
    _flip(root / "64x64-5.safetensors", 4096)
    run_dir = tmp_path / "run"
    with pytest.raises(UserError) as raised:
        watched_run(run_config(model_folder, root, run_dir, {"max_bad_fraction": 0.09}, steps=100))
    (line,) = raised.value.lines
    assert line.startswith("data.max_bad_fraction = 0.09: 2 of the last 20 images could not be read, see ")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000006"]
    run = watched_run(run_config(model_folder, root, run_dir, {"max_bad_fraction": 0.1}, steps=10))
    assert len(run.results) == 4


@pytest.mark.e2e
def test_a_missing_shard_is_refused_at_the_start_unless_so_much_may_be_bad(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 15})
    (root / "64x64-5.safetensors").unlink()
    with pytest.raises(UserError, match=r"64x64-5.safetensors: is missing$"):
        watched_run(run_config(model_folder, root, tmp_path / "run", steps=4))
    config = run_config(model_folder, root, tmp_path / "run", {"max_bad_fraction": 0.5}, steps=4)
    assert sum(result.bad_rows for result in watched_run(config).results) == 5
    assert "64x64-5.safetensors: is missing; its rows are left out" in caplog.text


def test_the_share_is_judged_late_and_forgets() -> None:
    assert not BadRows().after(999, 999).too_many(0.0)
    assert BadRows().after(1000, 1).too_many(0.0) and not BadRows().after(1000, 1).too_many(1e-3)
    count = BadRows(total=3)
    for _ in range(10_000):
        count = count.after(100, 0)
    assert count.total == 3 and not count.too_many(1e-3)
    steps = 0
    while not count.too_many(1e-3):  # a drive that fails after a million images
        steps += 1
        count = count.after(100, 100)
    assert steps <= 2 and count.total == 3 + 100 * steps
    assert count.recent_images < 100_000


def test_lines_of_steps_that_are_done_again_are_removed(tmp_path: Path) -> None:
    for step in (3, 5, 6):
        record_bad_rows(tmp_path, step, 1, [RowProblem("a.safetensors", step, 8, "gone")] * 2)
    assert forget_bad_rows_after(tmp_path, 5) == BadRows(total=4)
    assert [line["step"] for line in _lines(tmp_path)] == [3, 3, 5, 5]
    assert forget_bad_rows_after(tmp_path / "fresh", 0) == BadRows()


@pytest.mark.e2e
def test_many_workers_write_whole_lines(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_record_many, [(tmp_path, rank) for rank in range(4)]))
    lines = _lines(tmp_path)
    assert Counter(line["rank"] for line in lines) == dict.fromkeys(range(4), 200)


def _record_many(where: tuple[Path, int]) -> None:
    run_dir, rank = where
    for step in range(100):
        record_bad_rows(run_dir, step, rank, [RowProblem("x" * 300, step, step, "y" * 300)] * 2)


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record_bad_rows(tmp_path / "absent", 1, 0, [RowProblem("a", 1, 2, "torn")])
    assert "not written" in caplog.text and "torn" in caplog.text


def test_validation_tells_what_it_leaves_out(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 6})
    text = (root / "snapshots/000001.json").read_text()
    assert text.count('"train"') == 2
    (root / "snapshots/000001.json").write_text(text.replace('"train","train"', '"train","validation"'))
    _flip(root / "64x64-5.safetensors", 4096)
    config = run_config(model_folder, root, tmp_path / "run", steps=1)
    run = build_run(config, model_of(config), ALONE)
    result = make_scorer(config, model_of(config), ALONE, run.parts.denoiser, run.prepared).validate()
    assert result.num_images == 0
    assert "validation leaves out 64x64-5.safetensors: row 0: checksum mismatch in the latents" in caplog.text
