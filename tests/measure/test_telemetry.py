import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.measure.telemetry import METRICS_FILE, TENSORBOARD_DIR, MetricsWriter, StepMetrics, read_metrics

STEP = StepMetrics(
    step=1,
    epoch=0.5,
    loss=0.75,
    lr=1e-4,
    grad_norm=2.0,
    images=8,
    images_seen=8,
    data_wait_s=0.25,
    step_s=2.0,
)


def write_steps(run_dir: Path, resume_step: int | None, last_step: int, loss: float) -> None:
    with MetricsWriter(run_dir, resume_step) as writer:
        for step in range((resume_step or 0) + 1, last_step + 1):
            writer.step(replace(STEP, step=step, loss=loss, images_seen=8 * step))


def steps_and_losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run_dir)]


def test_a_record_has_stable_keys_and_is_there_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", None) as writer:
        writer.step(STEP)
        writer.validation(1, 0.5, {100: 0.75, 900: 0.25})
        lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    train, validation = map(json.loads, lines)
    keys = "kind step epoch loss lr grad_norm images_per_s data_wait_s step_s images_seen time"
    assert list(train) == keys.split()
    assert (train["kind"], train["images_per_s"], train["lr"], train["images_seen"]) == ("train", 4.0, 1e-4, 8)
    assert list(validation) == ["kind", "step", "loss", "loss_t100", "loss_t900", "time"]
    assert read_metrics(tmp_path / "run") == [train, validation]


def test_rates_that_one_number_does_not_tell_have_records_of_their_own(tmp_path: Path) -> None:
    parts = {"unet": 1e-4, "text_encoder_1": 5e-5}
    with MetricsWriter(tmp_path, None) as writer:
        writer.step(replace(STEP, part_lrs={"unet": 1e-4}))
        writer.step(replace(STEP, step=2, part_lrs=parts))
        writer.step(replace(STEP, step=3, lr=0.5, found_lr=4e-5))
    one, several, found = read_metrics(tmp_path)
    assert not [key for key in one if key.startswith("lr/")] and "d" not in one
    assert {f"lr/{part}": several[f"lr/{part}"] for part in parts} == {f"lr/{part}": lr for part, lr in parts.items()}
    assert (found["lr"], found["d"], found["effective_lr"]) == (0.5, 4e-5, 2e-5)


def test_a_value_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, None) as writer:
        writer.step(replace(STEP, loss=math.nan, grad_norm=math.inf))
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()
    assert read_metrics(tmp_path)[0]["loss"] is None


def test_resume_removes_the_steps_that_are_done_again(tmp_path: Path) -> None:
    write_steps(tmp_path, None, 5, loss=1.0)
    write_steps(tmp_path, 3, 4, loss=2.0)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [METRICS_FILE]


def test_resume_at_the_end_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    write_steps(tmp_path, None, 3, loss=1.0)
    before = (tmp_path / METRICS_FILE).stat()
    write_steps(tmp_path, 3, 3, loss=2.0)
    after = (tmp_path / METRICS_FILE).stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_a_fresh_start_removes_all_records(tmp_path: Path) -> None:
    write_steps(tmp_path, None, 3, loss=1.0)
    write_steps(tmp_path, None, 1, loss=2.0)
    assert steps_and_losses(tmp_path) == [(1, 2.0)]


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind": "train", "step": 3}', "\0" * 40, "[1]\n"])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path, tail: str, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(tmp_path, None, 2, loss=1.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(tail)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0)]
    assert "1 unreadable line" in caplog.text
    write_steps(tmp_path, 2, 3, loss=2.0)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_run_without_the_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tensorboard_shows_the_same_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    write_steps(tmp_path, None, 5, loss=1.0)
    write_steps(tmp_path, 3, 4, loss=2.0)
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == steps_and_losses(tmp_path)
    assert "train/images_per_s" in events.Tags()["scalars"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_costs_records_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written to /dev/full fails with ENOSPC; when there is room again, records come again."""
    with MetricsWriter(tmp_path, None) as writer:
        writer.step(STEP)
        writer._file.close()
        writer._file = Path("/dev/full").open("a")  # noqa: SIM115 - the writer closes it
        for step in range(2, 60):
            writer.step(replace(STEP, step=step))
    steps = [step for step, _ in steps_and_losses(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 59 and len(steps) == 59 - 51
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "metrics.jsonl: not written ([Errno 28] No space left on device), 1 records by now; training goes on"
    ]
    assert "Traceback" not in capsys.readouterr().err
