"""The table of a bench, its best row, and what `plan` reads of it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.measure.bench_report import BenchReport, BenchRow, row_from_json
from trainer.memory.report import measured_speed

ROW = BenchRow(
    strategy="zero2",
    batch_size=2,
    compiled=False,
    workers=4,
    accumulation=1,
    bucket=(1024, 1024),
    images_per_s=4.0,
    step_s=2.0,
    split={"forward": 0.5, "backward": 1.25, "optimizer": 0.25},
    exposed_s=0.125,
    exposed_how="by the profiler",
    flops_per_image=(20 * 10**12, 5 * 10**12),
    peak_flops=71e12,
    peak_source="NVIDIA's figure for RTX 3090, dense",
    planned_bytes=20 * 2**30,
    measured_bytes=21 * 2**30,
    recomputed="13 of 57",
)
REPORT = BenchReport(
    device="RTX 3090",
    precision="bf16",
    time="2026-01-01T00:00:00+00:00",
    versions={"torch": "2.13"},
    rows=(
        ROW,
        replace(ROW, batch_size=4, images_per_s=5.0),
        replace(ROW, strategy="ddp", images_per_s=3.0),
        BenchRow("ddp", 4, False, 4, 0, (0, 0), error="out of memory: a step did not fit"),
    ),
)


def test_mfu_leaves_recomputation_out() -> None:
    assert ROW.mfu == pytest.approx(4.0 * 20 / (4 * 71))


def test_the_best_row_is_marked_and_written_out_as_configuration() -> None:
    lines = REPORT.describe()
    assert [line for line in lines if line.startswith("*")] == [
        next(line for line in lines if "zero2, batch 4" in line)
    ]
    assert "    batch_size_per_gpu: 4" in lines and "    strategy: zero2" in lines
    row = next(line for line in lines if "zero2, batch 2" in line).split()
    assert row[3:] == [
        "4.00",
        "2.000",
        "-",
        "0.500",
        "1.250",
        "0.250",
        "0.125",
        "28.2%",
        "20.00",
        "21.00",
        "13",
        "of",
        "57",
    ]
    assert any(line.endswith("out of memory: a step did not fit") for line in lines)


def test_nothing_measured() -> None:
    report = replace(REPORT, rows=REPORT.rows[-1:])
    assert report.best is None and report.describe()[-1] == "nothing could be measured"


@pytest.mark.parametrize(
    ("way", "speed"),
    [(("zero2", 2, False), 4.0), (("ddp", 2, False), 3.0), (("ddp", 2, True), None), (("ddp", 4, False), None)],
)
def test_the_plan_counts_with_the_speed_of_what_it_chose(
    tmp_path: Path, way: tuple[str, int, bool], speed: float | None
) -> None:
    assert measured_speed(tmp_path, *way) is None
    REPORT.write(tmp_path / "bench.json")
    assert measured_speed(tmp_path, *way) == speed


def test_the_plan_counts_with_the_buckets_of_the_run(tmp_path: Path) -> None:
    small, large = (replace(ROW, strategy="ddp", bucket_mib=mib, images_per_s=mib / 4) for mib in (16.0, 64.0))
    report = replace(REPORT, rows=(small, large))
    report.write(tmp_path / "bench.json")
    found = [measured_speed(tmp_path, "ddp", 2, False, mib) for mib in (16.0, 64.0, None)]
    assert found == [4.0, 16.0, 4.0]  # and with others where these were not measured
    lines = report.describe()
    assert "  exchange:" in lines and "    bucket_mib: 64" in lines
    assert any("ddp, batch 2, buckets of 16 MiB" in line for line in lines)


def test_a_row_comes_back_from_json() -> None:
    assert row_from_json(asdict(ROW) | {"bucket": [1024, 1024], "mfu": 0.3}) == ROW
