"""Hosts with one fault each, as files and records of the driver: it is found, and nothing else is complained of."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.rig import CARDS, GIB, Rig
from trainer.doctor.bus_facts import Link, read_bus
from trainer.doctor.disk_facts import FlushFacts, ReadFacts
from trainer.doctor.doctor_page import as_json, page_lines, share_lines
from trainer.doctor.examine import judge
from trainer.doctor.findings import Finding, Level, exit_code
from trainer.doctor.host_facts import LimitFacts, SoftwareFacts
from trainer.errors import json_text


def complaints(findings: list[Finding]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings if finding.level in ("warn", "fail")}


def x8(rig: Rig) -> None:
    rig.loaded[1]["pcie_width"] = rig.details[1]["width"] = 8


def x4(rig: Rig) -> None:
    rig.loaded[1]["pcie_width"] = rig.details[1]["width"] = 4


def gen_3(rig: Rig) -> None:
    rig.loaded[2]["pcie_generation"] = 3


def capped(rig: Rig) -> None:
    for each in rig.details:
        each["power_limit_w"] = 180.0


def one_capped(rig: Rig) -> None:
    rig.details[3]["power_limit_w"] = 180.0


def translates(rig: Rig) -> None:
    rig.iommu = "DMA-FQ"


def slow_disk(rig: Rig) -> None:
    rig.read, rig.flush = ReadFacts(90e6, 11.0, 0.9, is_cached=False), FlushFacts(1e9, 0.001, 0.002, 100)


def small_shm(rig: Rig) -> None:
    rig.shm_free = 64 << 20


def swapped(rig: Rig) -> None:
    rig.swap_used_kib = 1 << 20


def hung(rig: Rig) -> None:
    rig.details[2]["hangs"] = True


def peers_lie(rig: Rig) -> None:
    for each in rig.details:
        each["peers"] = dict.fromkeys(each["peers"], "ok")
    rig.copies = {"0 to 1": True, "1 to 0": False}


def one_node(rig: Rig) -> None:
    rig.nodes = 1


def lost(rig: Rig) -> None:
    rig.details[0]["lost"] = True


def braked(rig: Rig) -> None:
    rig.loaded[0]["slowed_by"] = ("the power supply's brake",)


def wrong_bits(rig: Rig) -> None:
    rig.details[0] |= {"ecc": True, "uncorrected": 2, "corrected": 31}


def noisy(rig: Rig) -> None:
    rig.details[1]["replays"] = 1200


def acs(rig: Rig) -> None:
    rig.acs = 0x1D
    for each in rig.details:
        each["peers"] = dict.fromkeys(each["peers"], "ok")


def held(rig: Rig) -> None:
    rig.details[1] |= {"memory_free": 8 * GIB, "holders": [{"pid": 4711, "command": "python", "bytes": 16 * GIB}]}


def old_driver(rig: Rig) -> None:
    rig.software = SoftwareFacts("6.8.0", "2.13.0+cu140", "14.0")


def build_for_the_cpu(rig: Rig) -> None:
    rig.software = SoftwareFacts("6.8.0", "2.13.0+cpu", None)


def sleepy(rig: Rig) -> None:
    rig.sata = ("max_performance", "med_power_with_dipm")


def few_files(rig: Rig) -> None:
    rig.limits = LimitFacts(512, None, has_rdma=True)


def slow_wire(rig: Rig) -> None:
    rig.bus_bytes_per_s = 1.2e9


def busy(rig: Rig) -> None:
    """What is slow may be the others' doing."""
    slow_wire(rig)
    rig.load = 30.0


def stalls(rig: Rig) -> None:
    rig.stalls, rig.tail = 5, 8.0


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda rig: None, {}),
        (x8, {"card 1 PCIe": "warn"}),
        (x4, {"card 1 PCIe": "fail"}),
        (gen_3, {"card 2 PCIe": "warn"}),
        (capped, {f"card {number} power": "warn" for number in range(CARDS)}),
        (one_capped, {"card 3 power": "warn", "unlike cards": "warn"}),
        (translates, {"IOMMU": "warn"}),
        (lambda rig: setattr(rig, "iommu", "identity"), {}),
        (slow_disk, {"data in order": "warn", "data at random": "fail"}),
        (small_shm, {"/dev/shm": "fail"}),
        (swapped, {"swap": "warn"}),
        (hung, {"card 2 (NVIDIA GeForce RTX 3090, GPU-2222)": "fail"}),
        (peers_lie, {"peer access": "fail"}),
        (one_node, {"NUMA": "warn"}),
        (lost, {"card 0": "fail"}),
        (braked, {"card 0 clock": "fail"}),
        (wrong_bits, {"card 0 ECC": "fail"}),
        (noisy, {"card 1 replays": "warn"}),
        (acs, {"ACS": "warn"}),
        (held, {"card 1": "fail"}),
        (old_driver, {"driver": "fail"}),
        (build_for_the_cpu, {"driver": "fail"}),
        (sleepy, {"SATA links": "warn"}),
        (few_files, {"open files": "warn"}),
        (slow_wire, {f"all-reduce {size} MiB": "fail" for size in (16, 64, 256)}),
        (busy, {"load": "warn", **{f"all-reduce {size} MiB": "warn" for size in (16, 64, 256)}}),
        (stalls, {f"all-reduce {size} MiB": "warn" for size in (16, 64, 256)}),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Rig], None], expected: dict[str, Level]
) -> None:
    rig = Rig()
    plant(rig)
    findings = judge(rig.facts(tmp_path, monkeypatch, answer_s=1.0 if plant is hung else 30.0))
    assert complaints(findings) == expected
    assert exit_code(findings) == int("fail" in expected.values())
    for finding in findings:
        # Each says what to do where something is wrong, and only there; and why it matters where it is here.
        assert bool(finding.advice) == (finding.level in ("warn", "fail")), finding
        assert bool(finding.why) == (finding.level != "not here"), finding
        assert finding.told and "\n" not in finding.told + finding.advice + finding.why
    assert len({finding.name for finding in findings}) == len(findings)


def test_what_is_told_of_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of generation 3 is no fault of the link, nor is an idle card's generation; and both are told."""
    rig = Rig(slot_speed="8.0 GT/s PCIe")
    for each in rig.loaded:
        each["pcie_generation"] = 3
    facts = rig.facts(tmp_path, monkeypatch)
    assert facts.cards.cards[0].possible == Link(3, 16)
    told = {finding.name: finding.told for finding in judge(facts)}
    assert told["card 0 PCIe"] == "gen 3 x16 of gen 3 x16, under load (the card itself can gen 4 x16)"
    assert complaints(judge(facts)) == {}
    quick = replace(facts, is_quick=True, exchange=None, memory_speed=None, read=None)
    resting = replace(quick, cards=replace(quick.cards, cards=tuple(replace(c, load=None) for c in quick.cards.cards)))
    told = {finding.name: finding.told for finding in judge(resting)}
    assert told["card 0 PCIe"].startswith("gen 1 x16 of gen 3 x16, at rest")
    assert complaints(judge(resting)) == {}


def test_bridges_that_only_root_may_read(tmp_path: Path) -> None:
    rig = Rig(acs=0x1D)
    rig.write(tmp_path)
    assert read_bus(tmp_path).redirecting == CARDS
    for config in (tmp_path / "sys" / "devices").rglob("config"):
        config.write_bytes(config.read_bytes()[:64])  # what others are shown
    assert read_bus(tmp_path).redirecting is None


def test_the_page_and_the_table_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    one_node(rig)
    facts = rig.facts(tmp_path, monkeypatch)
    page = page_lines(judge(facts))
    assert page[0] == "software" and page[-1].startswith("fit to train, with warnings: ")
    at = next(number for number, line in enumerate(page) if line.startswith("  warn  NUMA"))
    assert "NPS1" in page[at] and page[at + 1].strip().startswith("do: BIOS: NUMA nodes per socket NPS4")
    shared = "\n".join(share_lines(facts))
    assert "| 256 MiB | 40.3 ms | 10.00 GB/s | 48.3 ms | 8.33 GB/s | 0 of 100 |" in shared
    assert "4 x NVIDIA GeForce RTX 3090; PCIe gen 4 x16; driver 580.95.05" in shared and "1 NUMA nodes" in shared
    assert "GPU-" not in shared and str(tmp_path) not in shared and "/" not in shared.replace("GB/s", "")
    assert '"level": "warn"' in json_text(as_json(facts, judge(facts)))


def test_without_any_card(tmp_path: Path) -> None:
    """Nothing is complained of that only cards need."""
    rig = Rig(nodes=1)
    rig.details = rig.details[:0]
    rig.write(tmp_path)
    bus = read_bus(tmp_path)
    assert (bus.slots, bus.iommus, bus.redirecting) == ((), 0, 0)
