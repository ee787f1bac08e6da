"""The rows of benchmarks/gpu.py, without a GPU: what a failure leaves, what a row tells, which settings are tried."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_proof, gpu_rows

ROW: dict[str, Any] = {
    "bucket": [1024, 768],
    "images_per_s": 0.5,
    "step_s": 2.0,
    "split": {"forward": 0.5, "backward": 1.25, "optimizer": 0.25},
    "exposed_s": None,
    "mfu": None,
    "planned_bytes": None,
    "measured_bytes": 2**30,
    "reserved_bytes": 2**31,
    "recomputed": "0 of 57",
    "notes": ["what was planned first did not fit", "some gradients were not finite"],
}


def bench_on(device: str) -> gpu.Bench:
    return gpu.Bench(Path(), False, Path(), Path(), "1,2,4", 10, device)


def test_a_section_that_fails_keeps_its_rows_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(bench: gpu.Bench) -> Iterator[tuple[str, str]]:
        yield "first", "1 | 2\nms"
        raise RuntimeError  # without a message

    def breaks_with_words(bench: gpu.Bench) -> Iterator[tuple[str, str]]:
        yield from ()
        raise LookupError("a long story\nwith its point at the end\n")

    def works(bench: gpu.Bench) -> Iterator[tuple[str, str]]:
        yield "last", "3 ms"

    docs = tmp_path / "docs.md"
    docs.write_text(f"{gpu_rows.BEGIN}\n{gpu_rows.END}\n", encoding="utf-8")
    monkeypatch.setattr(gpu, "SECTIONS", {"one": breaks, "two": breaks_with_words, "three": works})
    monkeypatch.setattr(gpu, "prepared", lambda folder, arguments, device: bench_on(device))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--docs", str(docs)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    rows = docs.read_text(encoding="utf-8").splitlines()[1:-1]
    assert capsys.readouterr().out.splitlines() == rows
    assert [row.split(" | ", 2)[2] for row in rows] == [
        "first | 1 \\| 2 ms |",
        "one | failed: RuntimeError |",
        "two | failed: LookupError: with its point at the end |",
        "last | 3 ms |",
    ]


def test_notes_are_told() -> None:
    told = gpu_rows.told(ROW, "bf16")
    assert told.startswith("0.50 img/s at 768 x 1024 px, bf16; 2.000 s a step")
    assert told.endswith(
        "; 0 of 57 blocks recomputed; what was planned first did not fit; some gradients were not finite"
    )


def test_rows_of_a_script_that_fails_come_before_its_failure() -> None:
    code = f"import sys; print({json.dumps(['what', '1 ms'])!r}, flush=True); sys.exit(3)"
    lines = gpu_rows.lines_of([sys.executable, "-c", code])
    assert json.loads(next(lines)) == ["what", "1 ms"]
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        next(lines)


def test_rows_of_a_table_are_by_column() -> None:
    table = ["loading ...", "| stage | wall | |", "|---|---|---|", "| train | 2 s | at most |", "| export | 1 s |  |"]
    assert list(gpu_rows.table_rows(table)) == [
        {"stage": "train", "wall": "2 s", "": "at most"},
        {"stage": "export", "wall": "1 s", "": ""},
    ]


def test_settings_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit moments, and weights of two bytes where the card has bf16."""
    asked: list[tuple[list[str], str | None]] = []

    def asks(
        bench: gpu.Bench, what: str, config: Path, options: list[str], batch_sizes: str | None = None
    ) -> list[Any]:
        asked.append((options, batch_sizes))
        return []

    monkeypatch.setattr(gpu, "bench_rows", asks)
    monkeypatch.setattr(gpu, "write_config", lambda bench, name, more: Path(name))
    lean = ["train.precision=bf16_stochastic", "optimizer.kind=adamw_8bit"]
    assert list(gpu.strategies(bench_on("cpu"))) == []
    assert asked[-1] == (lean, None)  # in all batch sizes
    asked.clear()
    assert list(gpu.variants(bench_on("cpu"))) == []
    assert all(options[:2] == lean and batch_sizes == "1" for options, batch_sizes in asked)
    assert [options[2] for options, _ in asked] == [
        "train.channels_last=false",
        "train.channels_last=true",
        "train.compile=blocks",
        "train.precision=bf16_kahan",
    ]
    monkeypatch.setattr(gpu, "bf16_works", lambda bench: False)
    asked.clear()
    assert list(gpu.variants(bench_on("cuda"))) == []
    assert [options[0] for options, _ in asked] == ["train.precision=fp16"] * 3


def test_exactness_says_why_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, why in (("cpu", "not measured: no GPU here"), ("cuda", "not measured: one card here")):
        ((what, measured),) = gpu.exactness(bench_on(device))
        assert what.startswith("exactness") and measured.startswith(why)


def test_the_proof_asks_for_all_tasks_in_the_order_of_their_worth() -> None:
    assert ("agreement", *gpu.FULL_SIZE_TASKS) == tuple(gpu_proof.TASKS)
