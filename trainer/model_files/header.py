"""The header of a safetensors file, read with bounds, and what a file is that has none. Without torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.guards import DEFAULT_LIMITS, Limits, Refused, open_regular, parse_json, printable

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element of each dtype that safetensors knows."""

MAX_TENSORS = 100_000
_MAX_PUNCTUATION = 1_500_000  # what a header's values can number: each costs up to 100 bytes of memory
_MAX_AXES, _MAX_BYTES = 8, 1 << 48
_SAFETENSORS_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_START_BYTES = 4096


class HeaderFault(Exception):
    """A file is not whole safetensors.

    Attributes:
        kind: one word, see `trainer.model_files.examine.identify.KINDS`.
        description: what the file is, to follow "is".
        mend: what helps, as a clause; may be empty.
    """

    def __init__(self, kind: str, description: str, mend: str = "") -> None:
        super().__init__(description)
        self.kind, self.description, self.mend = kind, description, mend


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Place of its first byte in the file."""
    num_bytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything but the data of a safetensors file."""

    tensors: Mapping[str, TensorEntry]
    """In the order of their data."""
    metadata: Mapping[str, str]
    data_begin: int
    file_bytes: int


def read_header(path: Path, limits: Limits = DEFAULT_LIMITS) -> Header:
    """The checked header of a safetensors file: dtypes known, sizes right, data without gaps, file complete.

    Memory is bounded whatever the file says: a header has at most `limits.header_bytes`, of at most 100,000 tensors.

    Raises:
        HeaderFault: the file is another thing, damaged or cut short.
        OSError: it cannot be read.
    """
    with _opened(path) as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        start = stream.read(_START_BYTES)
        header_bytes = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise _other_file(start, file_bytes, stream)
        if not 2 <= header_bytes <= _SAFETENSORS_MAX_HEADER_BYTES:
            raise _other_file(start, file_bytes, stream)
        if header_bytes > file_bytes - 8:
            raise _cut_short(file_bytes, f"more than {8 + header_bytes:,}")
        if header_bytes > limits.header_bytes:
            most = f"more than the {limits.header_bytes:,} that are read"
            raise _damaged(f"its header has {header_bytes:,} bytes, {most}")
        stream.seek(8)
        text = stream.read(header_bytes)
    tensors, metadata = _parsed(text, limits)
    entries = _checked(tensors, 8 + header_bytes)
    end = 8 + header_bytes + sum(entry.num_bytes for entry in entries.values())
    if file_bytes < end:
        raise _cut_short(file_bytes, f"{end:,}")
    if file_bytes > end:
        raise _damaged(f"{file_bytes - end:,} bytes follow the end that its header names")
    return Header(entries, metadata, 8 + header_bytes, file_bytes)


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except Refused:
        raise HeaderFault("not-a-model", "no regular file") from None


def header_fault(path: Path, limits: Limits = DEFAULT_LIMITS) -> HeaderFault | None:
    """What `read_header` finds wrong with a file; None if it is whole."""
    try:
        read_header(path, limits)
    except HeaderFault as fault:
        return fault
    return None


def _cut_short(file_bytes: int, wanted: str) -> HeaderFault:
    return HeaderFault(
        "truncated",
        f"a safetensors file cut short: it has {file_bytes:,} bytes, and its header says {wanted}",
        "download or copy it again",
    )


def _damaged(why: str) -> HeaderFault:
    return HeaderFault("damaged", f"a damaged safetensors file: {why}", "download or copy it again")


def _parsed(text: bytes, limits: Limits) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors' entries as they stand, and the metadata."""
    try:
        header = parse_json(text, "it", most_bytes=len(text), most_depth=limits.json_depth, most_items=_MAX_PUNCTUATION)
    except Refused as refused:
        raise _damaged(f"its header is wrong: {refused.lines[0].removeprefix('it: ')}") from None
    if not isinstance(header, dict):
        raise _damaged("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata are not texts")
    if len(header) > MAX_TENSORS:
        raise _damaged(f"its header names {len(header):,} tensors, more than the {MAX_TENSORS:,} that are read")
    return header, metadata


def _checked(tensors: Mapping[str, Any], data_begin: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        entries[name] = _checked_entry(_shown(name), entry, data_begin)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)))
    place = data_begin
    for name, entry in entries.items():
        if entry.begin != place:
            raise _damaged(f"the data of {_shown(name)} do not follow those of the tensor before it")
        place += entry.num_bytes
    return entries


def _checked_entry(shown: str, entry: Any, data_begin: int) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(f"its header's entry for {shown} is not a tensor's")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(f"{shown} has the unknown dtype {_shown(str(dtype))}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2 or len(shape) > _MAX_AXES:
        raise _damaged(f"shape or place of {shown} is not given in whole numbers of a sensible size")
    num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != num_bytes:
        raise _damaged(
            f"{shown} of shape {_shown(str(shape))} and dtype {dtype} takes {num_bytes:,} bytes, "
            f"and its header says {offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(dtype, tuple(shape), data_begin + offsets[0], num_bytes)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_BYTES for value in values)


def _shown(text: str) -> str:
    """A name from a file of unknown origin, fit for a terminal."""
    return printable(text, 100)


def _other_file(start: bytes, file_bytes: int, stream: BinaryIO) -> HeaderFault:
    """What a file is that does not begin as safetensors does, from its first bytes."""
    if not file_bytes:
        return HeaderFault("empty", "an empty file", "download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\s", start)
        whole = f" (the file itself has {int(size[1]):,} bytes)" if size else ""
        return HeaderFault("lfs-pointer", f"a git-lfs pointer{whole}", "run `git lfs pull` in its folder")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        title = re.search(rb"<title[^>]*>([^<]{1,80})", text, re.IGNORECASE)
        named = f' ("{_shown(" ".join(title[1].decode("utf-8", "replace").split()))}")' if title else ""
        return HeaderFault(
            "html",
            f"an HTML page{named} saved under a model's name",
            "download the file itself, logged in where the site wants it",
        )
    if text[:1] in (b"{", b"[") and _is_text(text):
        beginning = _shown(" ".join(text[:70].decode("utf-8", "replace").split()))
        return HeaderFault("json", f"a JSON text ({beginning})", "it may be a site's error message")
    for magic, place, kind, description, mend in _MAGIC:
        if start[place : place + len(magic)] == magic:
            if magic == b"PK\x03\x04" and not _is_pickle_zip(start, file_bytes, stream):
                return HeaderFault("zip", "a zip archive", "unpack it")
            return HeaderFault(kind, description, mend)
    if not start.strip(b"\0"):
        return HeaderFault("zeros", "a file of zeros", "a download was begun and not filled; download it again")
    if _is_text(start):
        return HeaderFault("text", f"a text ({_shown(' '.join(start[:60].decode('utf-8', 'replace').split()))})")
    return HeaderFault("not-a-model", "not a safetensors file, nor any other that is known here")


_PICKLE_MEND = "convert it to safetensors"
_MAGIC = (
    (b"PK\x03\x04", 0, "pickle", "a pickled PyTorch checkpoint", _PICKLE_MEND),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", 0, "pickle", "a pickled PyTorch checkpoint of the old format", _PICKLE_MEND),
    (b"ustar", 257, "tar", "a tar archive", "unpack it"),
    (b"\x80", 0, "pickle", "a pickle", _PICKLE_MEND),
    (b"GGUF", 0, "gguf", "a quantised GGUF model", "training wants the weights that it was made of"),
    (b"\x1f\x8b", 0, "archive", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf", 0, "archive", "a 7z archive", "unpack it"),
    (b"Rar!", 0, "archive", "a rar archive", "unpack it"),
    (b"\x89PNG", 0, "image", "a PNG image", ""),
    (b"\xff\xd8\xff", 0, "image", "a JPEG image", ""),
    (b"WEBP", 8, "image", "a WebP image", ""),
)


def _is_pickle_zip(start: bytes, file_bytes: int, stream: BinaryIO) -> bool:
    """torch.save writes `NAME/data.pkl` first; the archive's directory at the end names it as well."""
    stream.seek(max(file_bytes - (1 << 16), 0))
    return b"data.pkl" in start or b"data.pkl" in stream.read(1 << 16)


def _is_text(data: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 for byte in data[:512])
