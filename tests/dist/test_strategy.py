"""What every strategy has in common."""

import pytest
import torch
from torch import nn

from trainer.dist.strategy import Sharing, Strategy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gradients_is_exact_in_any_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in ((300, 70), (7,), (64, 3, 3, 3))]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    norm = Strategy(nn.Identity(), {}, 1, Sharing("single")).grad_norm(gradients)
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(expected, rel=1e-5)
