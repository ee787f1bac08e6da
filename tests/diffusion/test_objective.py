import pytest
import torch

from trainer.diffusion.noise import draw
from trainer.diffusion.objective import Objective, mixed_target
from trainer.diffusion.prediction import epsilon


def test_target_and_loss_equal_those_of_the_diffusers_example() -> None:
    objective = Objective(epsilon())
    uniforms, draws = draw(torch.arange(6), (4, 8, 6))
    mixture = objective.mixture(uniforms, torch.arange(6), 6)
    latents, prediction = torch.randn(2, 6, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    target = mixed_target(mixture, latents, draws.noise)
    assert torch.equal(target, draws.noise)
    loss = objective.losses(prediction, target, mixture)
    assert loss.shape == (6,)
    expected = torch.nn.functional.mse_loss(prediction, draws.noise, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    objective = Objective(epsilon())
    mixture = objective.prediction.mix(torch.zeros(2, dtype=torch.float64))
    prediction = torch.full((2, 4, 64, 64), 300.0, dtype=dtype)  # its square overflows float16
    loss = objective.losses(prediction, torch.zeros(2, 4, 64, 64), mixture)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 90000.0))
