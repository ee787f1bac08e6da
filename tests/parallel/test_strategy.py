"""What every strategy has in common."""

import pytest
import torch
from torch import nn

from trainer.parallel.strategy import Sharing, Strategy


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_norm_of_gradients_is_a_number_of_fp32(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in [(300, 70), *[(64, 3, 3, 3)] * 9, (7,)]]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    norm = Strategy(nn.Identity(), {}, 1, Sharing("single")).grad_norm(gradients)
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(expected, rel=error)
