"""Trackers beside a run: real libraries, real processes, and what they do when something fails."""

import csv
import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.measure.telemetry import METRICS_FILE, MetricsWriter, StepMetrics, read_metrics
from trainer.measure.trackers.beside import TrackerBeside
from trainer.measure.trackers.tracked_run import TrackedRun, read_mark, require_packages

pytestmark = pytest.mark.e2e
STEP = StepMetrics(
    step=1, epoch=0.5, loss=0.75, lr=1e-4, grad_norm=2.0, images=8, images_seen=8, data_wait_s=0.25, step_s=2.0
)


def write_steps(run_dir: Path, kind: str, resume: int | None, last: int, loss: float, **options: Any) -> None:
    run = TrackedRun(kind, run_dir, "fox", options, {"train": {"steps": 9}, "optimizer": {"lr": 1e-4}})
    with MetricsWriter(run_dir, resume, tensorboard=False, trackers=[run]) as writer:
        for step in range((resume or 0) + 1, last + 1):
            parts = {"unet": 1e-4, "text_encoder_1": 1e-5}
            writer.step(replace(STEP, step=step, loss=loss + step, part_lrs=parts, block_norms={"unet.mid": 1.0}))
            if step == 3:
                writer.validation(step, loss, {100: 0.5})


def curve(run_dir: Path, kind: str = "train") -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run_dir) if record["kind"] == kind]


def three_starts(run_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A start, one that does steps again, and one that goes on where the last ended; each with time for a busy machine,
    on which to import a library alone may take longer than the end of a run waits."""
    monkeypatch.setattr(TrackerBeside, "END_S", 300.0)
    monkeypatch.setattr(TrackerBeside, "ANSWER_S", 300.0)
    write_steps(run_dir, kind, None, 6, 1.0, **options)
    write_steps(run_dir, kind, 4, 7, 2.0, **options)
    write_steps(run_dir, kind, 7, 9, 3.0, **options)


def test_a_table_has_the_rows_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_starts(tmp_path, "csv", monkeypatch)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows if row["kind"] == "train"] == curve(tmp_path)
    assert [row["loss_t100"] for row in rows if row["kind"] == "validation"] == ["0.5"]
    assert not caplog.records
    assert list((tmp_path / "logs").iterdir()) == [tmp_path / "logs/tracker-csv.log"]


def test_mlflow_has_one_run_with_one_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    three_starts(tmp_path, "mlflow", monkeypatch, experiment="foxes")
    assert not caplog.records, (tmp_path / "logs/tracker-mlflow.log").read_text()
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # of this process, which only reads
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("foxes")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "fox" and run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "9", "optimizer.lr": "0.0001"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == curve(tmp_path)
    history = client.get_metric_history(run.info.run_id, "train/lr.unet")
    assert [metric.step for metric in history] == [step for step, _ in curve(tmp_path)]
    assert read_mark(tmp_path, "mlflow").id == run.info.run_id


def wandb_history(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run and its rows in a file that offline mode wrote, which `wandb sync` uploads."""
    from wandb.proto import wandb_internal_pb2 as records

    (file,) = folder.glob("*.wandb")
    run: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for data in log_records(file.read_bytes()):
        record = records.Record.FromString(data)
        if record.HasField("run"):
            run = {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
            run["settings"] = {item.key: json.loads(item.value_json) for item in record.run.config.update
                               if item.key in ("train", "optimizer")}  # fmt: skip
        if record.HasField("history"):
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item})  # fmt: skip
    return run, rows


def log_records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format behind a head of 7 bytes: blocks of 32 KiB, records cut into parts with 7 bytes each."""
    at, begun = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        chunk = data[at + 7 : at + 7 + length]
        at += 7 + length
        begun = chunk if part in (1, 2) else begun + chunk
        if part in (1, 4):
            yield begun


def test_wandb_offline_holds_one_run_with_one_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    three_starts(tmp_path, "wandb", monkeypatch, project="foxes", mode="offline")
    assert not caplog.records, (tmp_path / "logs/tracker-wandb.log").read_text()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run, rows = wandb_history(folder)
    mark = read_mark(tmp_path, "wandb")
    assert run.pop("settings") == {"train": {"steps": 9}, "optimizer": {"lr": 1e-4}}
    assert run == {"id": mark.id, "name": "fox", "project": "foxes"} and folder.name.endswith(mark.id)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == curve(tmp_path)
    assert [row["validation/loss"] for row in rows if "validation/loss" in row] == [1.0]
    assert mark.records == len(read_metrics(tmp_path)) == 10


def test_a_tracker_that_is_ended_while_it_opens_leaves_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of a short run on a slow machine: the next start goes on with the run that was begun."""
    pytest.importorskip("wandb")
    from trainer.measure.trackers import wandb_run

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    run = TrackedRun("wandb", tmp_path, "fox", {"project": "foxes", "mode": "offline"}, {})
    (tmp_path / "trackers").mkdir()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(wandb_run, "WandbRun", ended)  # behind wandb.init
        wandb_run.open_wandb(run, read_mark(tmp_path, "wandb"))
    import wandb

    assert wandb.run is not None
    begun = wandb.run.id
    wandb.finish()
    assert read_mark(tmp_path, "wandb").id == begun
    three_starts(tmp_path, "wandb", monkeypatch, project="foxes", mode="offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(begun) and read_mark(tmp_path, "wandb").id == begun


def test_a_server_of_mlflow_has_one_run_with_one_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one over SQLite; of the run whose steps were done again, what is left lies in its bin."""
    for package in ("mlflow", "flask", "sqlalchemy"):  # the server needs all of `mlflow`
        pytest.importorskip(package)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/store.db",
        "--artifacts-destination",
        str(tmp_path / "art"),
    ]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(
        command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
    ) as server:  # fmt: skip
        try:
            wait_until(lambda: answers(port), tries=6000)
            uri = f"http://127.0.0.1:{port}"
            three_starts(tmp_path, "mlflow", monkeypatch, experiment="foxes", uri=uri)
            assert not caplog.records, (tmp_path / "logs/tracker-mlflow.log").read_text()
            from mlflow.tracking import MlflowClient

            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name("foxes")
            assert experiment is not None
            (run,) = client.search_runs([experiment.experiment_id])
            assert run.data.params == {"train.steps": "9", "optimizer.lr": "0.0001"}
            history = client.get_metric_history(run.info.run_id, "train/loss")
            assert sorted((metric.step, metric.value) for metric in history) == curve(tmp_path)
            assert (run.info.run_name, run.info.status) == ("fox", "FINISHED")
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as response:
        return response.status == 200
    return False


def test_wandb_that_cannot_be_reached_is_a_warning_without_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "deadbeef")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(TrackerBeside, "END_S", 4.0)
    write_steps(tmp_path, "wandb", None, 3, 1.0, project="foxes", mode="online")
    (line,) = {record.getMessage() for record in caplog.records}
    assert line.startswith("wandb: ") and "training goes on, the rest is shown by the next start" in line
    for file in tmp_path.rglob("*.log"):
        assert "deadbeef" not in file.read_text(errors="replace")
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3]


def test_a_tracker_that_fails_is_told_counted_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands where the table is to be; when it has gone, all that was missed is there."""
    monkeypatch.setattr(TrackerBeside, "PAUSE_S", 0.5)
    (tmp_path / "metrics.csv").mkdir()
    run = TrackedRun("csv", tmp_path, "fox", {}, {})
    with MetricsWriter(tmp_path, None, tensorboard=False, trackers=[run]) as writer:
        writer.step(STEP)
        wait_until(lambda: len(caplog.records) >= 2)
        (tmp_path / "metrics.csv").rmdir()
        wait_until((tmp_path / "metrics.csv").is_file)
        writer.step(replace(STEP, step=2))
    first, second = (record.getMessage() for record in caplog.records[:2])
    assert first.startswith("csv: [Errno 21] Is a directory") and "1 time by now; training goes on" in first
    assert "2 times by now" in second
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_tracker_that_hangs_stalls_neither_steps_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO stands where the table is to be: who opens it waits for ever."""
    monkeypatch.setattr(TrackerBeside, "PAUSE_S", 0.2)
    monkeypatch.setattr(TrackerBeside, "ANSWER_S", 1.5)
    monkeypatch.setattr(TrackerBeside, "END_S", 1.0)
    os.mkfifo(tmp_path / "metrics.csv.partial")
    run = TrackedRun("csv", tmp_path, "fox", {}, {})
    with MetricsWriter(tmp_path, None, tensorboard=False, trackers=[run]) as writer:
        longest = 0.0
        for step in range(1, 500):
            begin = time.thread_time()
            writer.step(replace(STEP, step=step))
            longest = max(longest, time.thread_time() - begin)
        wait_until(lambda: len(caplog.records) >= 2)
        begin = time.monotonic()
    assert time.monotonic() - begin < 15 and longest < 0.5
    assert "csv: has not answered for 2 s, 1 time by now" in caplog.text
    assert len(read_metrics(tmp_path)) == 499


def test_a_server_that_never_answers_stalls_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(TrackerBeside, "END_S", 4.0)
    with silent_server() as port:
        begin = time.monotonic()
        write_steps(tmp_path, "mlflow", None, 3, 1.0, uri=f"http://127.0.0.1:{port}")
        assert time.monotonic() - begin < 20
    (record,) = caplog.records
    assert "mlflow: has not taken all records within 4 s of the end" in record.getMessage()


@contextmanager
def silent_server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


def wait_until(holds: Any, tries: int = 1200) -> None:
    for _ in range(tries):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_a_missing_package_is_one_line_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(["tensorboard", "csv"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError) as told:
        require_packages(["wandb", "csv", "mlflow"])
    assert told.value.lines == (
        "log.trackers: wandb: its package is missing; `pip install wandb`, or leave it out",
        "log.trackers: mlflow: its package is missing; `pip install mlflow-skinny`, or leave it out",
    )


def test_records_of_every_kind_reach_a_tracker_by_their_names() -> None:
    from trainer.measure.trackers.tracked_run import values_of

    record = {"kind": "train", "step": 3, "time": 1.0, "loss": None, "lr": 0.5, "grad_norm/unet": 2.0}
    assert values_of(record) == {"train/lr": 0.5, "train/grad_norm/unet": 2.0}
    assert not math.isnan(sum(values_of(record).values()))


@pytest.fixture(autouse=True)
def _warnings_alone(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING)
    yield


def test_the_file_of_records_is_what_it_always_was(tmp_path: Path) -> None:
    write_steps(tmp_path, "csv", None, 2, 1.0)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
