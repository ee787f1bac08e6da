"""A sound rig of four cards as the kernel and the driver show it, in files below a folder and as records of NVML."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.host.test_cores import write_host
from trainer.doctor.bus_facts import read_bus, read_sata
from trainer.doctor.card_facts import cards_facts, under_load
from trainer.doctor.disk_facts import FlushFacts, PlaceFacts, ReadFacts
from trainer.doctor.examine import Facts
from trainer.doctor.exchange import SIZES, ExchangeFacts, SizeFacts
from trainer.doctor.host_facts import LimitFacts, SoftwareFacts, read_host_memory, read_processor
from trainer.doctor.memory_speed import MemorySpeed
from trainer.host.card_details import read_card_details
from trainer.host.card_process import FAKE_CARDS
from trainer.host.card_readings import Card

GIB = 1 << 30
CARDS = 4
READ, FLUSH = ReadFacts(2.9e9, 12_000, 0.0009, is_cached=False), FlushFacts(1.4e9, 0.0011, 0.0024, 100)
LIMITS, SOFTWARE = LimitFacts(1024, 8 << 20, has_rdma=False), SoftwareFacts("6.8.0", "2.13.0+cu126", "12.6")
CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7282 16-Core Processor
flags\t\t: fpu vme avx2 sha_ni
"""


@dataclass
class Rig:
    """What tests change before they read it: `write` makes the files, `facts` reads them."""

    nodes: int = 4
    swap_used_kib: int = 0
    shm_free: int = 8 * GIB
    iommu: str = ""  # the type of the cards' groups; "": there is none
    acs: int = 0  # the control register of the bridges
    sata: Sequence[str] = ("max_performance",)
    slot_speed: str = "16.0 GT/s PCIe"
    details: list[dict[str, Any]] = field(default_factory=list)
    loaded: list[dict[str, Any]] = field(default_factory=list)
    copies: dict[str, bool] = field(default_factory=dict)
    read: ReadFacts = READ
    flush: FlushFacts = FLUSH
    limits: LimitFacts = LIMITS
    software: SoftwareFacts = SOFTWARE
    bus_bytes_per_s: float = 10e9
    stalls: int = 0
    load: float = 0.5
    tail: float = 1.2  # p99 over median

    def __post_init__(self) -> None:
        uuids = [f"GPU-{number}{number}{number}{number}" for number in range(CARDS)]
        why = "the cards do not support it"
        self.details = [
            {
                "uuid": uuid,
                "name": "NVIDIA GeForce RTX 3090",
                "bus": f"00000000:{0x11 * (number + 1):02X}:00.0",
                "capability": [8, 6],
                "memory_total": 24 * GIB,
                "memory_free": 24 * GIB - (200 << 20 if number == 0 else 0),
                "holders": [{"pid": 812, "command": "Xorg", "bytes": 200 << 20}] if number == 0 else [],
                "power_limit_w": 350.0,
                "default_limit_w": 350.0,
                "clock_mhz": 210,
                "max_clock_mhz": 2100,
                "generation": 1,  # at rest
                "width": 16,
                "max_generation": 4,
                "max_width": 16,
                "replays": 0,
                "slowed_by": ["idle"],
                "peers": {other: why for other in uuids if other != uuid},
            }
            for number, uuid in enumerate(uuids)
        ]
        self.loaded = [
            {"uuid": uuid, "clock_mhz": 1695, "power_w": 122.0, "pcie_generation": 4, "pcie_width": 16, "replays": 0}
            for uuid in uuids
        ]

    def write(self, root: Path) -> None:
        """/proc and /sys below `root`, and the file that stands for the driver."""
        write_host(root / "sys", cores=16, per_domain=4, nodes=self.nodes)
        _write(root / "proc" / "cpuinfo", CPUINFO)
        _write(root / "proc" / "loadavg", f"{self.load} 0.40 0.30 1/900 4242\n")
        total = 2 << 20
        _write(
            root / "proc" / "meminfo",
            f"MemTotal: 528000000 kB\nMemAvailable: 480000000 kB\nSwapTotal: {total} kB\n"
            f"SwapFree: {total - self.swap_used_kib} kB\n",
        )
        pressure = "some avg10=0.00 avg60=0.30 avg300=0.10 total=1\nfull avg10=0.00 avg60=0.20 avg300=0.00 total=1\n"
        _write(root / "proc" / "pressure" / "memory", pressure)
        (root / "dev" / "shm").mkdir(parents=True)
        self._write_bus(root / "sys")
        for number, policy in enumerate(self.sata):
            host = root / "sys" / "class" / "scsi_host" / f"host{number}"
            _write(host / "link_power_management_policy", policy + "\n")
            (host / "device" / f"target{number}:0:0").mkdir(parents=True)
        record = {"driver": "580.95.05", "cuda": [13, 0], "cards": [], "details": self.details}
        _write(root / "cards.json", json.dumps(record))

    def _write_bus(self, sys: Path) -> None:
        links = sys / "bus" / "pci" / "devices"
        links.mkdir(parents=True)
        for number, each in enumerate(self.details):
            bus = each["bus"].lower()[4:]
            domain = f"0000:{int(bus[5:7], 16) - 1:02x}"
            port = sys / "devices" / f"pci{domain}" / f"{domain}:01.1"
            card = port / bus
            load = self.loaded[number]
            for place, kind in ((port, "0x060400"), (card, "0x030000")):
                _write(place / "class", kind + "\n")
                _write(place / "max_link_width", "16\n")
                links.joinpath(place.name).symlink_to(os.path.relpath(place, links))
            _write(port / "max_link_speed", self.slot_speed + "\n")
            _write(card / "vendor", "0x10de\n")
            _write(card / "max_link_speed", "16.0 GT/s PCIe\n")
            _write(card / "current_link_speed", "2.5 GT/s PCIe\n")
            _write(card / "current_link_width", f"{load['pcie_width']}\n")
            _write(card / "numa_node", f"{number % self.nodes}\n")
            # The header of ACS at 0x148, as a chain of two capabilities: PCI_EXT_CAP_ID_ERR, then PCI_EXT_CAP_ID_ACS.
            space = bytearray(4096)
            space[0x100:0x104] = (0x148 << 20 | 1 << 16 | 0x0001).to_bytes(4, "little")
            space[0x148:0x14C] = (1 << 16 | 0x000D).to_bytes(4, "little")
            space[0x14E:0x150] = self.acs.to_bytes(2, "little")
            (port / "config").write_bytes(space)
            if self.iommu:
                group = sys / "kernel" / "iommu_groups" / str(number)
                _write(group / "type", self.iommu + "\n")
                (group / "devices" / bus).mkdir(parents=True)
        if self.iommu:
            (sys / "class" / "iommu" / "ivhd0").mkdir(parents=True)

    def facts(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, answer_s: float = 30.0) -> Facts:
        """What the doctor knows of it; what it measures on a real one is as given."""
        self.write(root)
        monkeypatch.setenv(FAKE_CARDS, str(root / "cards.json"))
        details = read_card_details(answer_s)
        bus = read_bus(root)
        cards = cards_facts(details, bus, has_driver=True)
        readings = [[Card(**each) for each in self.loaded]]
        memory = replace(read_host_memory(root), shm_total=8 * GIB, shm_free=self.shm_free)
        sizes = [
            SizeFacts(size, 100, t := 1.5 * size / self.bus_bytes_per_s, self.tail * t, self.stalls, CARDS)
            for size in SIZES
        ]
        place = PlaceFacts(Path("data"), Path("data"), "ext4", False, int(900e9))
        return Facts(
            CARDS,
            self.software,
            read_processor(range(32), root),
            memory,
            self.limits,
            bus,
            read_sata(root),
            under_load(cards, readings, self.copies),
            place,
            place,
            is_quick=False,
            flush=self.flush,
            read=self.read,
            memory_speed=MemorySpeed(110e9, 14e9, 32),
            exchange=ExchangeFacts(CARDS, "nccl", tuple(sizes), 24.5e9, 25.1e9, self.copies, "2.29.3"),
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
