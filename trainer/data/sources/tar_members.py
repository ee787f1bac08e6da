"""The members of a tar file and where their bytes lie, from its 512-byte headers alone; nothing is extracted.

Old, ustar, GNU and pax headers are understood. Python's `tarfile` is not used, because it keeps an object of a
kilobyte for each member that it has passed.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.errors import printable
from trainer.guards import open_regular

_BLOCK = 512
_PADDING_BYTES = 1 << 16
_MOST_HEADER_BYTES = 1 << 20
_MOST_NAME = 4096
_REGULAR = b"07\0"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL, _SPARSE = b"LKxgS"
_ABOUT_THE_NEXT = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_OCTAL = re.compile(rb"[0-7]*")
_LAST_SECOND = 1 << 33


class TarMember(NamedTuple):
    """A regular file within a tar: `size` bytes from byte `offset` of the tar on."""

    name: str
    offset: int
    size: int
    mtime_ns: int
    """0 where the header tells no time after 1970 and before 2242."""
    problem: str = ""
    """Why it cannot be used; what follows it can."""


class BadTar(Exception):
    """The tar cannot be read on from here; the message says why, and from which byte on."""


def walk_tar(path: Path | str) -> Iterator[TarMember]:
    """All regular files of a tar in their order; folders, links and sparse files are passed over.

    A member that is cut off by the end of the file is not among them: all that are yielded are there in full.

    Raises:
        BadTar: the tar is damaged or compressed; what was before has been yielded.
        Refused: it is no regular file.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        yield from _walk(file.fileno(), os.fstat(file.fileno()).st_size)


@dataclass
class _Told:
    """What headers of their own tell about the member that comes next."""

    name: str = ""
    pax: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def _walk(fd: int, file_bytes: int) -> Iterator[TarMember]:
    at, told = 0, _Told()
    while at + _BLOCK <= file_bytes:
        block = os.pread(fd, _BLOCK, at)
        if not block.strip(b"\0"):
            _check_padding(fd, at, file_bytes)
            return
        if not _sum_is_right(block):
            kind = _COMPRESSED.get(block[:2]) if at == 0 else None
            reason = f"it is compressed ({kind}); decompress it" if kind else "no tar header"
            raise BadTar(f"byte {at}: {reason}")
        kind, header_at, data = block[156], at, at + _BLOCK
        size = _number(block[124:136], at)
        if kind == _SPARSE:
            data = _after_sparse_map(fd, block, data)
        elif kind not in _ABOUT_THE_NEXT:
            size = int(told.pax.get("size", size))
        if data + size > file_bytes:
            raise BadTar(f"byte {at}: the tar ends before this member does")
        at = data + -(-size // _BLOCK) * _BLOCK
        if kind in _ABOUT_THE_NEXT:
            _tell(told, kind, fd, data, size)
            continue
        if kind in _REGULAR and not any(name.startswith("GNU.sparse") for name in told.pax):
            name = told.pax.get("path") or told.name or _name(block)
            problem = told.problem or ("" if len(name) <= _MOST_NAME else f"a name of {len(name):,} characters")
            if not name.endswith("/"):
                problem = f"byte {header_at}: {problem}" if problem else ""
                yield TarMember(name[:_MOST_NAME], data, size, _nanoseconds(block), problem)
        told = _Told()
    if file_bytes == 0:
        raise BadTar("byte 0: the file is empty")
    if os.pread(fd, _BLOCK, at).strip(b"\0"):
        raise BadTar(f"byte {at}: the tar ends within a header")


def _tell(told: _Told, kind: int, fd: int, data: int, size: int) -> None:
    if size > _MOST_HEADER_BYTES:
        told.problem = told.problem or f"a header before it has {size:,} bytes"
    elif kind == _LONG_NAME:
        told.name = _text(os.pread(fd, size, data).split(b"\0")[0])
    elif kind == _PAX:
        told.pax, problem = _pax_fields(os.pread(fd, size, data))
        told.problem = told.problem or problem


def _after_sparse_map(fd: int, block: bytes, at: int) -> int:
    """Where the bytes of an old GNU sparse file begin: behind its map, which may take further blocks."""
    more = block[482]
    while more:
        further = os.pread(fd, _BLOCK, at)
        at, more = at + _BLOCK, further[504] if len(further) == _BLOCK else 0
    return at


def _check_padding(fd: int, at: int, file_bytes: int) -> None:
    """What follows the end mark is padding, but not where several tars were strung together."""
    while at < file_bytes:
        some = os.pread(fd, _PADDING_BYTES, at)
        if not some:
            return
        if some.strip(b"\0"):
            raise BadTar(f"byte {at}: behind the tar's end mark more follows, which is not read; is it several tars?")
        at += len(some)


def _sum_is_right(block: bytes) -> bool:
    """The sum of the header's bytes, its own field taken as spaces; some old programs summed signed bytes."""
    stated = block[148:156].strip(b" \0")
    if not stated or stated.strip(b"01234567"):
        return False
    total, wanted = sum(block) - sum(block[148:156]) + 8 * ord(" "), int(stated, 8)
    return wanted == total or wanted == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(digits: bytes, at: int) -> int:
    """Octal digits, or from a first byte of 0x80 on the rest as a big-endian number."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    octal = digits.split(b"\0")[0].strip()
    if not _OCTAL.fullmatch(octal):
        raise BadTar(f"byte {at}: a header with the number {digits!r}")
    return int(octal, 8) if octal else 0


def _nanoseconds(block: bytes) -> int:
    try:
        seconds = _number(block[136:148], 0)
    except BadTar:
        return 0  # by it only a change is noticed
    return seconds * 10**9 if seconds < _LAST_SECOND else 0


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax_fields(data: bytes) -> tuple[dict[str, str], str]:
    """Records `<length> <field>=<value>\\n`; and what is wrong with one, at which the others count."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        length = int(digits) if _WHOLE_NUMBER.fullmatch(digits.decode("latin-1")) else 0
        if not len(digits) < length <= len(data) - at:
            return fields, "a damaged pax header"
        name, _, value = data[at + len(digits) + 1 : at + length - 1].partition(b"=")
        fields[_text(name)] = _text(value)
        at += length
    if not _WHOLE_NUMBER.fullmatch(fields.get("size", "0")):
        return fields, f"a pax header with the size {printable(fields.pop('size'), 40)}"
    return fields, ""


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
