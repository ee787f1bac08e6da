"""Rounding to bf16: random bits without pattern, the right expectation, and updates that arrive."""

import pytest
import torch
from torch import Tensor, nn

from trainer.optim.adamw import BlockAdamW, Rounding
from trainer.optim.rounding import random_bits, round_stochastically, round_with_compensation, rounding_key

CPU = torch.device("cpu")
ROWS, WIDTH = 4096, 128
N = ROWS * WIDTH


def key_of(draw: int) -> Tensor:
    return torch.tensor(rounding_key(draw), dtype=torch.int32)


def halves(key: Tensor, first: int = 0) -> Tensor:
    """Low and high 16 bits, [2, N]."""
    bits = random_bits(first, ROWS, WIDTH, key, CPU).view(-1)
    return torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF]).double()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_bits_are_uniform_and_uncorrelated() -> None:
    keys = [key_of(draw) for draw in (12345 << 40, 67890 << 20, 1, 2)]
    drawn = [halves(key) for key in keys]
    noise = 5 / N**0.5
    for bits in drawn:
        counts = torch.histc(bits, bins=256, min=0, max=65536)
        chi_squared = float(((counts - 2 * N / 256).square() / (2 * N / 256)).sum())
        assert 255 - 5 * 510**0.5 < chi_squared < 255 + 5 * 510**0.5
        assert abs(correlation(bits[0], bits[1])) < noise
        for lag in (1, 2, WIDTH, 1 << 16):  # neighbours, and the same place of other rows
            assert abs(correlation(bits[:, lag:], bits[:, :-lag])) < noise
        for bit in range(16):
            assert abs(float(((bits.long() >> bit) & 1).double().mean()) - 0.5) < noise
    for i in range(len(keys)):  # another step or parameter is another key
        for other in drawn[i + 1 :]:
            assert abs(correlation(drawn[i], other)) < noise


def test_a_part_draws_what_the_whole_draws() -> None:
    key = key_of(99)
    whole = random_bits(0, 10, 6, key, CPU)
    assert torch.equal(random_bits(4 * 6, 3, 6, key, CPU), whole[4:7])
    for block in (12, 7, 1):
        exact = torch.randn(10, block)
        rounded = round_stochastically(exact.clone(), 0, key)
        assert torch.equal(round_stochastically(exact[4:7].clone(), 4, key), rounded[4:7])


@pytest.mark.parametrize("fraction", [1 / 1024, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_expectation_is_the_exact_number(fraction: float, sign: float) -> None:
    below, above = sign, sign * (1 + 2**-7)  # neighbours in bf16
    exact = below + fraction * (above - below)
    rounded = round_stochastically(torch.full((ROWS, 2 * WIDTH), exact), 0, key_of(7)).double()
    assert set(rounded.unique().tolist()) == {below, above}
    share = float((rounded == above).double().mean())
    assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / (2 * N)) ** 0.5


def test_numbers_of_bf16_stay_and_nan_and_infinity_too() -> None:
    numbers = torch.randn(8, 256).bfloat16()
    assert torch.equal(round_stochastically(numbers.float(), 0, key_of(1)), numbers)
    odd = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]])
    assert torch.equal(round_stochastically(odd.clone(), 0, key_of(1)).float().nan_to_num(5.0), odd.nan_to_num(5.0))


def test_compensation_keeps_what_rounding_drops() -> None:
    exact = torch.randn(64, 256) * 0.02
    compensation = torch.zeros(64, 256, dtype=torch.bfloat16)
    rounded = round_with_compensation(exact, compensation)
    assert torch.equal(rounded, exact.bfloat16())
    error = (rounded.double() + compensation.double() - exact.double()).abs()
    assert bool((error <= exact.double().abs() * 2**-17).all())


def landed(rounding: Rounding | None, steps: int, lr: float) -> float:
    """Share of fp32 AdamW's change that bf16 weights (with their compensation) made under the same gradients.

    Without `rounding` they are rounded to the nearest after each step: the contrast, which the trainer refuses.
    """
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(1024, 512, generator=generator) * 0.02).bfloat16()
    signal = torch.randn(1024, 512, generator=generator)
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    exact, ours = nn.Parameter(start.float()), nn.Parameter(start.clone() if rounding else start.float())
    reference = torch.optim.AdamW([exact], **settings)
    optimizer = BlockAdamW([{"params": [("w", ours)], **settings}], eight_bit=False, rounding=rounding)
    for _ in range(steps):
        gradient = (signal + torch.randn(1024, 512, generator=generator)).bfloat16()
        exact.grad = gradient.float()
        ours.grad = gradient.to(ours.dtype)
        reference.step()
        optimizer.step()
        if rounding is None:
            ours.data.copy_(ours.data.bfloat16())
    change = ours.detach().double() - start.double()
    if rounding == "kahan":
        change += optimizer.state[ours]["compensation"].double()
    wanted = exact.detach().double() - start.double()
    return float((change * wanted).sum() / wanted.square().sum())


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_small_updates_arrive(rounding: Rounding) -> None:
    assert abs(landed(rounding, 20, 1.5e-6) - 1) < 0.02


def test_rounding_to_the_nearest_would_lose_them() -> None:
    assert landed(None, 20, 1.5e-6) < 0.03
    assert landed(None, 20, 1.2e-5) < 0.2
