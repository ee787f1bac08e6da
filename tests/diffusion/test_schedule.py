import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from trainer.diffusion.schedule import scaled_linear


def test_equals_the_schedulers_of_diffusers_to_the_bit() -> None:
    sdxl = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    schedule = scaled_linear()
    assert schedule.num_timesteps == 1000
    assert schedule.alphas_cumprod.dtype == torch.float32
    for scheduler in (DDPMScheduler(**sdxl), EulerDiscreteScheduler(**sdxl)):
        assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)


def test_falls_from_almost_one_to_almost_zero() -> None:
    alphas_cumprod = scaled_linear().alphas_cumprod
    assert (alphas_cumprod.diff() < 0).all()
    assert 0.999 < alphas_cumprod[0] < 1
    assert 0.004 < alphas_cumprod[-1] < 0.005
