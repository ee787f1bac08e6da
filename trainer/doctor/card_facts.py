"""The cards: what the driver tells of them, where they are on the bus, and how they were while they worked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainer.doctor.bus_facts import BusFacts, Link, SlotFacts, place_on_bus
from trainer.host.card_details import CardDetail, CardDetails
from trainer.host.card_readings import Card

_IDLE = "idle"


@dataclass(frozen=True)
class LoadFacts:
    """The best, and the worst, that was seen of a card while data went to it and back.

    Attributes:
        link: the fastest state of its link.
        clock_mhz: the highest clock of its processors.
        power_w: the most that it took.
        slowed_by: all that slowed it down.
        replays: packets that its link had to repeat meanwhile.
    """

    link: Link | None
    clock_mhz: int | None
    power_w: float | None
    slowed_by: tuple[str, ...]
    replays: int


@dataclass(frozen=True)
class CardFacts:
    """One card.

    Attributes:
        slot: None where the kernel does not show the bus.
        load: None where it was not measured.
    """

    detail: CardDetail
    slot: SlotFacts | None
    load: LoadFacts | None = None

    @property
    def possible(self) -> Link | None:
        """The link that card and slot can, by the kernel; by the driver where the kernel does not tell."""
        detail = self.detail
        if self.slot and (link := self.slot.possible):
            return link
        if detail.max_generation and detail.max_width:
            return Link(detail.max_generation, detail.max_width)
        return None

    @property
    def link(self) -> tuple[Link | None, bool]:
        """The link, and whether it is that under load; without load its generation may be lower to save power."""
        if self.load and self.load.link:
            return self.load.link, True
        detail = self.detail
        if detail.generation and detail.width:
            return Link(detail.generation, detail.width), False
        return (self.slot.link if self.slot else None), False


@dataclass(frozen=True)
class CardsFacts:
    """All cards of the host.

    Attributes:
        details: as they were read; `details.cards` are those of `cards`.
        has_driver: there is a driver to ask.
        seen_on_bus: NVIDIA's cards that the kernel sees, with a driver or without.
        copies: of pairs of cards, such as `0 to 1`, whether what was copied from one to the other arrived as it was.
    """

    details: CardDetails
    cards: tuple[CardFacts, ...]
    has_driver: bool
    seen_on_bus: int
    copies: Mapping[str, bool] = field(default_factory=dict)


def cards_facts(details: CardDetails, bus: BusFacts, *, has_driver: bool) -> CardsFacts:
    """The driver's and the kernel's word together."""
    slots = {slot.bus: slot for slot in bus.slots}
    cards = tuple(CardFacts(detail, slots.get(place_on_bus(detail.bus))) for detail in details.cards)
    return CardsFacts(details, cards, has_driver, len(bus.slots))


def under_load(
    cards: CardsFacts, readings: Sequence[Sequence[Card]], copies: Mapping[str, bool] | None = None
) -> CardsFacts:
    """The same with what was read of the cards while they worked."""
    by_uuid: dict[str, list[Card]] = {}
    for reading in readings:
        for card in reading:
            by_uuid.setdefault(card.uuid, []).append(card)
    loaded = tuple(replace(each, load=_load(by_uuid.get(each.detail.uuid, []))) for each in cards.cards)
    return replace(cards, cards=loaded, copies=copies or {})


def _load(readings: Sequence[Card]) -> LoadFacts | None:
    if not readings:
        return None
    links = [Link(r.pcie_generation, r.pcie_width) for r in readings if r.pcie_generation and r.pcie_width]
    replays = [r.replays for r in readings if r.replays is not None]
    return LoadFacts(
        link=max(links, key=lambda link: link.gigabytes_per_s, default=None),
        clock_mhz=max((r.clock_mhz for r in readings if r.clock_mhz is not None), default=None),
        power_w=max((r.power_w for r in readings if r.power_w is not None), default=None),
        slowed_by=tuple(sorted({why for r in readings for why in r.slowed_by} - {_IDLE})),
        replays=max(replays) - min(replays) if replays else 0,
    )
