"""NVIDIA's own binding against a library that answers as the driver's does, compiled here."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
    """A folder whose files `lost` and `xid` say what happens to the two cards."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    library, source = tmp_path / "libnvidia-ml.so.1", Path(__file__).parent / "nvml_stand_in.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_LOST", str(tmp_path / "lost"))
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
