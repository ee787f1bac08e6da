"""The peak of known cards, and a measured one."""

import pytest
import torch

from trainer.measure.card_peak import card_peak, known_peak


@pytest.mark.parametrize(
    ("card", "dtype", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, 80.0),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2),
        ("Tesla V100-SXM2-32GB", torch.float16, 125.0),
        ("Tesla V100-PCIE-16GB", torch.float16, 112.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA H200", torch.bfloat16, 989.4),
    ],
)
def test_known_cards(card: str, dtype: torch.dtype, tflops: float) -> None:
    peak = known_peak(card, dtype)
    assert peak is not None and peak.flops_per_s == tflops * 1e12


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        ("NVIDIA GeForce RTX 3090", torch.float32),
        ("Tesla V100-SXM2-32GB", torch.bfloat16),
        ("Tesla T4", torch.bfloat16),
        ("Some Other Card", torch.bfloat16),
        ("NVIDIA RTX A4000", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
    ],
)
def test_others_are_measured(card: str, dtype: torch.dtype) -> None:
    assert known_peak(card, dtype) is None


def test_the_cpu_is_measured() -> None:
    peak = card_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops_per_s < 1e14 and "float32" in peak.source
