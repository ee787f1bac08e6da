"""The table of a bench of optimizers, and what `plan` takes of its file."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.measure.optimizer_bench import (
    OPTIMIZERS_FILE,
    OptimizerReport,
    OptimizerRow,
    measured_optimizers,
    optimizer_row,
)

ROW = OptimizerRow(
    kind="adamw",
    strategy="zero2",
    num_weights=1_000_000,
    alone_s=0.005,
    step_s=0.1,
    in_step_s=0.02,
    images_per_s=40.0,
    state_bytes=8_000_004,
    planned_bytes=8_000_000,
    recomputed="13 of 57",
)
REPORT = OptimizerReport(
    device="RTX 3090",
    precision="bf16_stochastic",
    strategy="auto",
    workers=4,
    batch_size=2,
    own_kind="lion",
    time="2026-01-01T00:00:00+00:00",
    versions={"torch": "2.13"},
    rows=(
        ROW,
        replace(ROW, kind="lion", alone_s=0.25, state_bytes=4_000_000, planned_bytes=4_000_000),
        OptimizerRow("prodigy", refused=True, error="trainable.unet.lr = 1: must be left out"),
        OptimizerRow("came", error="out of memory: a step did not fit"),
    ),
)


def test_the_table() -> None:
    lines = REPORT.describe()
    assert lines[1].split() == ["adamw", "0.0050", "5.00", "20.0%", "0.100", "40.00", "8.00", "8.00", "13", "of", "57"]
    assert lines[2].startswith("* lion")
    assert lines[3].split(maxsplit=1) == ["prodigy", "refused: trainable.unet.lr = 1: must be left out"]
    assert lines[4].split(maxsplit=1) == ["came", "out of memory: a step did not fit"]
    assert "  1,000,000 weights train, bf16_stochastic on RTX 3090, 4 x zero2, batch 2" in lines
    assert len({len(line) for line in lines[:3]}) == 1
    assert replace(REPORT, rows=REPORT.rows[2:]).describe()[-1] == "nothing could be measured"


def test_a_row_comes_back_from_json(tmp_path: Path) -> None:
    assert optimizer_row(asdict(ROW) | {"share": 0.2}) == ROW
    REPORT.write(tmp_path / "run" / OPTIMIZERS_FILE)
    stored = json.loads((tmp_path / "run" / OPTIMIZERS_FILE).read_text())
    assert [optimizer_row(row) for row in stored["rows"]] == list(REPORT.rows)
    assert stored["rows"][0]["alone_ns_per_weight"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("way", "seconds"),
    [
        (("bf16_stochastic", "auto", 4, 1_000_000), {"adamw": 0.005, "lion": 0.25}),
        (("fp32", "auto", 4, 1_000_000), None),
        (("bf16_stochastic", "zero3", 4, 1_000_000), None),
        (("bf16_stochastic", "auto", 2, 1_000_000), None),
        (("bf16_stochastic", "auto", 4, 999_999), None),
    ],
)
def test_the_plan_takes_what_was_measured_of_the_same_run(
    tmp_path: Path, way: tuple[str, str, int, int], seconds: dict[str, float] | None
) -> None:
    assert measured_optimizers(tmp_path, *way) is None
    REPORT.write(tmp_path / OPTIMIZERS_FILE)
    found = measured_optimizers(tmp_path, *way)
    assert (found and found.seconds) == seconds


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"precision": "bf16_stochastic"}', '{"rows": 1' + "," * 100, "[" * 100_000]
)
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / OPTIMIZERS_FILE).write_text(text)
    assert measured_optimizers(tmp_path, "bf16_stochastic", "auto", 4, 1_000_000) is None
    for rows in ([1], [{}], [{"kind": "adamw", "alone_s": "soon", "num_weights": 1}], {"a": 1}, None):
        head = {"precision": "fp32", "strategy": "auto", "workers": 1, "device": "CPU", "rows": rows}
        (tmp_path / OPTIMIZERS_FILE).write_text(json.dumps(head))
        assert measured_optimizers(tmp_path, "fp32", "auto", 1, 1) is None
