"""The watch with real processes: the one that reads cards from a file, and a worker that holds memory."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.host.bundle import write_bundle
from trainer.host.card_choice import CardsInUse
from trainer.host.card_readings import Card
from trainer.host.cards import CardReader, read_cards
from trainer.host.memory_growth import RecycleRule
from trainer.host.watch import RECORD, HostWatch, HostWish, WatchSettings
from trainer.report.followed_run import FollowedRun
from trainer.report.run_series import METRICS

UUIDS = ("GPU-a", "GPU-b")
LONG_S = 60.0


@pytest.fixture
def cards_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cards.json"
    write_cards(path, *[{"uuid": uuid, "bus": f"0000:0{n}:00.0"} for n, uuid in enumerate(UUIDS)])
    monkeypatch.setenv("SDXL_TRAIN_FAKE_CARDS", str(path))
    return path


def write_cards(path: Path, *cards: dict[str, object], log: tuple[str, ...] = ()) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"cards": cards, "kernel_log": log}))
    new.replace(path)


@contextmanager
def watching(folder: Path, rule: RecycleRule, told: list[str]) -> Iterator[HostWatch]:
    settings = WatchSettings(
        folder=folder,
        every_s=0.05,
        hot_c=85,
        rule=rule,
        newest_checkpoint=lambda: None,
        fewer_cards=True,
        reads_cards=True,
        settled_after_steps=10,
    )
    with HostWatch(settings, told.append) as watch:
        watch.begin(CardsInUse(tuple(Card(uuid) for uuid in UUIDS)))
        yield watch


def wish_of(watch: HostWatch, process_ids: list[int], steps: int) -> HostWish:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        if wish := watch.look(process_ids, steps):
            return wish
        time.sleep(0.01)
    raise AssertionError("nothing was wished for")


def test_a_lost_card_is_noticed_while_workers_run(tmp_path: Path, cards_file: Path) -> None:
    told: list[str] = []
    with watching(tmp_path, RecycleRule(0, 0), told) as watch:
        while not (watch._reader and watch._reader.latest().cards):
            time.sleep(0.01)
        assert watch.look([os.getpid()], 0) is None
        while not (tmp_path / RECORD).exists():
            time.sleep(0.01)
        write_cards(cards_file, {"uuid": "GPU-a"}, {"uuid": "GPU-b", "lost": True})
        assert wish_of(watch, [os.getpid()], 0) == HostWish(
            "the card of worker 1 (GPU-b) is gone from the bus", "GPU-b"
        )
        watch.begin(CardsInUse((Card("GPU-a"),)))
        time.sleep(0.3)
        assert watch.look([os.getpid()], 0) is None
    record = json.loads((tmp_path / RECORD).read_text().splitlines()[0])
    assert record["memory_available_mib"] > 0 and record["cards"][0]["uuid"] == "GPU-a"
    assert not told


def test_power_clock_temperature_and_link_of_each_card_are_recorded(tmp_path: Path, cards_file: Path) -> None:
    """And reach the page of the run, by card."""
    each = [
        {
            "power_w": 341.5 + n,
            "clock_mhz": 1695 - n,
            "temperature_c": 71 + n,
            "pcie_generation": 4 - n,
            "pcie_width": 16,
        }
        for n in range(2)
    ]
    write_cards(cards_file, *({"uuid": uuid, **numbers} for uuid, numbers in zip(UUIDS, each, strict=True)))
    with watching(tmp_path, RecycleRule(0, 0), []) as watch:
        while not (watch._reader and watch._reader.latest().cards):
            time.sleep(0.01)
        assert watch.look([os.getpid()], 0) is None
        while not (tmp_path / RECORD).exists():
            time.sleep(0.01)
    (tmp_path / METRICS).write_text("")
    shown = FollowedRun(tmp_path).facts()["host"]["curves"]
    for n, numbers in enumerate(each):
        assert {key: shown[f"cards.{n}.{key}"]["y"] for key in numbers} == {key: [n] for key, n in numbers.items()}


def test_an_xid_is_told_and_kept_for_the_choice_of_cards(tmp_path: Path, cards_file: Path) -> None:
    told: list[str] = []
    with watching(tmp_path, RecycleRule(0, 0), told) as watch:
        cards = [{"uuid": uuid, "bus": f"0000:0{n}:00.0"} for n, uuid in enumerate(UUIDS)]
        log = ("NVRM: Xid (PCI:0000:01:00): 31, pid=1", "NVRM: Xid (PCI:0000:00:00): 94, pid=1")
        write_cards(cards_file, *cards, log=log)
        assert wish_of(watch, [os.getpid()], 0).uuid == "GPU-a"
        assert told == [
            "the card of worker 1 (GPU-b) has reported XID 31 (a wrong address in a kernel)",
            "the card of worker 0 (GPU-a) has reported XID 94 (its memory has an error that ECC could not correct, "
            "contained)",
        ]
        xids, noisy = watch.since_last_choice()
        assert [(xid.uuid, xid.number) for xid in xids] == [("GPU-b", 31), ("GPU-a", 94)] and not noisy
        assert watch.since_last_choice() == ([], [])


def test_a_worker_that_grows_is_to_start_anew(tmp_path: Path) -> None:
    code = "held = []\nwhile True: input(); held.append(b'1' * (30 << 20)); print(flush=True)"
    told: list[str] = []
    with (
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process,
        watching(tmp_path, RecycleRule(50 << 20, 0), told) as watch,
    ):
        assert process.stdin and process.stdout
        assert watch.look([process.pid], 10) is None
        time.sleep(0.5)
        assert watch.look([process.pid], 20) is None
        for _ in range(2):
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        wish = wish_of(watch, [process.pid], 30)
        assert re.fullmatch(r"worker 0 has grown by \d+ MiB", wish.text) and not wish.uuid and not told
        process.kill()


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it to read waits until somebody writes
    monkeypatch.setenv("SDXL_TRAIN_FAKE_CARDS", str(pipe))
    begin = time.monotonic()
    assert read_cards(timeout_s=1.0) is None
    with CardReader(0.1) as reader:
        time.sleep(0.5)
        assert reader.latest().cards is None and reader.silent_s() >= 0.5
    assert time.monotonic() - begin < 10


def test_what_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_TRAIN_FAKE_CARDS", str(tmp_path / "none"))
    reading = read_cards()
    assert reading is not None and reading.cards is None and "none" in reading.why
    monkeypatch.delenv("SDXL_TRAIN_FAKE_CARDS")
    assert read_cards() is not None  # with a driver or without one


def test_what_is_left_of_a_run_that_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hf_abcdef")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-1.log").write_text("a line\n" * 100_000 + "the end\n")
    (logs / "rank-1.stacks.txt").write_text("Thread 0x1 (most recent call first)")
    (logs / "flight-record-rank-1").write_bytes(b"123")
    (tmp_path / "config.resolved.yaml").write_text("run: {}\n")
    (tmp_path / "events.txt").write_text("it failed\n")
    folder = write_bundle(tmp_path, logs, {"failure": {"rank": 1}})
    assert folder is not None and folder.name.startswith("failure-")
    log = (folder / "rank-1.log").read_text()
    assert log.endswith("the end\n") and log.startswith("a line\n") and len(log) < 300_000
    names = {file.name for file in folder.iterdir()} - {"kernel.log"}
    assert names == {"README.txt", "summary.json", "rank-1.log", "rank-1.stacks.txt", "flight-record-rank-1",
                     "config.resolved.yaml", "events.txt"}  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["failure"] == {"rank": 1} and summary["versions"]["torch"]
    assert all("hf_abcdef" not in file.read_text(errors="replace") for file in folder.iterdir())
    assert write_bundle(Path("/proc/none"), logs, {}) is None
