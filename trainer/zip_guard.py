"""Zip archives from outside: `.npz`, `.ckpt`. Members are counted before they are listed, and none unpacks to more
than it declares; standard library alone."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from trainer.guards import DEFAULT_LIMITS, Limits, Refused, open_regular

_END, _END_64, _LOCATOR_64, _MEMBER = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02"
_END_BYTES, _END_64_BYTES, _LOCATOR_BYTES = 22, 56, 20
_LONGEST_COMMENT = (1 << 16) - 1
_DIRECTORY_BYTES_OF_A_MEMBER = 512  # with its name; more of them are refused than read
_LOCAL_HEADER_BYTES = 30
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, OSError, RuntimeError, OverflowError)


@contextmanager
def open_zip(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[zipfile.ZipFile]:
    """An archive to read members from by `read_member`.

    Raises:
        Refused: it is no regular file, no archive, damaged, has more than `limits.archive_members`, or members that
            share their bytes, as in an archive that unpacks to many times its size.
        OSError: it is not there, or cannot be read.
    """
    with open_regular(path) as stream:
        _check_directory(path, stream, limits.archive_members)
        try:
            archive = zipfile.ZipFile(stream)
        except _FAULTS as error:
            raise Refused(f"{path}: is a damaged zip archive ({error})") from None
        with archive:
            _check_members(path, archive)
            yield archive


def read_member(archive: zipfile.ZipFile, name: str, most_bytes: int, where: str) -> bytes:
    """All of one member, never more than it declares; the checksum is compared.

    Args:
        where: the place that a refusal names.
    Raises:
        Refused: there is no such member, it declares more than `most_bytes`, or it is damaged.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise Refused(f"{where}: has no member {name}") from None
    if info.file_size > most_bytes:
        raise Refused(
            f"{where}: its member {name} unpacks to {info.file_size:,} bytes; at most {most_bytes:,} are read"
        )
    if info.compress_type not in _METHODS or info.flag_bits & 1:
        raise Refused(f"{where}: its member {name} is packed in a way that is not read; wanted plain or deflated")
    try:
        with archive.open(info) as member:
            data = member.read(info.file_size)
    except _FAULTS as error:
        raise Refused(f"{where}: its member {name} is damaged ({error})") from None
    if len(data) != info.file_size:
        raise Refused(f"{where}: its member {name} is damaged; it declares {info.file_size:,} bytes, and has fewer")
    return data


def _check_directory(path: Path, stream: BinaryIO, most_members: int) -> None:
    """Size and number of the directory's entries, before anything is made of them."""
    size = stream.seek(0, 2)
    start = max(size - _LONGEST_COMMENT - _END_BYTES, 0)
    stream.seek(start)
    tail = stream.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_BYTES:
        raise Refused(f"{path}: is no whole zip archive; its directory is missing")
    (directory_bytes,) = struct.unpack_from("<I", tail, at + 12)
    end = start + at
    if at >= _LOCATOR_BYTES and tail[at - _LOCATOR_BYTES :].startswith(_LOCATOR_64):
        stream.seek(max(end - _LOCATOR_BYTES - _END_64_BYTES, 0))
        record = stream.read(_END_64_BYTES)
        if not record.startswith(_END_64):
            raise Refused(f"{path}: is a damaged zip archive; its directory is not where its end says")
        (directory_bytes,) = struct.unpack_from("<Q", record, 40)
        end -= _LOCATOR_BYTES + _END_64_BYTES
    many = f"more than {most_members:,} members, or long names; no more are read"
    if directory_bytes > most_members * _DIRECTORY_BYTES_OF_A_MEMBER:
        raise Refused(f"{path}: is a zip archive of {many}")
    stream.seek(max(end - directory_bytes, 0))
    if stream.read(directory_bytes).count(_MEMBER) > most_members:
        raise Refused(f"{path}: is a zip archive of {many}")
    stream.seek(0)


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """No two members have one name or share bytes."""
    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len({info.filename for info in members}) != len(members):
        raise Refused(f"{path}: is a zip archive in which two members have one name")
    for info, following in pairwise(members):
        if info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size > following.header_offset:
            raise Refused(f"{path}: is a zip archive whose members {info.filename} and {following.filename} overlap")
