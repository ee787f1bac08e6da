"""What is said of one property of the machine: how good it is, its number, why it matters, what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "not here"]
Topic = Literal["software", "cards", "bus", "processor", "memory", "disks", "exchange"]


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        name: of the property, a few words.
        level: `fail`: training will not work, or is slowed down several times; `warn`: it costs some speed or may
            fail later; `not here`: the machine does not have it, or does not tell.
        told: what was found, with its number; for `not here`, why not.
        why: what training has to do with it.
        advice: what to do; only of `warn` and `fail`.
        value: the number that was judged, None where there is none.
        unit: of `value`.
    """

    topic: Topic
    name: str
    level: Level
    told: str
    why: str = ""
    advice: str = ""
    value: float | None = None
    unit: str = ""


def absent(topic: Topic, name: str, why_not: str) -> Finding:
    """What this machine does not have or tell."""
    return Finding(topic, name, "not here", why_not)


def worst(findings: Sequence[Finding]) -> Level:
    """`fail` if one is, else `warn` if one is, else `ok`."""
    levels = {finding.level for finding in findings}
    return "fail" if "fail" in levels else "warn" if "warn" in levels else "ok"


def exit_code(findings: Sequence[Finding]) -> int:
    """Of the command: 1 where something fails, else 0."""
    return int(worst(findings) == "fail")
