"""What a card is and how it is set, beyond a run's readings; asked card by card, so that one that hangs is named."""

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.host.cards import end_reader, start_reader

ARGUMENT = "details"
ANSWER_S = 10.0  # a sound card is through in a few milliseconds, one that wakes up in a second or two
_BEGIN_S = 30.0  # a driver that nobody uses sets up all of its cards first


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a card; `bytes` is None where the driver does not tell how much."""

    pid: int
    command: str
    bytes: int | None


@dataclass(frozen=True)
class CardDetail:
    """One card; None where card or driver does not tell.

    Attributes:
        number: as the driver and `nvidia-smi` count.
        lost: the driver does not reach it any more.
        bus: PCI address as the driver writes it.
        capability: compute capability, major and minor.
        memory_total, memory_free: bytes.
        holders: processes that this user may see.
        power_limit_w, default_limit_w: what it may take, and what it would by default.
        clock_mhz, max_clock_mhz: of its processors, now and at most.
        ecc: whether errors of its memory are corrected; None: it cannot.
        uncorrected, corrected: errors since ever, by the card's own count.
        generation, width: of its PCIe link now; `max_generation`, `max_width`: what card and slot can, by the driver.
        replays: packets that the link had to repeat since the driver was loaded.
        slowed_by: as of `Card`.
        peers: of each other card by UUID, whether one reads the other's memory over the bus: `ok`, or why not.
    """

    uuid: str
    name: str = ""
    bus: str = ""
    number: int = 0
    lost: bool = False
    capability: tuple[int, int] | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    holders: tuple[Holder, ...] = ()
    power_limit_w: float | None = None
    default_limit_w: float | None = None
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    corrected: int | None = None
    generation: int | None = None
    width: int | None = None
    max_generation: int | None = None
    max_width: int | None = None
    replays: int | None = None
    slowed_by: tuple[str, ...] = ()
    peers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CardDetails:
    """All cards of the host.

    Attributes:
        driver: its version; "" where there is none.
        cuda: the newest CUDA that the driver runs, major and minor.
        cards: those that answered.
        hung: names of those that did not in `ANSWER_S`.
        missing: cards that the driver counts, but does not reach.
        is_silent: there is a driver, and it does not answer at all.
        why: there is nothing to read, and the reason.
    """

    driver: str = ""
    cuda: tuple[int, int] | None = None
    cards: tuple[CardDetail, ...] = ()
    hung: tuple[str, ...] = ()
    missing: int = 0
    is_silent: bool = False
    why: str = ""


def detail_from(record: Mapping[str, Any]) -> CardDetail:
    """A card from the fields that are known of it.

    Raises:
        TypeError: there is a field that cards have not.
    """
    capability = record.get("capability")
    return CardDetail(
        **{
            **record,
            "capability": tuple(capability) if capability else None,
            "holders": tuple(Holder(**each) for each in record.get("holders") or ()),
            "slowed_by": tuple(record.get("slowed_by") or ()),
        }
    )


def detail_line(card: CardDetail) -> str:
    """As one line of JSON."""
    return json.dumps(asdict(card))


def read_card_details(answer_s: float = ANSWER_S) -> CardDetails:
    """All cards now. Takes a moment, and `answer_s` for each card that hangs.

    Args:
        answer_s: how long each card's answer is waited for.
    """
    head: dict[str, Any] | None = None
    found, hung = list[CardDetail](), list[str]()
    done = 0
    while head is None or done < len(head["cards"]):
        lines, process = _lines_of(str(done))
        try:
            head = _next(lines, max(answer_s, _BEGIN_S))
            if head is None:
                return CardDetails(is_silent=True)
            if "why" in head:
                return CardDetails(why=head["why"])
            while done < len(head["cards"]) and (record := _next(lines, answer_s)) is not None:
                if "why" in record:
                    return CardDetails(why=record["why"])
                found.append(detail_from(record))
                done += 1
            if done < len(head["cards"]):
                hung.append(head["cards"][done])
                done += 1
        finally:
            end_reader(process)
    cuda = head["cuda"]
    return CardDetails(head["driver"], cuda and tuple(cuda), tuple(found), tuple(hung), head["missing"])


def _lines_of(first: str) -> "tuple[queue.Queue[str], subprocess.Popen[str]]":
    """What a process says that asks each card from number `first` on; its last line is empty."""
    process = start_reader([ARGUMENT, first])
    lines: queue.Queue[str] = queue.Queue()

    def take() -> None:
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=take, daemon=True).start()
    return lines, process


def _next(lines: "queue.Queue[str]", answer_s: float) -> dict[str, Any] | None:
    """The next record; None where none comes."""
    try:
        record = json.loads(lines.get(timeout=answer_s))
    except (queue.Empty, ValueError):
        return None
    return record if isinstance(record, dict) else None
