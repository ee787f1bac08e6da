import subprocess
import sys

import pytest

from trainer.errors import UserError
from trainer.measure.run_arithmetic import RunArithmetic, format_duration, run_arithmetic


def arithmetic(**changes: object) -> RunArithmetic:
    settings: dict = {
        "workers": 4,
        "batch_size_per_gpu": 2,
        "gradient_accumulation_steps": None,
        "global_batch_size": None,
        "rows_per_bucket": [40, 21, 17, 9, 9, 4, 3],
        "steps": 600,
        "epochs": None,
        "checkpoint_every_steps": 250,
    }
    return run_arithmetic(**(settings | changes))


def test_numbers_of_a_small_run() -> None:
    run = arithmetic()
    assert (run.images_per_step, run.accumulation, run.slots_per_step) == (8, 1, 8)
    assert run.images_per_epoch == 103
    assert run.steps_per_epoch == 5 + 3 + 3 + 2 + 2 + 1 + 1
    assert run.padded_share == pytest.approx(1 - 103 / (17 * 8))
    assert run.epochs == pytest.approx(600 / 17)
    assert run.total_images == round(600 * 103 / 17)


def test_the_lines_at_start() -> None:
    assert arithmetic().describe() == [
        "4 workers x 2 images x 1 accumulation = 8 images per step",
        "103 training images in 7 buckets -> 17 steps per epoch (24 % of slots padded: buckets with few images)",
        "600 steps = 35.3 epochs = about 3,635 images; ends at step 600",
        "checkpoints every 250 steps, at the end",
    ]


def test_a_run_that_has_gone_further_than_it_is_told_to() -> None:
    lines = arithmetic().describe(start_step=700)
    assert lines[2] == "already trained to step 700; the run ends at step 600 (train.steps)"


def test_the_lines_of_a_large_run_that_goes_on() -> None:
    run = arithmetic(
        batch_size_per_gpu=4,
        global_batch_size=512,
        rows_per_bucket=[12_446_670 - 512 * 1000, 512 * 1000, 0],
        steps=None,
        epochs=1,
        checkpoint_every_steps=None,
        checkpoint_every="15min",
    )
    assert run.describe(start_step=20_000, seconds_per_step=160.0) == [
        "4 workers x 4 images x 32 accumulation = 512 images per step",
        "12,446,670 training images in 2 buckets -> 24,310 steps per epoch (under 1 % of slots padded)",
        "24,310 steps = 1 epoch = 12,446,670 images; ends at step 24,310,"
        " goes on after step 20,000, 4,310 steps to go, 8 d 0 h left",
        "checkpoints every 15min, at the end",
    ]


def test_buckets_with_larger_batches() -> None:
    """40 + 21 images in steps of 8, 17 in steps of 16, 9 + 9 in steps of 32."""
    run = arithmetic(rows_per_bucket=[40, 21, 17, 9, 9], batch_factors=[1, 1, 2, 4, 4], steps=None, epochs=2)
    assert run.steps_per_epoch == 5 + 3 + 2 + 1 + 1 and run.total_steps == 24
    assert run.padded_share == pytest.approx(1 - 96 / (5 * 8 + 3 * 8 + 2 * 16 + 32 + 32))
    step, epoch, length, _ = run.describe()
    assert step.endswith("= 8 images per step; up to 4 times as many in buckets of small images")
    assert (
        epoch == "96 training images in 5 buckets -> 12 steps per epoch (40 % of slots padded: buckets with few images)"
    )
    assert length == "24 steps = 2 epochs = 192 images; ends at step 24"


def test_a_global_batch_that_the_workers_do_not_divide() -> None:
    run = arithmetic(workers=3, global_batch_size=8, rows_per_bucket=[16], steps=None, epochs=5)
    assert (run.accumulation, run.slots_per_step, run.images_per_step, run.total_steps) == (2, 12, 8, 10)
    assert run.padded_share == pytest.approx(1 / 3)
    step, epoch, length, _ = run.describe()
    assert step == (
        "3 workers x 2 images x 2 accumulation = 12 slots for 8 images per step (no multiple of 6: the rest is padding)"
    )
    assert epoch == "16 training images in 1 bucket -> 2 steps per epoch (33 % of slots padded)"
    assert length == "10 steps = 5 epochs = 80 images; ends at step 10"


def test_the_images_seen_do_not_hang_on_how_a_batch_is_cut() -> None:
    cuts = [(4, 2, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
    runs = [arithmetic(workers=w, batch_size_per_gpu=m, gradient_accumulation_steps=a) for w, m, a in cuts]
    assert {(run.images_per_step, run.steps_per_epoch, run.total_images) for run in runs} == {(8, 17, 3635)}


def test_no_images_and_a_wrong_accumulation_are_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="no training image"):
        arithmetic(rows_per_bucket=[0, 0])
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=3: .*global_batch_size=16 .* needs 2"):
        arithmetic(gradient_accumulation_steps=3, global_batch_size=16)
    with pytest.raises(ValueError, match="exactly one"):
        arithmetic(epochs=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (185, "3 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (172_799, "2 d 0 h"),
        (980_000, "11 d 8 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_it_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, trainer.measure.run_arithmetic; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
