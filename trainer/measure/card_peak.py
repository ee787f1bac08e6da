"""The most that a device can compute: NVIDIA's figure where the card is known, else a large matrix product's."""

import re
import time
from dataclasses import dataclass

import torch

# Dense TFLOP/s of bf16 (fp16 on V100 and T4) with fp32 accumulation; the first name that is part of the card's own.
# Sources: NVIDIA's whitepapers of GA102 and Ada, RTX Blackwell's architecture paper, data sheets of the others.
_KNOWN_TFLOPS = (
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 6000 Ada", 364.2),
    ("RTX 3090 Ti", 80.0),
    ("RTX 3090", 71.0),
    ("RTX A6000", 154.8),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("V100-PCIE", 112.0),
    ("V100", 125.0),
    ("T4", 65.0),
)
_OTHER_KINDS = r"Laptop|Max-Q|NVL|MIG|SUPER| D\b"  # of the same name, but slower
_WITHOUT_BF16 = ("V100", "T4")
_PRODUCTS = 10


@dataclass(frozen=True)
class CardPeak:
    """Floating point operations a second, at most, and where the figure comes from."""

    flops_per_s: float
    source: str


def known_peak(card: str, dtype: torch.dtype) -> CardPeak | None:
    """NVIDIA's figure for a card, by the name that its driver gives; None for other cards and for fp32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if re.search(_OTHER_KINDS, card):
        return None
    for name, tflops in _KNOWN_TFLOPS:
        if re.search(rf"\b{name}\b", card):
            if dtype == torch.bfloat16 and name.startswith(_WITHOUT_BF16):
                return None
            return CardPeak(tflops * 1e12, f"NVIDIA's figure for {name}, dense")
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> CardPeak:
    """The best of several products of large square matrices; on the CPU with as many threads as this process has."""
    side = 8192 if device.type == "cuda" else 1024
    one, two = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(_PRODUCTS):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(one, two)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - begin)
    flops_per_s = 2 * side**3 / best_s
    name = str(dtype).removeprefix("torch.")
    return CardPeak(flops_per_s, f"a measured {name} product of matrices of {side} x {side}")


def card_peak(device: torch.device, dtype: torch.dtype) -> CardPeak:
    """Of this worker's device, for arithmetic in `dtype`."""
    known = known_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return known or measured_peak(device, dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
