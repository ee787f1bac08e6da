"""Which cards are left out, and why: by readings, by XIDs in lines of the kernel's log, by who fails alone."""

import pytest

from trainer.host.card_choice import CardsInUse, choose_cards, suspected_rank
from trainer.host.card_readings import Card, Reading, Xid, reading_from_line, xids_of_log

CARDS = tuple(Card(f"GPU-{n}", "RTX 3090", f"00000000:{n + 65:X}:00.0") for n in range(4))
ALL = CardsInUse(CARDS)
SOUND = Reading(CARDS)


def uuids(in_use: CardsInUse) -> list[str]:
    return [card.uuid for card in in_use.cards]


def test_the_kernels_lines_name_cards_by_their_place() -> None:
    lines = [
        "4,1,2,-;NVRM: Xid (PCI:0000:42:00): 79, pid=1234, name=python, GPU has fallen off the bus.",
        "4,1,2,-;NVRM: Xid (PCI:0000:ee:00): 79, pid=1234, a card of somebody else's",
        "6,1,2,-;usb 1-1: new device",
        "4,1,2,-;NVRM: Xid (PCI:0000:41:00): 31, pid=9",
    ]
    assert xids_of_log(lines, CARDS) == [Xid("GPU-1", 79), Xid("GPU-0", 31)]
    assert Xid("GPU-1", 79).told() == "XID 79 (it has fallen off the bus)"
    assert Xid("GPU-1", 1).told() == "XID 1"


def test_readings_survive_the_pipe() -> None:
    reading = Reading((Card("GPU-0", slowed_by=("heat",), used_mib=0), Card("GPU-1", lost=True)), (Xid("GPU-1", 79),))
    assert reading_from_line(reading.to_line()) == reading
    assert reading_from_line(Reading(None, why="no driver").to_line()) == Reading(None, why="no driver")
    for garbage in ("", "{}", "[]", '{"cards": [{"volts": 1}], "xids": [], "why": ""}'):
        with pytest.raises((ValueError, TypeError, KeyError)):
            reading_from_line(garbage)


@pytest.mark.parametrize(
    "reading", [Reading(CARDS[:2] + CARDS[3:]), Reading((*CARDS[:2], Card("GPU-2", lost=True), CARDS[3]))]
)
def test_a_card_that_is_gone_is_left_out(reading: Reading) -> None:
    left, lines = choose_cards(ALL, reading, [], None)
    assert uuids(left) == ["GPU-0", "GPU-1", "GPU-3"]
    assert lines == ["the card of worker 2 (RTX 3090, GPU-2) is gone from the bus"]
    assert left.rank_of("GPU-3") == 2


@pytest.mark.parametrize("reading", [None, Reading(None, why="no driver"), SOUND])
def test_a_driver_that_says_nothing_costs_no_card(reading: Reading | None) -> None:
    assert choose_cards(ALL, reading, [], None) == (ALL, [])


@pytest.mark.parametrize("number", [48, 63, 64, 79, 94, 95])
def test_broken_memory_and_a_lost_card_by_their_xids(number: int) -> None:
    left, lines = choose_cards(ALL, SOUND, [Xid("GPU-1", number)], None)
    assert uuids(left) == ["GPU-0", "GPU-2", "GPU-3"] and f"XID {number}" in lines[0]


@pytest.mark.parametrize("number", [13, 31, 43, 45, 999])
def test_a_programs_fault_is_not_the_cards(number: int) -> None:
    left, lines = choose_cards(ALL, SOUND, [Xid("GPU-1", number)] * 3, None)
    assert uuids(left) == uuids(ALL) and not lines


@pytest.mark.parametrize("number", [62, 119, 120])
def test_a_halted_card_gets_one_more_start(number: int) -> None:
    once, lines = choose_cards(ALL, SOUND, [Xid("GPU-1", number)] * 5, None)
    assert uuids(once) == uuids(ALL) and not lines
    twice, lines = choose_cards(once, SOUND, [Xid("GPU-1", number)], None)
    assert uuids(twice) == ["GPU-0", "GPU-2", "GPU-3"] and lines


def test_a_card_whose_worker_alone_fails_twice_in_a_row_is_left_out_and_then_no_other() -> None:
    once, lines = choose_cards(ALL, SOUND, [], 3)
    assert not lines
    other, lines = choose_cards(once, SOUND, [], 1)
    assert not lines
    nothing, lines = choose_cards(other, SOUND, [], None)  # a failure that points to nobody
    assert not lines
    again, lines = choose_cards(nothing, SOUND, [], 1)
    assert not lines
    left, lines = choose_cards(again, SOUND, [], 1)
    assert uuids(left) == ["GPU-0", "GPU-2", "GPU-3"]
    assert lines == ["the card of worker 1 (RTX 3090, GPU-1) was alone at fault 2 times in a row"]
    for _ in range(3):
        left, lines = choose_cards(left, SOUND, [], 2)
    assert len(left.cards) == 3 and not lines
    assert choose_cards(CardsInUse(CARDS[:1]), SOUND, [], 0)[0].suspect == ("", 0)


def test_a_noisy_link_is_suspected_in_place_of_the_worker_that_is_late() -> None:
    once, _ = choose_cards(ALL, SOUND, [], 3, noisy=["GPU-2"])
    left, lines = choose_cards(once, SOUND, [], 0, noisy=["GPU-2"])
    assert uuids(left) == ["GPU-0", "GPU-1", "GPU-3"] and "worker 2" in lines[0]


def test_who_is_suspected() -> None:
    nccl = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
    assert suspected_rank("hang", 2, "has not moved", True) == 2
    assert suspected_rank("hang", 2, "has not moved; it is stopped by a signal", False) is None
    assert suspected_rank("corrupt", 1, "", False) == 1
    assert suspected_rank("error", 1, "RuntimeError: CUDA error: unspecified launch failure", False) == 1
    assert suspected_rank("signal", 0, f"was ended by SIGABRT; the end of its log:\n{nccl}", False) == 0
    assert suspected_rank("error", 1, "ZeroDivisionError", False) is None
    assert suspected_rank("lost_peer", 1, "CUDA error: peer", False) is None
    assert suspected_rank("memory", 1, "CUDA out of memory", False) is None
