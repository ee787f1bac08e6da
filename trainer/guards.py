"""The guards that every byte from outside passes: kind of file, size, depth, number; printable text; nothing runs.

Whoever reads a file that a user may have downloaded opens it here. Standard library alone.
"""

import json
import math
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trainer.errors import MOST_OF_A_LINE, UserError, printable

__all__ = [
    "DEFAULT_LIMITS",
    "Decoded",
    "Limits",
    "Refused",
    "deadline",
    "decode_text",
    "open_regular",
    "parse_json",
    "parse_toml",
    "printable",
    "read_bytes",
    "read_json",
    "read_text",
]

MOST_DIGITS = 40  # of a whole number in JSON; converting thousands of digits takes seconds
_UTF_8, _FALLBACK = "UTF-8", "Windows-1252"
_BYTE_ORDER_MARKS = {  # the longer ones first, of which a shorter one is the beginning
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_JSON_DEPTH, _JSON_ITEMS = 64, 1_500_000  # each item costs up to 100 bytes of memory
_TOML_DEPTH, _TOML_ITEMS = 32, 100_000  # each item costs up to 1 KB, and a name of n parts n^2
# A text, or a comment. One that is not closed ends with the file, so that none is looked at twice.
_TOML_TEXT = re.compile(
    r""""{3}(?:\\.|[^\\])*?(?:"{3,5}|\Z)|'{3}.*?(?:'{3,5}|\Z)|"(?:\\.|[^"\\\n])*"?|'[^'\n]*'?|\#[^\n]*""", re.DOTALL
)
_TOML_LONG_NAME = re.compile(rf"(?:\.[^][{{}}.,=\n]*){{{_TOML_DEPTH}}}")
_LONG_NUMBER = re.compile(rf"[0-9_]{{{MOST_DIGITS + 1}}}")


@dataclass(frozen=True)
class Limits:
    """What is read of files from outside, at most; the section `limits` of the configuration, which documents each."""

    image_bytes: int = 512 << 20
    image_pixels: int = 90_000_000
    caption_bytes: int = 1 << 20
    json_bytes: int = 256 << 20
    json_depth: int = _JSON_DEPTH
    json_items: int = 10_000_000
    header_bytes: int = 32 << 20
    config_bytes: int = 1 << 20
    tokenizer_bytes: int = 16 << 20
    vocabulary: int = 200_000
    pickle_bytes: int = 64 << 20
    archive_members: int = 100_000
    folder_depth: int = 64
    seconds_per_file: float = 60.0


DEFAULT_LIMITS = Limits()
"""Where no configuration says otherwise."""


class Refused(UserError):
    """Bytes from outside that break a rule; one line, `FILE: what; rule`."""

    def reason_for(self, place: object) -> str:
        """The line without the place, where that is told beside it."""
        reason = str(self).removeprefix(printable(f"{place}: ", MOST_OF_A_LINE))
        return reason or f"is not read; its path has {len(str(place)):,} characters"


def open_regular(path: Path | str, most_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading, if it is one: a FIFO would wait for ever, and a device gives bytes without end.

    A link to a regular file is as good as the file.

    Raises:
        Refused: it is something else, or larger than `most_bytes`.
        OSError: it is not there, or cannot be read.
    """
    # Opening alone may already do something to a device.
    _require_regular(path, os.stat(path), most_bytes)  # noqa: PTH116 - may be text
    # What was put there in the meantime does not block either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor), most_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: Path | str, found: os.stat_result, most_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise Refused(f"{path}: is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a regular file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise Refused(f"{path}: has {found.st_size:,} bytes; at most {most_bytes:,} are read")


def read_bytes(path: Path | str, most_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        Refused: it is no regular file, or larger than `most_bytes`.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path, most_bytes) as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:  # it grew, or is of a kind that tells no size, as in /proc
        raise Refused(f"{path}: has more than {most_bytes:,} bytes; no more are read")
    return data


def read_text(path: Path, most_bytes: int, encoding: str = "utf-8-sig") -> str:
    """All of a regular text file.

    Raises:
        Refused: as `read_bytes`, or it is not in this encoding.
        OSError: it is not there, or cannot be read.
    """
    data = read_bytes(path, most_bytes)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # without the mark that may stand before the text
        name = encoding.upper().removesuffix("-SIG")
        raise Refused(f"{path}:{line}: not {name} text (byte 0x{error.object[error.start]:02x})") from None


class Decoded(NamedTuple):
    """A text of somebody's own writing, and how it was encoded."""

    text: str
    encoding: str

    @property
    def is_utf_8(self) -> bool:
        """Whether it is what such files should be."""
        return self.encoding == _UTF_8


def decode_text(data: bytes, where: str) -> Decoded:
    """The text of a file that some editor wrote: UTF-8 with or without a mark; else UTF-16 or UTF-32 by its byte order
    mark; else Windows-1252, of which Latin-1 is a part, if it defines every byte. Never is a character replaced.

    Raises:
        Refused: it is none of these; `where` stands before the reason.
    """
    try:
        return Decoded(data.decode("utf-8-sig"), _UTF_8)
    except UnicodeDecodeError:
        pass
    marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    try:
        if marked is None and b"\0" in data:  # no text of one byte a character: UTF-16 without its mark, or no text
            raise UnicodeDecodeError(_FALLBACK, data, data.index(b"\0"), data.index(b"\0") + 1, "")
        return Decoded(data.decode(marked or "cp1252"), marked or _FALLBACK)
    except UnicodeDecodeError as error:
        byte = f"(byte 0x{data[error.start]:02x} at {error.start:,})"
        found = f"bears the mark of {marked}, but is none" if marked else f"is neither {_UTF_8} nor {_FALLBACK}"
        raise Refused(f"{where}: {found} {byte}; save it as {_UTF_8}") from None


def read_json(path: Path, limits: Limits = DEFAULT_LIMITS, *, most_bytes: int | None = None) -> Any:
    """The value in a JSON file of at most `most_bytes`, else `limits.json_bytes`.

    Raises:
        Refused: as `read_bytes` and `parse_json`.
        OSError: it is not there, or cannot be read.
    """
    most = limits.json_bytes if most_bytes is None else most_bytes
    data = read_bytes(path, most)
    return parse_json(data, str(path), most_bytes=most, most_depth=limits.json_depth, most_items=limits.json_items)


def parse_json(
    data: bytes, where: str, *, most_bytes: int, most_depth: int = _JSON_DEPTH, most_items: int = _JSON_ITEMS
) -> Any:
    """The value of a JSON text; time and memory are bounded before the parser sees it.

    Args:
        where: the place that a refusal names: a file, a file's header, a line of a file.
        most_depth: levels of lists and objects inside one another.
        most_items: entries of all lists and objects together, which memory goes by.

    Raises:
        Refused: a limit is passed; it is not UTF-8 or not JSON; a name stands twice in an object; a number is not
            finite or of more than 40 digits.
    """
    if len(data) > most_bytes:
        raise Refused(f"{where}: its JSON has {len(data):,} bytes; at most {most_bytes:,} are read")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.count(b'"') > 4 * most_items + 4:
        raise Refused(f"{where}: its JSON holds more than {most_items:,} values; no more are read")
    marks = _marks_outside_texts(data)
    if _depth(marks) > most_depth:
        raise Refused(f"{where}: its JSON is nested more than {most_depth} levels deep")
    if sum(marks.count(mark) for mark in (b",", b"[", b"{")) > most_items:
        raise Refused(f"{where}: its JSON holds more than {most_items:,} values; no more are read")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_int=_bounded_int,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise Refused(f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start:,})") from None
    except ValueError as error:
        raise Refused(f"{where}: not valid JSON ({printable(str(error))})") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; time and memory are bounded before the parser sees it.

    Args:
        where: the place that a refusal names.

    Raises:
        Refused: more than 32 levels of lists, tables and names with dots inside one another, or more than 100,000
            entries, a number of more than 40 digits; or it is not TOML.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    marks = _TOML_TEXT.sub("_", text)
    brackets = re.sub(r"[^][{}]", "", marks).encode()
    if _depth(brackets) > _TOML_DEPTH or _TOML_LONG_NAME.search(marks):
        raise Refused(f"{where}: its TOML is nested more than {_TOML_DEPTH} levels deep")
    if sum(map(marks.count, ".,=[{")) > _TOML_ITEMS:
        raise Refused(f"{where}: its TOML holds more than {_TOML_ITEMS:,} values; no more are read")
    if _LONG_NUMBER.search(marks):
        raise Refused(f"{where}: its TOML holds a number of more than {MOST_DIGITS} digits")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not all are of the kind that it documents
        raise Refused(f"{where}: not TOML: {printable(str(error))}") from None


def _marks_outside_texts(data: bytes) -> bytes:
    """Commas and brackets that are no part of a text, in their order."""
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    others = bytes(byte for byte in range(256) if byte not in b',[]{}"')
    return b"".join(unescaped.translate(None, others).split(b'"')[::2])


def _depth(marks: bytes) -> int:
    steps = [0] * 256
    for opens, closes in (b"[]", b"{}"):
        steps[opens], steps[closes] = 1, -1
    return max(accumulate(map(steps.__getitem__, marks.replace(b",", b""))), default=0)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen = set[str]()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {printable(double, 60)} stands twice in it")
    return content


def _bounded_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{printable(text, 40)} is not a finite number")
    return number


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a finite number")


def deadline(seconds: float, where: str) -> Callable[[], None]:
    """A function to call between pieces of work on one file; it raises Refused when `seconds` have passed."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise Refused(f"{where}: takes longer than {seconds:g} s to read; left")

    return check
