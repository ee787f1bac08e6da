"""All facts of this machine, and all findings: read at once, measured one after the other, judged at the end."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from trainer.doctor.bus_facts import BusFacts, SataPort, read_bus, read_sata
from trainer.doctor.card_facts import CardsFacts, cards_facts, under_load
from trainer.doctor.disk_facts import FlushFacts, PlaceFacts, ReadFacts, measure_flushing, measure_reading, read_place
from trainer.doctor.exchange import SIZES, ExchangeFacts, measure_exchange
from trainer.doctor.findings import Finding
from trainer.doctor.host_facts import (
    LimitFacts,
    MemoryFacts,
    ProcessorFacts,
    SoftwareFacts,
    read_host_memory,
    read_limits,
    read_processor,
    read_software,
)
from trainer.doctor.judging.judge_bus import judge_bus
from trainer.doctor.judging.judge_cards import judge_cards
from trainer.doctor.judging.judge_disks import judge_flushing, judge_reading, judge_trouble
from trainer.doctor.judging.judge_exchange import judge_exchange, judge_memory_speed
from trainer.doctor.judging.judge_host import judge_limits, judge_memory, judge_processor, judge_software
from trainer.doctor.memory_speed import MemorySpeed, measure_memory
from trainer.host.card_details import CardDetails, read_card_details
from trainer.host.card_readings import Card
from trainer.host.cards import CardReader, has_cards

_Found = TypeVar("_Found")
_READING_S = 0.2
_TICKS_QUICK, _TICKS_FULL = 2, 2 + 3 + 1 + len(SIZES) + 1


@dataclass(frozen=True)
class Facts:
    """What is known of the machine; None: not measured, or nothing could be.

    Attributes:
        workers: that a run would have, or that were asked for.
        data, run: disks of the prepared data and of the run directory.
        is_quick: what takes long was left out.
        troubles: names of what failed while it was measured, and how.
    """

    workers: int
    software: SoftwareFacts
    processor: ProcessorFacts
    memory: MemoryFacts
    limits: LimitFacts
    bus: BusFacts
    sata: tuple[SataPort, ...]
    cards: CardsFacts
    data: PlaceFacts
    run: PlaceFacts
    is_quick: bool = True
    flush: FlushFacts | None = None
    read: ReadFacts | None = None
    memory_speed: MemorySpeed | None = None
    exchange: ExchangeFacts | None = None
    troubles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Workers:
    """Who exchanges.

    Attributes:
        count: processes.
        gpu: each has a card.
        cpus: where each of them runs; [] leaves it to the kernel.
    """

    count: int
    gpu: bool
    cpus: Sequence[Sequence[int]] = ()


def read_facts(workers: int, data: Path, run: Path, root: Path = Path("/")) -> Facts:
    """What the kernel and the driver tell, without measuring anything.

    Args:
        data, run: folders, which need not be there yet.
        root: where /proc, /sys and /dev are.
    Raises:
        OSError: a disk does not answer.
    """
    bus, has_driver = read_bus(root), has_cards()
    details = read_card_details() if has_driver else CardDetails(why="no driver")
    return Facts(
        workers,
        read_software(),
        read_processor(root=root),
        read_host_memory(root),
        read_limits(root),
        bus,
        read_sata(root),
        cards_facts(details, bus, has_driver=has_driver),
        read_place(data, root),
        read_place(run, root),
    )


def ticks(*, quick: bool) -> int:
    """How often `measure` says what it does, at most."""
    return _TICKS_QUICK if quick else _TICKS_FULL


def measure(
    facts: Facts,
    workers: Workers,
    *,
    quick: bool,
    tick: Callable[[str], None] = lambda told: None,
    env: Mapping[str, str] = os.environ,
) -> Facts:
    """The same with what was measured, one after the other, for each would disturb the next.

    Args:
        quick: only what takes a moment.
        tick: told what is being done.
        env: of the workers.
    """
    flush, trouble = _tried("run disk", measure_flushing, facts.run, tick)
    facts = replace(facts, is_quick=quick, flush=flush, troubles=trouble)
    if quick:
        return facts
    read, trouble = _tried("data disk", measure_reading, facts.data, tick)
    speed = measure_memory(facts.processor.threads, tick)
    facts = replace(facts, read=read, memory_speed=speed, troubles=(*facts.troubles, *trouble))
    if not _answer(facts.cards):
        return facts  # workers would wait for the card that hangs
    return _exchange(facts, workers, tick, env)


def _tried(
    name: str,
    ask: Callable[[Path, Callable[[str], None]], _Found | None],
    place: PlaceFacts,
    tick: Callable[[str], None],
) -> tuple[_Found | None, tuple[tuple[str, str], ...]]:
    """What a disk shows; or how it failed, which is a finding as well."""
    try:
        return ask(place.measured, tick), ()
    except OSError as error:
        return None, ((name, error.strerror or str(error)),)


def _answer(cards: CardsFacts) -> bool:
    details = cards.details
    return not (details.hung or details.is_silent or any(card.lost for card in details.cards))


def _exchange(facts: Facts, workers: Workers, tick: Callable[[str], None], env: Mapping[str, str]) -> Facts:
    if not workers.gpu:
        found = measure_exchange(workers.count, gpu=False, env=env, cpus=workers.cpus, tick=tick)
        return replace(facts, exchange=found)
    readings: list[Sequence[Card]] = []
    last_s = 0.0
    with CardReader(_READING_S) as reader:

        def watch() -> None:
            nonlocal last_s
            if time.monotonic() - last_s > _READING_S and (cards := reader.latest().cards):
                readings.append(cards)
                last_s = time.monotonic()

        found = measure_exchange(workers.count, gpu=True, env=env, cpus=workers.cpus, tick=tick, watch=watch)
    return replace(facts, exchange=found, cards=under_load(facts.cards, readings, found.copies))


def judge(facts: Facts) -> list[Finding]:
    """Everything that is to be said of the machine, in the page's order."""
    cards = len(facts.cards.cards)
    speeds = [
        *judge_reading(facts.data, facts.read, measured=not facts.is_quick),
        *judge_flushing(facts.run, facts.flush),
        *judge_memory_speed(facts.memory_speed, facts.processor, cards=cards),
        *judge_exchange(facts.exchange, facts.cards),
    ]
    if facts.processor.is_busy:
        # Others may be what is slow; but what could not be done at all has no number.
        speeds = [
            replace(each, level="warn") if each.level == "fail" and each.value is not None else each for each in speeds
        ]
    return [
        *judge_software(facts.software),
        *judge_cards(facts.cards, facts.software),
        *judge_bus(facts.bus, facts.cards, facts.sata),
        *judge_processor(facts.processor, facts.workers, cards=cards),
        *judge_memory(facts.memory, facts.workers, cards=cards),
        *judge_limits(facts.limits),
        *(judge_trouble(name, error) for name, error in facts.troubles),
        *speeds,
    ]
