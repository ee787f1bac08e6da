"""NVIDIA's own binding against a library that answers as the driver's does, compiled here."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.host.card_details import CardDetail, Holder, read_card_details
from trainer.host.card_process import FAKE_CARDS, KERNEL_LOG
from trainer.host.card_readings import Card, Reading, Xid
from trainer.host.cards import CardReader, read_cards

CARD = Card(
    "GPU-1",
    "RTX 3090",
    "00000000:02:00.0",
    temperature_c=71,
    slowdown_at_c=95,
    power_w=312.5,
    clock_mhz=1695,
    slowed_by=("its power limit", "heat (by the hardware)"),
    pcie_generation=4,
    pcie_width=8,
    used_mib=1024,
)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files `lost`, `hangs` and `xid` say what happens to the two cards."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    library, source = tmp_path / "libnvidia-ml.so.1", Path(__file__).parent / "nvml_stand_in.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_LOST", str(tmp_path / "lost"))
    monkeypatch.setenv("STAND_IN_HANGS", str(tmp_path / "hangs"))
    monkeypatch.setenv("STAND_IN_XID", str(tmp_path / "xid"))
    monkeypatch.delenv(FAKE_CARDS, raising=False)
    return tmp_path


def test_what_a_card_tells_and_does_not_tell(driver: Path) -> None:
    reading = read_cards()
    assert reading is not None and reading.cards is not None, reading
    assert [card.uuid for card in reading.cards] == ["GPU-0", "GPU-1"] and reading.cards[1] == CARD
    (driver / "lost").write_text("0")
    reading = read_cards()
    assert reading is not None and reading.cards == (CARD,)  # one that is gone has no handle


def until(reader: CardReader, holds: Callable[[Reading], bool]) -> Reading:
    """The first reading of which something holds."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if holds(reading := reader.latest()):
            return reading
        time.sleep(0.01)
    raise AssertionError(f"it was never so: {reading}")


def test_a_card_that_is_lost_while_it_is_read(driver: Path) -> None:
    with CardReader(0.05) as reader:
        until(reader, lambda reading: reading.cards is not None)
        (driver / "lost").write_text("1")
        cards = until(reader, lambda reading: any(card.lost for card in reading.cards or ())).cards
    assert cards is not None and not cards[0].lost
    assert cards[1] == Card("GPU-1", "RTX 3090", "00000000:02:00.0", lost=True)


def test_xids_come_from_the_kernels_log_or_else_from_the_driver(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = driver / "kernel.log"
    monkeypatch.setenv(KERNEL_LOG, str(log))
    (driver / "xid").write_text("119")
    with CardReader(0.05) as reader:  # no log that can be read
        assert until(reader, lambda reading: bool(reading.xids)).xids == (Xid("GPU-0", 119),)
    log.write_text("NVRM: Xid (PCI:0000:01:00): 48, pid=1, one of before\n")
    with CardReader(0.05) as reader:
        until(reader, lambda reading: reading.cards is not None)
        with log.open("a") as file:
            file.write("4,1;NVRM: Xid (PCI:0000:02:00): 79, pid=7, GPU has fallen off the bus.\n")
        assert until(reader, lambda reading: bool(reading.xids)).xids == (Xid("GPU-1", 79),)


def test_details_of_cards_and_which_of_them_hangs(driver: Path) -> None:
    details = read_card_details()
    assert (details.driver, details.cuda, details.hung, details.missing) == ("580.95.05", (13, 1), (), 0)
    first, second = details.cards
    assert second == CardDetail(
        "GPU-1",
        "RTX 3090",
        "00000000:02:00.0",
        number=1,
        capability=(8, 6),
        memory_total=24 << 30,
        memory_free=23 << 30,
        power_limit_w=235.0,
        default_limit_w=350.0,
        clock_mhz=1695,
        max_clock_mhz=2100,
        generation=4,
        width=8,
        max_generation=4,
        max_width=16,
        slowed_by=("its power limit", "heat (by the hardware)"),
        peers={"GPU-0": "the cards do not support it"},
    )
    command = (Path("/proc") / str(os.getpid()) / "comm").read_text().strip()
    assert first.holders == (Holder(os.getpid(), command, 512 << 20),)
    (driver / "hangs").write_text("0")
    details = read_card_details(answer_s=2.0)
    assert details.hung == ("card 0 (RTX 3090, GPU-0)",) and details.cards == (second,) and not details.is_silent
    (driver / "hangs").write_text("-1")
    (driver / "lost").write_text("1")
    details = read_card_details()
    assert details.missing == 1 and [card.uuid for card in details.cards] == ["GPU-0"]
