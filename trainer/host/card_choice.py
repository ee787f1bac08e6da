"""Which cards the workers of the next start take, by what is known of them. Functions of readings."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from trainer.host.card_readings import Card, Reading, Xid

SUSPICIOUS_TIMES = 2  # failures in a row of one worker alone, after which its card is left out
# Errors that the card may be at fault for; an echo of another worker's end is none.
_CARD_ERRORS = (
    "cuda error",
    "cublas_status",
    "cudnn_status",
    "uncorrectable ecc",
    "watchdog caught collective operation timeout",
)


@dataclass(frozen=True)
class CardsInUse:
    """The cards of a command, worker 0's first, and why others were left out.

    Attributes:
        halted: cards whose own processor has halted once.
        suspect: the card whose worker alone failed last, and how often in a row.
        gave_up_on: a card that was left out on suspicion. One is: where a second one is suspected as well, it is not
            the cards.
    """

    cards: tuple[Card, ...]
    halted: frozenset[str] = frozenset()
    suspect: tuple[str, int] = ("", 0)
    gave_up_on: str = ""

    def label(self, uuid: str) -> str:
        """A card for a person: its worker's number, name and UUID."""
        for rank, card in enumerate(self.cards):
            if card.uuid == uuid:
                name = f"{card.name}, " if card.name else ""
                return f"the card of worker {rank} ({name}{uuid[:12]})"
        return f"card {uuid[:12]}"

    def rank_of(self, uuid: str) -> int | None:
        """The worker on this card."""
        return next((rank for rank, card in enumerate(self.cards) if card.uuid == uuid), None)

    def gone(self, reading: Reading | None) -> list[str]:
        """UUIDs of those that the driver does not list, or does not reach, any more."""
        if reading is None or reading.cards is None:
            return []  # it does not answer, and nothing is known
        there = {card.uuid for card in reading.cards if not card.lost}
        return [card.uuid for card in self.cards if card.uuid not in there]


def suspected_rank(kind: str, rank: int, text: str, alone: bool) -> int | None:
    """The worker whose card may be at fault for a failure; None where nothing points to one.

    Args:
        kind, rank, text, alone: of the `Failure`.
    """
    if kind == "corrupt" or (kind == "hang" and alone):
        return rank
    is_card_error = any(words in text.lower() for words in _CARD_ERRORS)
    return rank if kind in ("error", "signal", "exit") and is_card_error else None


def choose_cards(
    now: CardsInUse, reading: Reading | None, xids: Sequence[Xid], suspected: int | None, noisy: Collection[str] = ()
) -> tuple[CardsInUse, list[str]]:
    """The cards of the next start, and why some are left out, in words; after a failure.

    Args:
        xids: since the last choice.
        suspected: by `suspected_rank`.
        noisy: UUIDs whose PCIe link had to repeat many packets lately; a single one is suspected in place of a worker.
    """
    reasons = dict.fromkeys(now.gone(reading), "is gone from the bus")
    for xid in xids:
        # One halt is logged many times: the second one is that of a later start.
        if xid.action == "leave out" or (xid.action == "leave out at the second" and xid.uuid in now.halted):
            reasons.setdefault(xid.uuid, f"has reported {xid.told()}")
    halted = now.halted | {xid.uuid for xid in xids if xid.action == "leave out at the second"}
    suspect, gave_up_on = _suspicion(now, suspected, noisy), now.gave_up_on
    if suspect[1] >= SUSPICIOUS_TIMES and not gave_up_on and not reasons:
        gave_up_on = suspect[0]
        reasons[gave_up_on] = f"was alone at fault {suspect[1]} times in a row"
    left = tuple(card for card in now.cards if card.uuid not in reasons)
    lines = [f"{now.label(uuid)} {why}" for uuid, why in reasons.items() if now.rank_of(uuid) is not None]
    if lines:
        suspect = ("", 0)
    return replace(now, cards=left, halted=halted, suspect=suspect, gave_up_on=gave_up_on), lines


def _suspicion(now: CardsInUse, suspected: int | None, noisy: Collection[str]) -> tuple[str, int]:
    in_use = [card.uuid for card in now.cards]
    uuid = in_use[suspected] if suspected is not None and suspected < len(in_use) else ""
    if uuid and len(loud := [each for each in in_use if each in noisy]) == 1:
        uuid = loud[0]
    if not uuid or len(in_use) == 1:
        return "", 0
    return uuid, now.suspect[1] + 1 if uuid == now.suspect[0] else 1
