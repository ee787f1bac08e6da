"""What was found, as one page for a terminal, as JSON, and as a table to paste where others compare."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.doctor.examine import Facts
from trainer.doctor.exchange import MIB
from trainer.doctor.findings import Finding, Topic, worst
from trainer.doctor.judging.judge_exchange import slowest_link
from trainer.doctor.told_sizes import seconds, speed
from trainer.errors import printable

_TITLES: dict[Topic, str] = {
    "software": "software",
    "cards": "cards",
    "bus": "bus",
    "processor": "processor",
    "memory": "memory and limits",
    "disks": "disks",
    "exchange": "memory and exchange, measured",
}
_NAME_WIDTH = 20
_MOST = 400


def page_lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, below a title for each topic; what to do stands below what is not good."""
    lines: list[str] = []
    for topic, title in _TITLES.items():
        own = [finding for finding in findings if finding.topic == topic]
        if own:
            lines += ["", title] if lines else [title]
        for finding in own:
            lines += _lines(finding)
    return [*lines, "", summary(findings)]


def _lines(finding: Finding) -> list[str]:
    name, told = printable(finding.name, _MOST).ljust(_NAME_WIDTH), printable(finding.told, _MOST)
    if finding.level == "not here":
        return [f"  -     {name} not here: {told}"]
    lines = [f"  {finding.level:<5} {name} {told}" + (f" | {finding.why}" if finding.why else "")]
    if finding.advice:
        lines.append(f"        {'':<{_NAME_WIDTH}} do: {printable(finding.advice, _MOST)}")
    return lines


def summary(findings: Sequence[Finding]) -> str:
    """How many are how good, in a line."""
    levels = [finding.level for finding in findings]
    counts = ", ".join(f"{levels.count(level)} {level}" for level in ("ok", "warn", "fail", "not here"))
    verdict = {"ok": "fit to train", "warn": "fit to train, with warnings", "fail": "not fit to train as it is"}
    return f"{verdict[worst(findings)]}: {counts}"


def as_json(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings and all facts; bytes, seconds, bytes a second, as the facts' docstrings say."""
    return {
        "version": 1,
        "level": worst(findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": _plain(asdict(facts)),
    }


def _plain(value: Any) -> Any:
    """Without paths, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def share_lines(facts: Facts) -> list[str]:
    """The all-reduce table in markdown with what it hangs on; no names of the host or of folders, no serial numbers."""
    exchange = facts.exchange
    lines = [f"**sdxl-train doctor: all-reduce** of {_machine(facts)}", ""]
    if exchange is None or not exchange.sizes:
        # Not the error's own words, which may name folders.
        return [*lines, "the exchange failed" if exchange and exchange.error else "one worker exchanges nothing"]
    lines += [
        "| size | p50 | bus bandwidth at p50 | p99 | bus bandwidth at p99 | stalled |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {each.size // MIB} MiB | {seconds(each.median_s)} | {speed(each.bus_bytes_per_s)} "
        f"| {seconds(each.slowest_s)} | {speed(each.slow_bus_bytes_per_s)} | {each.stalls} of {each.times} |"
        for each in exchange.sizes
    ]


def _machine(facts: Facts) -> str:
    """What the numbers hang on."""
    processor, exchange, details = facts.processor, facts.exchange, facts.cards.details
    words = []
    if exchange:
        words.append(
            f"{exchange.workers} workers over {exchange.backend}{' ' + exchange.nccl if exchange.nccl else ''}"
        )
    if facts.cards.cards:
        names = sorted({card.detail.name for card in facts.cards.cards})
        words.append(f"{len(facts.cards.cards)} x {', '.join(names)}")
        if link := slowest_link(facts.cards):
            words.append(f"PCIe {link}")
        words.append(f"driver {details.driver}")
    words.append(f"{processor.model or 'unknown processor'} ({processor.cores or processor.threads} cores, ")
    words[-1] += f"{len(processor.domains)} L3 caches, {processor.nodes} NUMA nodes"
    words[-1] += ", virtual)" if processor.is_virtual else ")"
    if facts.memory_speed:
        words.append(f"memory copied at {speed(facts.memory_speed.all_threads)}")
    iommus = {slot.iommu for slot in facts.bus.slots}
    if iommus:
        words.append(f"IOMMU {', '.join(sorted(iommus))}")
    words.append(f"PyTorch {facts.software.torch}, Linux {facts.software.kernel}")
    return printable("; ".join(words), 1000)
