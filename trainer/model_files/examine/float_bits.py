"""Floating-point numbers of model files as bits: faults found without converting, values, and rounding; numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point dtype of safetensors files. Magnitudes compare as their bits without the sign do."""

    bits: type[np.unsignedinteger]
    magnitude: int
    """Mask of all bits but the sign."""
    infinity: int | None
    """Its bits; None where the format has none."""
    largest: int
    """Bits of the largest finite value; above it and above infinity is NaN."""
    beyond_fp16: int
    """Bits of the largest value that fp16 can hold; finite ones above it overflow."""
    mantissa: int
    """Its bits: of two formats, the one with fewer is the coarser."""


FORMATS = {
    "F64": FloatFormat(np.uint64, (1 << 63) - 1, 0x7FF << 52, (0x7FF << 52) - 1, 0x40EFFC0000000000, 52),
    "F32": FloatFormat(np.uint32, 0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF, 0x477FE000, 23),
    "F16": FloatFormat(np.uint16, 0x7FFF, 0x7C00, 0x7BFF, 0x7BFF, 10),
    "BF16": FloatFormat(np.uint16, 0x7FFF, 0x7F80, 0x7F7F, 0x477F, 7),
    "F8_E4M3": FloatFormat(np.uint8, 0x7F, None, 0x7E, 0x7E, 3),
    "F8_E5M2": FloatFormat(np.uint8, 0x7F, 0x7C, 0x7B, 0x7B, 2),
}
"""Formats by safetensors' names."""


@dataclass(frozen=True)
class Faults:
    """What is amiss in numbers."""

    nan: int = 0
    infinite: int = 0
    beyond_fp16: int = 0
    """Finite values of more than 65504."""
    largest: float = 0.0
    """The largest finite magnitude."""

    def __add__(self, other: Faults) -> Faults:
        return Faults(
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.beyond_fp16 + other.beyond_fp16,
            max(self.largest, other.largest),
        )


def faults(data: bytes | memoryview, dtype: str) -> Faults:
    """Counts NaN, infinite values and what would overflow in fp16.

    Args:
        data: whole elements.
        dtype: one of `FORMATS`.
    """
    form = FORMATS[dtype]
    magnitudes = np.frombuffer(data, form.bits) & form.bits(form.magnitude)
    if not magnitudes.size:
        return Faults()
    top = int(magnitudes.max())
    if top <= min(form.largest, form.beyond_fp16):
        return Faults(largest=_value(top, dtype))
    infinite = 0 if form.infinity is None else int(np.count_nonzero(magnitudes == form.infinity))
    finite = magnitudes[magnitudes <= form.largest]
    return Faults(
        nan=magnitudes.size - finite.size - infinite,
        infinite=infinite,
        beyond_fp16=int(np.count_nonzero(finite > form.beyond_fp16)),
        largest=_value(int(finite.max()), dtype) if finite.size else 0.0,
    )


def values(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """The numbers as float32 (of F64: float64), exactly.

    Args:
        data: whole elements.
        dtype: one of `FORMATS`.
    """
    bits = np.frombuffer(data, FORMATS[dtype].bits)
    if dtype == "F64":
        return bits.view(np.float64)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        if dtype == "F16":
            return bits.view(np.float16).astype(np.float32)
        if dtype == "F8_E5M2":
            return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return _E4M3[bits]


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 numbers rounded to the nearest of a coarser format, ties to even; as they are for fp8.

    Args:
        numbers: float32 or float64.
        dtype: one of `FORMATS`.
    """
    if dtype == "F32":
        return numbers.astype(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(numbers), nearest.view(np.float32), numbers)
    return numbers


def _value(magnitude: int, dtype: str) -> float:
    return float(values(np.array([magnitude], FORMATS[dtype].bits).tobytes(), dtype)[0])


def _e4m3_table() -> np.ndarray:
    """All 256 values of FP8 E4M3 ("FP8 Formats for Deep Learning", arXiv:2209.05433): bias 7, no infinity."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    small, normal = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    table = np.where(exponent == 0, small, normal) * np.where(codes > 127, -1, 1)
    table[(codes & 0x7F) == 0x7F] = np.nan
    return table.astype(np.float32)


_E4M3 = _e4m3_table()
