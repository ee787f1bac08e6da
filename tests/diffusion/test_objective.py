import pytest
import torch
from diffusers import DDPMScheduler

from trainer.diffusion.noise import draw
from trainer.diffusion.objective import epsilon_objective
from trainer.diffusion.schedule import scaled_linear


def test_noisy_latents_equal_ddpm_scheduler() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    objective = epsilon_objective(scaled_linear())
    noise, timesteps = draw(torch.arange(64), (4, 8, 6), 1000)
    timesteps[:2] = torch.tensor([0, 999])
    latents = torch.randn(64, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    expected = scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    assert torch.equal(objective.noisy_latents(objective.schedule, latents, noise, timesteps), expected)


def test_target_and_loss_equal_those_of_the_diffusers_example() -> None:
    objective = epsilon_objective(scaled_linear())
    noise, timesteps = draw(torch.arange(6), (4, 8, 6), 1000)
    latents, prediction = torch.randn(2, 6, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    target = objective.target(objective.schedule, latents, noise, timesteps)
    assert torch.equal(target, noise)
    loss = objective.loss(prediction, target)
    assert loss.shape == (6,)
    expected = torch.nn.functional.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    objective = epsilon_objective(scaled_linear())
    prediction = torch.full((2, 4, 64, 64), 300.0, dtype=dtype)  # its square overflows float16
    loss = objective.loss(prediction, torch.zeros(2, 4, 64, 64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 90000.0))
