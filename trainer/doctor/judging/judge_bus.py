"""What IOMMU, access control and power saving of links mean for training: facts in, findings out."""

from collections.abc import Sequence

from trainer.doctor.bus_facts import BusFacts, SataPort
from trainer.doctor.card_facts import CardsFacts
from trainer.doctor.findings import Finding, absent


def judge_bus(bus: BusFacts, cards: CardsFacts, sata: Sequence[SataPort]) -> list[Finding]:
    """The bus aside from each card's link."""
    return [_iommu(bus), _acs(bus, cards), _sata(sata)]


def _iommu(bus: BusFacts) -> Finding:
    """NVIDIA's nccl, issues 841 and 1285: with it off, or passing through, exchange through the host is faster."""
    translated = [slot for slot in bus.slots if slot.iommu == "translated"]
    why = "else each access of a card is looked up, and peer data may be wrong"
    if translated:
        told = f"on, and translates for {len(translated)} of {len(bus.slots)} cards"
        advice = "BIOS: IOMMU off; or iommu=pt on Linux's command line, with which it passes through"
        return Finding("bus", "IOMMU", "warn", told, why, advice, len(translated), "cards")
    if not bus.iommus:
        return Finding("bus", "IOMMU", "ok", "off, or hidden from a virtual machine", why, value=0, unit="cards")
    through = any(slot.iommu == "passthrough" for slot in bus.slots)
    told = "on, passes through" if through else "on; no card to translate for"
    return Finding("bus", "IOMMU", "ok", told, why, value=0, unit="cards")


def _acs(bus: BusFacts, cards: CardsFacts) -> Finding:
    """It matters to peers alone."""
    if bus.redirecting is None:
        return absent("bus", "ACS", "only root may read it: sudo lspci -vvv | grep ACSCtl")
    if not bus.bridges:
        return absent("bus", "ACS", "no PCIe bridges to be seen")
    peers = any(why == "ok" for card in cards.cards for why in card.detail.peers.values())
    long_way = bool(bus.redirecting) and peers
    return Finding(
        "bus",
        "ACS",
        "warn" if long_way else "ok",
        f"{bus.redirecting} of {bus.bridges} bridges send what is for a neighbour up to the root",
        "peer access between cards goes the long way",
        "BIOS: ACS off, and IOMMU off with it" if long_way else "",
        bus.redirecting,
        "bridges",
    )


def _sata(ports: Sequence[SataPort]) -> Finding:
    """Linux's Documentation/ABI/testing/sysfs-class-scsi_host: all but max_performance let a link sleep."""
    if not ports:
        return absent("disks", "SATA links", "no SATA disk")
    sleepy = [each for each in ports if each.policy not in ("max_performance", "keep_firmware_settings")]
    policies = ", ".join(sorted({each.policy for each in ports}))
    advice = (
        f"echo max_performance > /sys/class/scsi_host/{sleepy[0].port}/link_power_management_policy" if sleepy else ""
    )
    return Finding(
        "disks",
        "SATA links",
        "warn" if sleepy else "ok",
        f"{len(sleepy)} of {len(ports)} save power ({policies})",
        "some disks do not wake up after hours and drop off the bus, logs and checkpoints with them",
        advice,
        len(sleepy),
        "links",
    )
