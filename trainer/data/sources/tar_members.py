"""The members of a tar file and where their bytes lie, from its 512-byte headers alone; nothing is extracted.

Old, ustar, GNU and pax headers are understood. Python's `tarfile` is not used, because it keeps an object of a
kilobyte for each member that it has passed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_BLOCK = 512
_PADDING_BYTES = 1 << 16
_MOST_NAME_BYTES = 1 << 20
_REGULAR = b"07\0"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"LKxg"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarMember(NamedTuple):
    """A regular file within a tar: `size` bytes from byte `offset` of the tar on."""

    name: str
    offset: int
    size: int
    mtime_ns: int


class BadTar(Exception):
    """The tar cannot be read on from here; the message says why, and from which byte on."""


def walk_tar(path: Path | str) -> Iterator[TarMember]:
    """All regular files of a tar in their order; folders, links and sparse files are passed over.

    A member that is cut off by the end of the file is not among them: all that are yielded are there in full.

    Raises:
        BadTar: the tar is damaged or compressed; what was before has been yielded.
        OSError: the file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _walk(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _walk(fd: int, file_bytes: int) -> Iterator[TarMember]:
    at = 0
    long_name, pax = "", {}
    while at + _BLOCK <= file_bytes:
        block = os.pread(fd, _BLOCK, at)
        if not block.strip(b"\0"):
            _check_padding(fd, at, file_bytes)
            return
        if not _sum_is_right(block):
            kind = _COMPRESSED.get(block[:2]) if at == 0 else None
            reason = f"it is compressed ({kind}); decompress it" if kind else "no tar header"
            raise BadTar(f"byte {at}: {reason}")
        kind, size, data = block[156], _number(block[124:136], at), at + _BLOCK
        size = int(pax.get("size", size)) if kind not in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL) else size
        if data + size > file_bytes:
            raise BadTar(f"byte {at}: the tar ends before this member does")
        at = data + -(-size // _BLOCK) * _BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL):
            if size > _MOST_NAME_BYTES:
                raise BadTar(f"byte {data - _BLOCK}: a name of {size} bytes")
            if kind == _LONG_NAME:
                long_name = _text(os.pread(fd, size, data).split(b"\0")[0])
            elif kind == _PAX:
                pax = _pax_fields(os.pread(fd, size, data), data)
            continue
        if kind in _REGULAR and not any(field.startswith("GNU.sparse") for field in pax):
            name = pax.get("path") or long_name or _name(block)
            if not name.endswith("/"):
                yield TarMember(name, data, size, _number(block[136:148], data) * 10**9)
        long_name, pax = "", {}
    if file_bytes == 0:
        raise BadTar("byte 0: the file is empty")
    if os.pread(fd, _BLOCK, at).strip(b"\0"):
        raise BadTar(f"byte {at}: the tar ends within a header")


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
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    return int(stated, 8) in (total, signed)


def _number(field: bytes, at: int) -> int:
    """Octal digits, or from a first byte of 0x80 on the rest as a big-endian number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if field[0] > 0x80 or digits.strip(b"01234567"):
        raise BadTar(f"byte {at}: a header with the number {field!r}")
    return int(digits, 8) if digits else 0


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax_fields(data: bytes, at: int) -> dict[str, str]:
    """Records `<length> <field>=<value>\\n`."""
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise BadTar(f"byte {at}: a damaged pax header")
        field, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[_text(field)] = _text(value)
        data = data[int(length) :]
    if not fields.get("size", "0").isdigit():
        raise BadTar(f"byte {at}: a pax header with the size {fields['size']!r}")
    return fields


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
