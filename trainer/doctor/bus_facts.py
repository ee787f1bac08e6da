"""The PCIe bus and what stands between cards and memory: links, IOMMU, ACS; and power saving of SATA links."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.doctor.kernel_files import names_in, number_of, text_of

_ROOT = Path("/")
_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # GT/s of a lane
_NVIDIA, _DISPLAY, _BRIDGE = "0x10de", "0x03", "0x0604"
# As in Linux's include/uapi/linux/pci_regs.h: PCI_EXT_CAP_ID_ACS, and of its control register PCI_ACS_RR and
# PCI_ACS_CR, which send what is meant for a neighbour up to the root.
_ACS, _REDIRECTS, _FIRST_EXTENDED = 0x000D, 0x0004 | 0x0008, 0x100


@dataclass(frozen=True)
class Link:
    """A PCIe link: generation 1 to 6, lanes."""

    generation: int
    width: int

    @property
    def gigabytes_per_s(self) -> float:
        """One direction, before the packets' headers: transfers a second times the line code, 8b/10b or 128b/130b."""
        per_lane = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
        return per_lane.get(self.generation, 0.0) * self.width

    def __str__(self) -> str:
        return f"gen {self.generation} x{self.width}"


@dataclass(frozen=True)
class SlotFacts:
    """A card's place on the bus, as the kernel tells it; None where it does not.

    Attributes:
        bus: its PCI address, "0000:65:00.0".
        link: now; an idle card may save power in a lower generation.
        card: the best that the card can.
        slot: the best that the port above it can.
        node: the NUMA node of the slot.
        iommu: how the card's accesses to memory are translated.
    """

    bus: str
    link: Link | None
    card: Link | None
    slot: Link | None
    node: int | None
    iommu: Literal["off", "passthrough", "translated", "unknown"]

    @property
    def possible(self) -> Link | None:
        """What card and slot both can."""
        known = [link for link in (self.card, self.slot) if link]
        return Link(min(k.generation for k in known), min(k.width for k in known)) if known else None


@dataclass(frozen=True)
class BusFacts:
    """The bus.

    Attributes:
        slots: of NVIDIA's cards.
        iommus: how many translate; 0: none, or switched off.
        bridges: PCIe bridges.
        redirecting: bridges whose ACS sends what cards say to each other up to the root; None: only root may read it.
    """

    slots: tuple[SlotFacts, ...]
    iommus: int
    bridges: int
    redirecting: int | None


@dataclass(frozen=True)
class SataPort:
    """A SATA port with a disk: its number and how its link saves power, as the kernel names it."""

    port: str
    policy: str


def read_bus(root: Path = _ROOT) -> BusFacts:
    """The bus of this host."""
    devices = root / "sys" / "bus" / "pci" / "devices"
    iommus = len(names_in(root / "sys" / "class" / "iommu"))
    types = _translations(root)
    slots, controls = [], list[int | None]()
    for name in names_in(devices):
        kind = text_of(devices / name / "class") or ""
        if kind.startswith(_BRIDGE):
            controls.append(_acs_control(devices / name / "config"))
        elif kind.startswith(_DISPLAY) and text_of(devices / name / "vendor") == _NVIDIA:
            slots.append(_slot(devices / name, iommus, types))
    hidden = bool(controls) and None in controls
    redirecting = None if hidden else sum(bool(control and control & _REDIRECTS) for control in controls)
    return BusFacts(tuple(slots), iommus, len(controls), redirecting)


def _slot(device: Path, iommus: int, types: dict[str, str]) -> SlotFacts:
    port = device.resolve().parent
    node = number_of(device / "numa_node")
    kind = types.get(device.name, "")
    iommu = "unknown"
    if not iommus and not types:
        iommu = "off"
    elif kind:
        iommu = "passthrough" if kind == "identity" else "translated"
    return SlotFacts(
        bus=device.name,
        link=_link(device, "current"),
        card=_link(device, "max"),
        slot=_link(port, "max") if _ADDRESS.fullmatch(port.name) else None,
        node=node if node is not None and node >= 0 else None,
        iommu=iommu,
    )


def _link(device: Path, which: str) -> Link | None:
    """`16.0 GT/s PCIe` and `16` as a link."""
    speed = (text_of(device / f"{which}_link_speed") or "").partition(" ")[0]
    width = number_of(device / f"{which}_link_width")
    generation = _GENERATIONS.get(speed) or _GENERATIONS.get(f"{speed}.0")
    return Link(generation, width) if generation and width else None


def _translations(root: Path) -> dict[str, str]:
    """The kind of translation of each device that is in an IOMMU's group: `identity`, `DMA`, `DMA-FQ`."""
    groups = root / "sys" / "kernel" / "iommu_groups"
    return {
        device: text_of(groups / group / "type") or ""
        for group in names_in(groups)
        for device in names_in(groups / group / "devices")
    }


def _acs_control(config: Path) -> int | None:
    """A bridge's ACS control register, 0 without that capability; None where only the first 64 bytes can be read."""
    try:
        space = config.read_bytes()
    except OSError:
        return None
    if len(space) <= _FIRST_EXTENDED:
        # A bridge of conventional PCI has 256 bytes and no such capability; 64 is what is shown to anybody.
        return 0 if len(space) == _FIRST_EXTENDED else None
    at, seen = _FIRST_EXTENDED, set[int]()
    while at >= _FIRST_EXTENDED and at + 8 <= len(space) and at not in seen:
        seen.add(at)
        (head,) = struct.unpack_from("<I", space, at)
        if head & 0xFFFF == _ACS:
            return struct.unpack_from("<H", space, at + 6)[0]
        at = head >> 20
    return 0


def read_sata(root: Path = _ROOT) -> tuple[SataPort, ...]:
    """Ports that have a disk."""
    hosts = root / "sys" / "class" / "scsi_host"
    found: Sequence[tuple[str, str | None]] = [
        (name, text_of(hosts / name / "link_power_management_policy"))
        for name in names_in(hosts)
        if any(entry.startswith("target") for entry in names_in(hosts / name / "device"))
    ]
    return tuple(SataPort(name, policy) for name, policy in found if policy)


def place_on_bus(bus: str) -> str:
    """`00000000:65:00.0` of the driver as the kernel writes it, `0000:65:00.0`."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}" if rest else bus.lower()
