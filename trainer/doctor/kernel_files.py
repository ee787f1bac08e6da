"""Small files of /proc and /sys, below a root that tests replace; what is missing or odd is None."""

from pathlib import Path

_MOST = 1 << 20
_KIB = 1024


def text_of(path: Path) -> str | None:
    """The file's text without blanks around it; None where it is missing, unreadable or empty."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode(errors="replace").strip() or None
    except OSError:
        return None


def number_of(path: Path) -> int | None:
    """The whole number that the file holds, its first word; None where it holds none."""
    words = (text_of(path) or "").split()
    try:
        return int(words[0]) if words else None
    except ValueError:
        return None


def names_in(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted; [] where it is missing."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def sizes_of(path: Path) -> dict[str, int]:
    """Lines such as `MemTotal:  123 kB`, in bytes."""
    found = {}
    for line in (text_of(path) or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB" and words[1].isdecimal():
            found[words[0].rstrip(":")] = int(words[1]) * _KIB
    return found
