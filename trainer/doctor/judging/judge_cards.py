"""What the cards and their links mean for training: facts in, findings out."""

from collections.abc import Iterator
from itertools import chain

from trainer.doctor.bus_facts import Link
from trainer.doctor.card_facts import CardFacts, CardsFacts
from trainer.doctor.findings import Finding, Level, absent
from trainer.doctor.host_facts import SoftwareFacts
from trainer.doctor.told_sizes import gib

_GIB = 1 << 30
_DESKTOP = _GIB  # a desktop holds 15 to 250 MiB; a browser with it, some hundred more
_CAPPED = 0.9  # less is more than what vendors differ by
_FEW_REPLAYS, _MANY_REPLAYS = 1, 50  # during the copies; a sound link has none in weeks (`host/alarms.py`)
_OLD_REPLAYS = 1000  # since the driver was loaded: some are of the moments when links train
_BROKEN = ("a hardware slowdown", "the power supply's brake")
_HOT = ("heat", "heat (by the hardware)")
_OLDEST = (7, 5)  # what PyTorch's builds for CUDA 12.9 and later begin with, `parallel/comm.py`
_BF16 = (8, 0)


def judge_cards(cards: CardsFacts, software: SoftwareFacts) -> list[Finding]:
    """Driver, each card, and what lies between them."""
    if not cards.has_driver:
        if cards.seen_on_bus:
            told = f"{cards.seen_on_bus} NVIDIA cards on the bus, and no driver"
            advice = "install NVIDIA's driver (`nvidia-smi` must list the cards), then start anew"
            return [Finding("cards", "driver", "fail", told, "without it nothing trains on them", advice)]
        return [absent("cards", "cards", "no NVIDIA driver; training runs on the CPU")]
    return [
        *_driver(cards, software),
        *chain.from_iterable(map(_card, cards.cards)),
        *_alike(cards),
        *_between(cards),
    ]


def _driver(cards: CardsFacts, software: SoftwareFacts) -> Iterator[Finding]:
    details, why = cards.details, "all cards are reached through it"
    if details.is_silent or details.why:
        told = "does not answer" if details.is_silent else details.why
        advice = (
            "`dmesg | grep -e NVRM -e Xid` says why; restart the machine, and reload the driver first if it lets you"
        )
        yield Finding("cards", "driver", "fail", told, why, advice)
        return
    runs = f", runs CUDA up to {details.cuda[0]}.{details.cuda[1]}" if details.cuda else ""
    level, advice = _builds(details.cuda, software, bool(cards.cards))
    yield Finding("cards", "driver", level, f"{details.driver}{runs}; {len(cards.cards)} cards answer", why, advice)
    for name in details.hung:
        advice = "`dmesg | grep Xid`; switch the machine off and on; train on the others: CUDA_VISIBLE_DEVICES=..."
        yield Finding("cards", name, "fail", "hangs: it does not answer", "a worker on it would wait for ever", advice)
    if details.missing:
        told = f"{details.missing} are counted, and not reached"
        advice = "`dmesg | grep Xid` names them (79: fallen off the bus); check power cables, riser and slot; restart"
        yield Finding("cards", "lost cards", "fail", told, why, advice, details.missing, "cards")


def _builds(cuda: tuple[int, int] | None, software: SoftwareFacts, any_card: bool) -> tuple[Level, str]:
    """NVIDIA's CUDA compatibility: a driver runs what was built for its major version or an older one."""
    if not any_card or software.torch is None:
        return "ok", ""
    if software.torch_cuda is None:
        return "fail", f"PyTorch {software.torch} is built without CUDA: install its CUDA build"
    major = int(software.torch_cuda.partition(".")[0])
    if cuda is not None and cuda[0] < major:
        return "fail", f"PyTorch is built for CUDA {software.torch_cuda}: install a newer driver, or an older build"
    return "ok", ""


def _card(card: CardFacts) -> Iterator[Finding]:
    detail, name = card.detail, f"card {card.detail.number}"
    if detail.lost:
        advice = "check power cables, riser and slot; restart the machine"
        why = "a run on it ends; the others go on without it"
        yield Finding("cards", name, "fail", f"{detail.name}: lost from the bus", why, advice)
        return
    yield _memory(name, card)
    yield from _power(name, card)
    yield from _clock(name, card)
    yield from _errors(name, card)
    yield from _link(name, card)
    yield from _replays(name, card)


def _memory(name: str, card: CardFacts) -> Finding:
    detail = card.detail
    capability = detail.capability
    about = detail.name + (f", sm_{capability[0]}{capability[1]}" if capability else "")
    if detail.memory_total is None or detail.memory_free is None:
        return absent("cards", name, f"{about}: does not tell its memory")
    held = detail.memory_total - detail.memory_free
    level: Level = "fail" if held > detail.memory_total / 2 else "warn" if held > _DESKTOP else "ok"
    holders = [
        f"{each.command or 'process'} {each.pid}" + (f" {gib(each.bytes)}" if each.bytes else "")
        for each in sorted(detail.holders, key=lambda each: -(each.bytes or 0))[:3]
    ]
    by = f" (held by {', '.join(holders)})" if holders else ""
    advice = "" if level == "ok" else "end what holds it: `nvidia-smi`, then `kill PID`; or a smaller memory.budget"
    if capability is not None and capability < _BF16:
        level = "warn" if level == "ok" else level
        old = (
            "; PyTorch's newest builds have nothing for it: take the one for CUDA 12.6" if capability < _OLDEST else ""
        )
        advice = advice or f"it has no bf16 arithmetic: train with train.precision: fp16 or fp32{old}"
    told = f"{about}: {gib(detail.memory_free)} of {gib(detail.memory_total)} free{by}"
    return Finding("cards", name, level, told, "what a step may take", advice, detail.memory_free / _GIB, "GiB")


def _power(name: str, card: CardFacts) -> Iterator[Finding]:
    limit, default = card.detail.power_limit_w, card.detail.default_limit_w
    if not limit or not default:
        yield absent("cards", f"{name} power", "does not tell its limit")
        return
    capped = limit < _CAPPED * default
    took = f", took up to {card.load.power_w:.0f} W" if card.load and card.load.power_w is not None else ""
    yield Finding(
        "cards",
        f"{name} power",
        "warn" if capped else "ok",
        f"limit {limit:.0f} W of {default:.0f} W{took}",
        "a lower limit is a lower clock in long kernels",
        f"if it is not meant so: nvidia-smi -i {card.detail.number} -pl {default:.0f}" if capped else "",
        limit,
        "W",
    )


def _clock(name: str, card: CardFacts) -> Iterator[Finding]:
    detail, load = card.detail, card.load
    slowed = load.slowed_by if load else detail.slowed_by
    clock = load.clock_mhz if load and load.clock_mhz else detail.clock_mhz
    if clock is None:
        yield absent("cards", f"{name} clock", "does not tell")
        return
    broken, hot = [why for why in slowed if why in _BROKEN], [why for why in slowed if why in _HOT]
    level: Level = "fail" if broken else "warn" if hot else "ok"
    advice = {
        "fail": "check that both power cables are plugged in, from a supply that is strong enough",
        "warn": "more air: fans, dust, space between the cards, thermal pads",
        "ok": "",
    }[level]
    by = f", slowed down by {' and '.join(slowed)}" if (slowed := tuple(why for why in slowed if why != "idle")) else ""
    most = f" of {detail.max_clock_mhz}" if detail.max_clock_mhz else ""
    when = "copying" if load else "now"
    told = f"{clock}{most} MHz {when}{by}"
    yield Finding("cards", f"{name} clock", level, told, "how fast it computes", advice, clock, "MHz")


def _errors(name: str, card: CardFacts) -> Iterator[Finding]:
    detail = card.detail
    if detail.ecc is None:
        yield absent("cards", f"{name} ECC", "this card has none for you to see")
        return
    wrong = detail.uncorrected or 0
    told = f"{'on' if detail.ecc else 'off'}, {wrong} uncorrected and {detail.corrected or 0} corrected errors"
    level: Level = "fail" if wrong else "ok"
    advice = "`nvidia-smi -q -d ECC,ROW_REMAPPER`; if it goes on, the card is to be replaced" if wrong else ""
    yield Finding("cards", f"{name} ECC", level, told, "wrong bits are wrong weights", advice, wrong, "errors")


def _link(name: str, card: CardFacts) -> Iterator[Finding]:
    (link, loaded), possible = card.link, card.possible
    title, why = f"{name} PCIe", "all that cards exchange crosses it twice"
    if link is None:
        yield absent("bus", title, "neither kernel nor driver tells")
        return
    level, advice = _judged(link, possible, loaded)
    when = "under load" if loaded else "at rest, where the generation may be lower"
    told = f"{link}{f' of {possible}' if possible else ''}, {when}"
    if card.slot and card.slot.card and possible and card.slot.card != possible:
        told += f" (the card itself can {card.slot.card})"
    yield Finding("bus", title, level, told, why, advice, link.gigabytes_per_s, "GB/s")


def _judged(link: Link, possible: Link | None, loaded: bool) -> tuple[Level, str]:
    """Half of what is possible doubles the time of an exchange, a quarter makes the exchange longer than the pass."""
    if possible is None:
        return "ok", ""
    lanes = link.width < possible.width
    now = link.gigabytes_per_s if loaded else Link(possible.generation, link.width).gigabytes_per_s
    share = now / possible.gigabytes_per_s
    if share >= 0.99:
        return "ok", ""
    what = (
        "seat card and riser anew, clean the contacts, look for a slot that shares its lanes"
        if lanes
        else (
            "set the slot's generation in the BIOS to auto or the highest; a riser of an older generation holds it back"
        )
    )
    return ("warn" if share >= 0.45 else "fail"), what


def _replays(name: str, card: CardFacts) -> Iterator[Finding]:
    total, load = card.detail.replays, card.load
    if total is None:
        yield absent("bus", f"{name} replays", "does not count them")
        return
    now = load.replays if load else 0
    level: Level = "ok"
    if now >= _FEW_REPLAYS or total >= _OLD_REPLAYS:
        level = "fail" if now >= _MANY_REPLAYS else "warn"
    told = f"{total:,} since the driver was loaded" + (f", {now:,} while copying" if load else "")
    advice = "" if level == "ok" else "another riser or slot; a generation lower in the BIOS if nothing else helps"
    yield Finding(
        "bus", f"{name} replays", level, told, "packets that came broken and were sent again", advice, total, "packets"
    )


def _alike(cards: CardsFacts) -> Iterator[Finding]:
    """All wait for the slowest card."""
    limits = {card.detail.power_limit_w for card in cards.cards if card.detail.power_limit_w}
    names = {card.detail.name for card in cards.cards if not card.detail.lost}
    if len(limits) > 1 and len(names) == 1:
        told = f"power limits of {min(limits):.0f} to {max(limits):.0f} W"
        advice = f"the same limit for all: nvidia-smi -pl {max(limits):.0f}"
        yield Finding("cards", "unlike cards", "warn", told, "all wait for the slowest", advice)
    elif len(names) > 1:
        advice = "the fastest waits for the slowest in each step"
        yield Finding("cards", "unlike cards", "warn", ", ".join(sorted(names)), "all wait for the slowest", advice)


def _between(cards: CardsFacts) -> Iterator[Finding]:
    """Peer access."""
    uuids = [card.detail.uuid for card in cards.cards]
    said = {why for card in cards.cards for other, why in card.detail.peers.items() if other in uuids}
    why = "cards that read each other's memory exchange without the host's"
    if len(uuids) < 2 or not said:
        yield absent("bus", "peer access", "fewer than two cards")
        return
    if wrong := [pair for pair, same in cards.copies.items() if not same]:
        told = f"copies arrive changed: card {', '.join(wrong)}"
        advice = "NCCL_P2P_DISABLE=1 for every run until IOMMU and ACS are off, or the driver is NVIDIA's own"
        yield Finding("bus", "peer access", "fail", told, "gradients would be wrong", advice, len(wrong), "pairs")
    elif said == {"ok"}:
        proved = f", {len(cards.copies)} copies arrived as they were" if cards.copies else ""
        yield Finding("bus", "peer access", "ok", f"between all cards{proved}", why)
    elif "ok" in said:
        told = f"between some cards only; else {', '.join(sorted(said - {'ok'}))}"
        advice = "put the cards into slots of one root, or expect the speed of the slowest pair"
        yield Finding("bus", "peer access", "warn", told, why, advice)
    else:
        geforce = all("GeForce" in card.detail.name for card in cards.cards)
        advice = "" if geforce else "BIOS: IOMMU and ACS off; `nvidia-smi topo -p2p r` shows each pair"
        told = f"none: {', '.join(sorted(said))}" + (" (usual for GeForce)" if geforce else "")
        yield Finding("bus", "peer access", "ok" if geforce else "warn", told, why, advice)
