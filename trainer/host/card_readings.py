"""What a card says of itself at one moment, and what the kernel has logged of it (XIDs). Plain values."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
# By NVIDIA's catalogue of XIDs, docs.nvidia.com/deploy/xid-errors: what its "immediate action" amounts to here.
_GONE = {79}
_DAMAGED = {48, 63, 64, 94, 95}  # memory that ECC could not correct, rows to be remapped
_GSP = {62, 119, 120}  # the card's own processor has halted, or does not answer
_MEANINGS = {
    13: "a fault in a kernel",
    31: "a wrong address in a kernel",
    43: "a program's channel was stopped",
    45: "a program's channel was taken down",
    48: "its memory has an error that ECC could not correct",
    62: "its own processor has halted",
    63: "its memory has an error, and a row is remapped",
    64: "its memory has an error, and a row could not be remapped",
    79: "it has fallen off the bus",
    94: "its memory has an error that ECC could not correct, contained",
    95: "its memory has an error that ECC could not correct, not contained",
    119: "its own processor does not answer",
    120: "its own processor has failed",
}


@dataclass(frozen=True)
class Card:
    """One reading of one card; None where the driver does not tell.

    Attributes:
        bus: PCI address such as "0000:65:00.0", as the kernel's log names the card.
        lost: the driver does not reach it any more.
        slowed_by: why its clocks are lower than they could be; "idle" where it has nothing to do.
        replays: packets that the PCIe link had to repeat since the driver was loaded.
        used_mib: memory in use, by anybody.
    """

    uuid: str
    name: str = ""
    bus: str = ""
    lost: bool = False
    temperature_c: int | None = None
    slowdown_at_c: int | None = None
    power_w: float | None = None
    clock_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()
    pcie_generation: int | None = None
    pcie_width: int | None = None
    replays: int | None = None
    used_mib: int | None = None


@dataclass(frozen=True)
class Xid:
    """An error that the driver has reported of a card, by the number in NVIDIA's catalogue."""

    uuid: str
    number: int

    @property
    def action(self) -> Literal["leave out", "leave out at the second", "none"]:
        """What follows for the card: a start without it, or a start like any other."""
        if self.number in _GONE | _DAMAGED:
            return "leave out"
        return "leave out at the second" if self.number in _GSP else "none"

    def told(self) -> str:
        """For a person."""
        meaning = _MEANINGS.get(self.number)
        return f"XID {self.number}" + (f" ({meaning})" if meaning else "")


@dataclass(frozen=True)
class Reading:
    """All cards of the host at one moment, and the XIDs since the reading before.

    `cards` is None where there is no driver to ask; `why` says so.
    """

    cards: tuple[Card, ...] | None
    xids: tuple[Xid, ...] = ()
    why: str = ""

    def to_line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


def reading_from_line(line: str) -> Reading:
    """The reading that `to_line` has written.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    record = json.loads(line)
    cards = record["cards"]
    return Reading(
        None if cards is None else tuple(card_from(each) for each in cards),
        tuple(Xid(**each) for each in record["xids"]),
        record["why"],
    )


def card_from(record: dict[str, object]) -> Card:
    """A card from the fields that are known of it."""
    values = {**record, "slowed_by": tuple(record.get("slowed_by") or ())}  # type: ignore[arg-type]
    return Card(**values)  # type: ignore[arg-type]


def xids_of_log(lines: Sequence[str], cards: Sequence[Card]) -> list[Xid]:
    """The XIDs in lines of the kernel's log, of the cards that are known.

    The log names a card by its place on the bus, "PCI:0000:65:00", without the function.
    """
    by_place = {_place(card.bus): card.uuid for card in cards if card.bus}
    found = [match for line in lines if (match := _XID.search(line))]
    return [Xid(by_place[place], int(m.group(2))) for m in found if (place := _place(m.group(1))) in by_place]


def _place(bus: str) -> tuple[int, ...]:
    """Domain, bus and device as numbers: NVML writes the domain with eight digits, the kernel with four."""
    parts = bus.lower().partition(".")[0].split(":")
    try:
        return tuple(int(part, 16) for part in parts)
    except ValueError:
        return ()
