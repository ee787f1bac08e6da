"""Masked means against their formulas in float64, what they never give, and whose gradient they leave at 0."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from trainer.diffusion.masking import Mean, area_mean, masked_mean, plain_mean
from trainer.diffusion.objective import Objective
from trainer.diffusion.prediction import epsilon
from trainer.diffusion.weighting import min_snr

B, C, H, W = 3, 4, 6, 10
Make = Callable[[float], Mean]


def _losses(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed)).square()


def _masks(seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (B, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("unmasked", [0.0, 0.25, 1.0])
def test_means_are_those_of_the_formulas(unmasked: float) -> None:
    losses, masks = _losses(), _masks()
    weights = unmasked + (1 - unmasked) * masks.numpy().astype(np.float64)[:, None] / 255
    weighted = losses.numpy().astype(np.float64) * weights
    expected = weighted.reshape(B, -1).mean(axis=1)
    np.testing.assert_allclose(masked_mean(unmasked)(losses, masks).numpy(), expected, rtol=1e-6)
    # Over the weights of all channels.
    shares = np.broadcast_to(weights, losses.shape).reshape(B, -1).sum(axis=1)
    expected = weighted.reshape(B, -1).sum(axis=1) / shares
    np.testing.assert_allclose(area_mean(unmasked)(losses, masks).numpy(), expected, rtol=1e-6)


def test_full_masks_change_nothing() -> None:
    losses, full = _losses(), torch.full((B, H, W), 255, dtype=torch.uint8)
    for mean in (masked_mean(), area_mean(), masked_mean(0.3)):
        torch.testing.assert_close(mean(losses, full), plain_mean(losses, None))
    assert torch.equal(plain_mean(losses, None), losses.flatten(1).mean(dim=1))
    assert torch.equal(plain_mean(losses, _masks()), plain_mean(losses, None))


@pytest.mark.parametrize("make", [masked_mean, area_mean])
def test_an_empty_mask_gives_zero_and_no_gradient(make: Make) -> None:
    losses = _losses().requires_grad_()
    masks = _masks()
    masks[1] = 0
    means = make(0.0)(losses, masks)
    means.sum().backward()
    assert means[1] == 0 and means[0] > 0 and torch.isfinite(means).all()
    assert losses.grad is not None and torch.isfinite(losses.grad).all() and not losses.grad[1].any()
    assert make(0.5)(losses, masks)[1] > 0


def test_normalized_means_are_those_of_the_part_that_is_trained() -> None:
    losses, masks = _losses(), torch.zeros(B, H, W, dtype=torch.uint8)
    masks[:, :, :5] = 255
    torch.testing.assert_close(area_mean()(losses, masks), losses[..., :5].flatten(1).mean(dim=1))
    torch.testing.assert_close(masked_mean()(losses, masks), losses[..., :5].flatten(1).mean(dim=1) / 2)
    one = torch.zeros(B, H, W, dtype=torch.uint8)
    one[:, 2, 3] = 1  # the least that is not nothing
    torch.testing.assert_close(area_mean()(losses, one), losses[:, :, 2, 3].mean(dim=1))


@pytest.mark.parametrize("make", [masked_mean, area_mean])
def test_what_is_outside_gives_no_gradient(make: Make) -> None:
    """A model with a weight of its own for each latent: those outside stay exactly as they are."""
    torch.manual_seed(0)
    scale = nn.Parameter(torch.randn(C, H, W))
    inputs, target = torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    masks = torch.full((B, H, W), 255, dtype=torch.uint8)
    masks[:, :, W // 2 :] = 0
    objective = Objective(epsilon(), weigh=min_snr(5.0), mean=make(0.0))
    mixture = objective.mixture(torch.full((B,), 0.3, dtype=torch.float64), torch.arange(B), B)
    objective.losses(inputs * scale, target, mixture, masks).sum().backward()
    assert scale.grad is not None
    assert not scale.grad[..., W // 2 :].any() and scale.grad[..., : W // 2].abs().min() > 0
    # The weight of the noise level and the gradient of the half that is trained, by hand.
    snr = (mixture.signal / mixture.noise) ** 2
    weight = torch.minimum(torch.full_like(snr, 5.0), snr) / snr
    area = C * H * W / (2 if make is area_mean else 1)
    by_hand = (weight.view(-1, 1, 1, 1) * 2 * (inputs * scale - target) * inputs / area).sum(dim=0)
    torch.testing.assert_close(scale.grad[..., : W // 2], by_hand[..., : W // 2].float().detach())
