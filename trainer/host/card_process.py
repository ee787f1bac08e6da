"""A small process that reads the cards: a call into the driver can hang for ever, and must not take the command along.

It prints one `Reading` a line and ends with the process that reads it. Where `SDXL_TRAIN_FAKE_CARDS` names a JSON file,
that file stands for the driver: `{"cards": [{"uuid": ..., ...}], "kernel_log": [lines]}`.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.host.card_readings import Card, Reading, Xid, card_from, xids_of_log

FAKE_CARDS = "SDXL_TRAIN_FAKE_CARDS"
KERNEL_LOG = "SDXL_TRAIN_KERNEL_LOG"  # another file than /dev/kmsg, for tests
_MIB = 1 << 20
_SLOWDOWNS = {
    0x1: "idle",
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "heat",
    0x40: "heat (by the hardware)",
    0x80: "the power supply's brake",
}


def uses_fake_cards() -> bool:
    """Whether a file stands for the driver."""
    return FAKE_CARDS in os.environ


class KernelLog:
    """New lines of the kernel's log, where this user may read it."""

    def __init__(self, *, from_start: bool = False) -> None:
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open(os.environ.get(KERNEL_LOG, "/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
            if not from_start:
                os.lseek(self._file, 0, os.SEEK_END)

    @property
    def is_readable(self) -> bool:
        """Whether there is anything to read from."""
        return self._file is not None

    def new_lines(self) -> list[str]:
        """What was logged since the last call."""
        lines: list[str] = []
        while self._file is not None and len(lines) < 10_000:
            try:
                record = os.read(self._file, 8192)
            except BrokenPipeError:  # records were overwritten before they were read
                continue
            except OSError:
                break
            if not record:
                break
            lines += record.decode(errors="replace").splitlines()
        return lines


class _FakeDriver:
    """The file that tests write."""

    def __init__(self, path: Path) -> None:
        self._path, self._logged = path, 0

    def read(self) -> Reading:
        record = json.loads(self._path.read_text())
        cards = tuple(card_from(each) for each in record["cards"])
        log = record.get("kernel_log", [])
        new, self._logged = log[self._logged :], len(log)
        return Reading(cards, tuple(xids_of_log(new, cards)))

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class _Driver:
    """NVML. A card that was seen once stays in the list, as a lost one when the driver does not reach it any more."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._nvml.nvmlInit()
        self._log = KernelLog()
        self._known: dict[str, Card] = {}
        self._handles: dict[str, Any] = {}
        self._events: Any = None
        self._xids: list[Xid] = []
        self._find()
        if not self._log.is_readable:
            with suppress(self._nvml.NVMLError):
                self._events = self._nvml.nvmlEventSetCreate()
                for handle in self._handles.values():
                    self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, self._events)

    def _find(self) -> None:
        for index in range(self._nvml.nvmlDeviceGetCount()):
            with suppress(self._nvml.NVMLError):  # one that is gone has no handle
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = text_of(self._nvml.nvmlDeviceGetUUID(handle))
                self._handles[uuid] = handle
                name = text_of(self._nvml.nvmlDeviceGetName(handle))
                self._known[uuid] = Card(uuid, name, text_of(self._nvml.nvmlDeviceGetPciInfo(handle).busId))

    def read(self) -> Reading:
        cards = tuple(self._card(uuid, handle) for uuid, handle in self._handles.items())
        logged = xids_of_log(self._log.new_lines(), cards)
        found, self._xids = [*logged, *self._xids], []
        return Reading(cards, tuple(found))

    def _card(self, uuid: str, handle: Any) -> Card:
        nvml, known = self._nvml, self._known[uuid]
        try:
            # Asked of the card itself, so that one that is gone is noticed.
            temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        except nvml.NVMLError as error:
            gone = error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_NOT_FOUND)
            if gone:
                return Card(uuid, known.name, known.bus, lost=True)
            temperature = None
        power_mw = self._value(nvml.nvmlDeviceGetPowerUsage, handle)
        memory = self._value(nvml.nvmlDeviceGetMemoryInfo, handle)
        return Card(
            uuid,
            known.name,
            known.bus,
            temperature_c=temperature,
            slowdown_at_c=self._value(
                nvml.nvmlDeviceGetTemperatureThreshold, handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            power_w=None if power_mw is None else power_mw / 1000,
            clock_mhz=self._value(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            slowed_by=slowdowns(nvml, handle),
            pcie_generation=self._value(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            pcie_width=self._value(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            replays=self._value(nvml.nvmlDeviceGetPcieReplayCounter, handle),
            used_mib=None if memory is None else int(memory.used) // _MIB,
        )

    def _value(self, ask: Any, *arguments: Any) -> Any:
        """None where this card or driver does not tell."""
        try:
            return ask(*arguments)
        except self._nvml.NVMLError:
            return None

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._events is None:
                time.sleep(left)
                continue
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, int(left * 1000) + 1)
            except self._nvml.NVMLError as error:
                if error.value != self._nvml.NVML_ERROR_TIMEOUT:
                    self._events = None
                continue
            with suppress(self._nvml.NVMLError):
                self._xids.append(Xid(text_of(self._nvml.nvmlDeviceGetUUID(event.device)), int(event.eventData)))


def slowdowns(nvml: Any, handle: Any) -> tuple[str, ...]:
    """Why a card's clocks are lower than they could be, in words; () where it does not tell."""
    # Drivers before 535 have the function by its old name.
    for ask in (nvml.nvmlDeviceGetCurrentClocksEventReasons, nvml.nvmlDeviceGetCurrentClocksThrottleReasons):
        with suppress(nvml.NVMLError):
            reasons = ask(handle)
            return tuple(words for bit, words in _SLOWDOWNS.items() if reasons & bit)
    return ()


def text_of(value: str | bytes) -> str:
    """What the driver says; older versions of its binding give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def main() -> None:
    """Print readings: one, or with an interval in seconds as the argument one at each, until nobody reads them.

    The arguments `details N`: what `detail_process` prints of the cards from number N on.
    """
    if sys.argv[1:2] == ["details"]:
        from trainer.host.detail_process import print_details

        print_details(int(sys.argv[2]))
        return
    interval_s = float(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        fake = os.environ.get(FAKE_CARDS)
        driver = _FakeDriver(Path(fake)) if fake else _Driver()
    except Exception as error:  # no driver, no library, one of another version: whatever it is, nothing can be read
        print(Reading(None, why=str(error)).to_line(), flush=True)
        return
    while True:
        try:
            reading = driver.read()
        except Exception as error:  # whatever the driver, or half a file, says: the next reading may be a good one
            reading = Reading(None, why=str(error))
        try:
            print(reading.to_line(), flush=True)
        except BrokenPipeError:
            os._exit(0)
        if interval_s is None:
            return
        driver.wait(interval_s)
