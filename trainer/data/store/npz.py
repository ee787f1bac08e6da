"""kohya's cached latents: one `.npz` with the latents of one image, read from bytes without unpacking it.

    latents        float32 [4, H/8, W/8], unscaled
    original_size  [width, height] of the image before any resize
    crop_ltrb      [left, top, right, bottom] in the resized image
    latents_flipped   those of the mirrored image
    alpha_mask     float32 [H, W], 0..1: how much each place is trained

Only `latents` must be there; the `alpha_mask` is read where it is asked for. Files with latents of several sizes have
all names with the size behind it, height before width: `latents_128x96`. A zip archive is parsed here because `zipfile`
and `np.load` take longer than all the rest of reading a row.
"""

import ast
import math
import re
import struct
import zlib
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from trainer.data.masks import FULL, fill_stored_mask
from trainer.errors import printable

_END = struct.Struct("<4s6xHII2x")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")
_LOCAL = struct.Struct("<4s22xHH")
_END_SIGN, _ENTRY_SIGN, _LOCAL_SIGN = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 1
_LONGEST_COMMENT = 0xFFFF
_MOST_BYTES = 1 << 28
_MOST_NUMBERS_BYTES = 4096
_MOST_LATENTS = 1 << 21  # height x width: an image of 134 megapixels
_TYPE = re.compile("[<>|=]?(?:f[248]|[iu][1248]|b1)")  # of numbers; others may hold Python objects
HEAD_BYTES = 1024
_F16_EXPONENT = np.uint16(0x7C00)
_SIZED = re.compile(r"latents_([1-9]\d{0,4})x([1-9]\d{0,4})")


class BadNpz(Exception):
    """These bytes are no latents that can be used; the message says why."""


class NpzSizes(NamedTuple):
    """What the archive tells of the image, where it does: original_hw, and crop_top_left in the resized image."""

    original_hw: tuple[int, int] | None
    crop_top_left: tuple[int, int] | None


class _Member(NamedTuple):
    method: int
    crc32: int
    begin: int
    size: int
    full_size: int


def read_latents(
    data: bytes | bytearray, latents: np.ndarray, mirrored: bool = False, mask: np.ndarray | None = None
) -> NpzSizes:
    """Fill `latents` (f16 [4, h, w], contiguous) with those in the archive, unscaled as they are there.

    With `mirrored`, with those of the mirrored image where the archive has them, and then the crop is the mirrored
    one: as in kohya's sd-scripts, its left edge is the bucket's width less the right edge that is stored.

    A bytearray is read faster than bytes are.

    Args:
        mask: u8 [h, w], filled with the archive's `alpha_mask`, 255 where it has none.

    Raises:
        BadMask: the mask has another shape, or values beyond 0..1.
        BadNpz: the archive is damaged (its checksums are compared), the latents have another shape, or values that are
            not finite or too large for fp16. The buffer then holds anything.
    """
    members = _members(data)
    height, width = latents.shape[1:]
    size = "" if "latents" in members else f"_{height}x{width}"
    mirrored = mirrored and f"latents_flipped{size}" in members
    values = _array(data, members, f"latents_flipped{size}" if mirrored else f"latents{size}")
    if values.shape != latents.shape:
        raise BadNpz(f"latents of shape {list(values.shape)}, but its bucket needs {list(latents.shape)}")
    _to_f16(values, latents)
    # A value beyond fp16 has become infinite.
    if (np.bitwise_and(latents.view(np.uint16), _F16_EXPONENT) == _F16_EXPONENT).any():
        raise BadNpz("latents with values that are not finite, or too large for fp16")
    if mask is not None:
        mask[:] = FULL
        if f"alpha_mask{size}" in members:
            fill_stored_mask(_array(data, members, f"alpha_mask{size}"), mirrored, mask)
    original_hw = crop_top_left = None
    if f"original_size{size}" in members:
        original_w, original_h = _numbers(data, members, f"original_size{size}", 2)
        if min(original_w, original_h) < 1:
            raise BadNpz(f"original_size is {original_w} x {original_h}")
        original_hw = original_h, original_w
    if f"crop_ltrb{size}" in members:
        left, top, right, _ = _numbers(data, members, f"crop_ltrb{size}", 4)
        crop_top_left = max(0, top), max(0, 8 * width - right if mirrored else left)
    return NpzSizes(original_hw, crop_top_left)


def _to_f16(values: np.ndarray, latents: np.ndarray) -> None:
    if values.dtype == np.float32 and values.flags.writeable and values.flags.c_contiguous:
        # Imported here because `prepare` in its first process does without it. NumPy takes 40 times as long.
        import torch

        torch.from_numpy(latents).copy_(torch.from_numpy(values))
        return
    if values.dtype.kind != "f":
        raise BadNpz(f"latents of type {values.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(latents, values, casting="same_kind")


def latents_hw(data: bytes) -> tuple[int, int]:
    """Height and width of the latents in an archive; BadNpz where it holds none that can be used."""
    members = _members(data)
    if "latents" not in members:
        sizes = [match for match in map(_SIZED.fullmatch, members) if match]
        if len(sizes) > 1:
            raise BadNpz("holds latents of several sizes; name one as train_resolution in the metadata")
        if sizes:
            return _checked_hw(_array(data, members, sizes[0][0]).shape)
    return _checked_hw(_array(data, members, "latents").shape)


def latents_hw_of_head(head: bytes, file_bytes: int = _MOST_BYTES) -> tuple[int, int] | None:
    """The same from the archive's first `HEAD_BYTES`; None where they do not tell."""
    if len(head) < _LOCAL.size or not head.startswith(_LOCAL_SIGN):
        return None
    _, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    begin = _LOCAL.size + name_bytes + extra_bytes
    method = int.from_bytes(head[8:10], "little")
    if head[_LOCAL.size : _LOCAL.size + name_bytes] != b"latents.npy" or method != _STORED or begin + 256 > len(head):
        return None
    dtype, shape, _, _ = _npy_header(bytes(head[begin:]))
    height_width = _checked_hw(shape)
    if math.prod(shape) * dtype.itemsize > file_bytes:
        raise BadNpz(f"latents of shape {list(shape)}, for which the archive is too short")
    return height_width


def _checked_hw(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 3 or shape[0] != 4 or not all(shape):
        raise BadNpz(f"latents of shape {list(shape)}, not [4, height, width]")
    if shape[1] * shape[2] > _MOST_LATENTS:
        raise BadNpz(f"latents of shape {list(shape)}; at most {_MOST_LATENTS:,} places are read")
    return shape[1], shape[2]


def _members(data: bytes | bytearray) -> dict[str, _Member]:
    """The archive's members by name, without `.npy`."""
    end = len(data) - 22
    if end < 0:
        raise BadNpz("is empty" if not data else "no zip archive, or cut off")
    if not data.startswith(_END_SIGN, end):
        end = data.rfind(_END_SIGN, max(0, end - _LONGEST_COMMENT), end + len(_END_SIGN))
        if end < 0:
            raise BadNpz("no zip archive, or cut off")
    _, count, _, at = _END.unpack_from(data, end)
    members = {}
    try:
        for _ in range(count):
            sign, flags, method, crc32, size, full_size, name_bytes, extra_bytes, comment_bytes, local = (
                _ENTRY.unpack_from(data, at)
            )
            local_sign, local_name, local_extra = _LOCAL.unpack_from(data, local)
            if sign != _ENTRY_SIGN or local_sign != _LOCAL_SIGN:
                raise BadNpz("a damaged zip archive")
            name = data[at + _ENTRY.size : at + _ENTRY.size + name_bytes].decode("latin-1").removesuffix(".npy")
            begin = local + _LOCAL.size + local_name + local_extra
            if begin + size > len(data) or full_size > _MOST_BYTES or flags & _ENCRYPTED:
                raise BadNpz("a damaged zip archive")
            members[name] = _Member(method, crc32, begin, size, full_size)
            at += _ENTRY.size + name_bytes + extra_bytes + comment_bytes
    except struct.error:
        raise BadNpz("a damaged zip archive") from None
    return members


def _array(
    data: bytes | bytearray, members: dict[str, _Member], name: str, most_bytes: int = _MOST_BYTES
) -> np.ndarray:
    member = members.get(name)
    if member is None:
        others = printable(", ".join(islice(members, 5)), 90)
        raise BadNpz(f"holds no {name}" + (f", but {others}" if members else ""))
    if not 0 < member.full_size <= most_bytes:
        raise BadNpz(f"{name} of {member.full_size:,} bytes; at most {most_bytes:,} are read")
    raw: bytes | memoryview = memoryview(data)[member.begin : member.begin + member.size]
    if member.method == _DEFLATED:
        try:
            # One byte more than it should have would show that it has others; and 0 would be no limit.
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, member.full_size + 1)
        except zlib.error as error:
            raise BadNpz(f"damaged {name} ({error})") from error
    elif member.method != _STORED:
        raise BadNpz(f"{name} compressed in a way that NumPy does not write")
    if len(raw) != member.full_size or zlib.crc32(raw) != member.crc32:
        raise BadNpz(f"checksum mismatch in {name}")
    dtype, shape, fortran, begin = _npy_header(bytes(raw[:HEAD_BYTES]))
    if len(raw) - begin != dtype.itemsize * math.prod(shape):
        raise BadNpz(f"{name} of another size than its header tells")
    return np.frombuffer(raw, dtype=dtype, offset=begin).reshape(shape, order="F" if fortran else "C")


def _npy_header(start: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, whether columns come first, and where the values begin."""
    version = start[6:7]
    size_bytes = 2 if version == b"\x01" else 4
    begin = 8 + size_bytes
    end = begin + int.from_bytes(start[8:begin], "little")
    if not start.startswith(b"\x93NUMPY") or version not in (b"\x01", b"\x02", b"\x03") or end > len(start):
        raise BadNpz("an array without NumPy's header")
    return *_described(start[begin:end]), end


@lru_cache(maxsize=1024)
def _described(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """What an .npy header says. The files of one bucket all have the same, so that few are ever parsed."""
    try:
        fields = ast.literal_eval(header.decode("latin-1"))
        descr, shape = fields["descr"], fields["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, ArithmeticError, MemoryError, RecursionError) as error:
        raise BadNpz("an array with a damaged header") from error
    if not isinstance(descr, str) or not _TYPE.fullmatch(descr):
        raise BadNpz(f"an array of type {printable(str(descr), 60)}")
    if not isinstance(shape, tuple) or any(type(size) is not int or not 0 <= size <= _MOST_BYTES for size in shape):
        raise BadNpz(f"an array of shape {_shown(shape)}")
    return np.dtype(descr), shape, bool(fields.get("fortran_order"))


def _shown(shape: object) -> str:
    try:
        return printable(repr(shape), 60)
    except ValueError:  # a number of thousands of digits
        return "with a size of thousands of digits"


def _numbers(data: bytes | bytearray, members: dict[str, _Member], name: str, count: int) -> list[int]:
    """A few pixels, stored as integers or as floats."""
    values = _array(data, members, name, _MOST_NUMBERS_BYTES)
    if values.shape != (count,) or not np.isfinite(values).all() or np.abs(values).max(initial=0) > _MOST_BYTES:
        raise BadNpz(f"{name} is not {count} numbers of pixels")
    return [int(value) for value in values.tolist()]
