"""A checkpoint's list of its files with sizes and checksums, and what is wrong with one by it. Free of torch."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from trainer.guards import Refused, printable, read_json

MANIFEST = "manifest.json"
STATE = "training_state/state.json"
_MOST_BYTES = 16 << 20
_PIECE = 8 << 20
# What a checkpoint consists of; somebody's notes beside it do no harm.
_OURS = ("*.safetensors", "config.json", "adapter_settings.json", "state.json")


class Damage(Exception):
    """What is wrong with a checkpoint, in words that follow its path and a colon."""


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The entries by file name, each with `size` in bytes and `xxh3_128`.

    Raises:
        Damage: there is none, or it is not what was written.
    """
    file = checkpoint / MANIFEST
    try:
        entries = read_json(file, most_bytes=_MOST_BYTES)["files"]
    except Refused as refused:
        raise Damage(refused.lines[0].removeprefix(f"{checkpoint}/")) from None
    except (OSError, KeyError, TypeError):
        raise Damage(f"{MANIFEST} is missing or unreadable") from None
    if not isinstance(entries, dict) or not entries:
        raise Damage(f"{MANIFEST} lists no files")
    for name, entry in entries.items():
        path = PurePosixPath(name)
        sound = isinstance(entry, dict) and not path.is_absolute() and ".." not in path.parts
        if sound and not name.isprintable():
            raise Damage(f"{MANIFEST} lists a file by a name that no checkpoint has ({printable(name, 80)})")
        if not sound or type(entry.get("size")) is not int or not isinstance(entry.get("xxh3_128"), str):
            raise Damage(f"{MANIFEST} is not what was written (entry {printable(name, 80)!r})")
    return entries


def find_damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Compare a checkpoint with its manifest; the first difference, or None.

    Args:
        contents: read every file, and expect all that resuming takes; else sizes alone are compared, in a moment.
    """
    try:
        entries = read_manifest(checkpoint)
    except Damage as damage:
        return str(damage)
    if contents and STATE not in entries:
        return f"{MANIFEST} does not list {STATE}"
    for pattern in _OURS:
        for file in sorted(checkpoint.rglob(pattern)):
            name = file.relative_to(checkpoint).as_posix()
            if name not in entries:
                return f"{name} is not in {MANIFEST}"
    for name, expected in entries.items():
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes, not {expected['size']:,}"
            if contents and manifest_entry(file) != expected:
                return f"{name} has changed (checksum)"
        except (OSError, ValueError) as error:
            return f"{printable(name, 80)} cannot be read: {error}"
    return None


def manifest_entry(file: Path, read: Callable[[int], None] = lambda num_bytes: None) -> dict[str, object]:
    """Size in bytes and xxh3-128 of a file, as the manifest holds them; `read` hears of every piece that is read."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            read(len(piece))
    return {"size": file.stat().st_size, "xxh3_128": digest.hexdigest()}
