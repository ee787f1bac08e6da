import torch

from trainer.diffusion.noise import draw, standard_normal

SEEDS = torch.tensor([0, 7, 2**62 + 3, 2**63 - 1])


def test_a_sample_draws_the_same_in_any_batch() -> None:
    noise, timesteps = draw(SEEDS, (4, 8, 6), 1000)
    assert noise.shape == (4, 4, 8, 6)
    assert noise.dtype == torch.float32
    assert timesteps.dtype == torch.int64
    for order in ([2], [3, 1], [1, 1, 0, 2]):
        other_noise, other_timesteps = draw(SEEDS[order], (4, 8, 6), 1000)
        assert torch.equal(other_noise, noise[order])
        assert torch.equal(other_timesteps, timesteps[order])


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(SEEDS, (4, 2, 2), 1000)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(SEEDS, (4, 2, 2), 1000)[0], first[0])


def test_distribution() -> None:
    noise, timesteps = draw(torch.arange(4000), (4, 4, 4), 1000)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert len(counts) == 10
    assert ((counts - 400).abs() < 100).all()  # five standard deviations
    # Noise must not tell the timestep.
    correlation = torch.corrcoef(torch.stack([timesteps.float(), noise.mean(dim=(1, 2, 3))]))[0, 1]
    assert abs(correlation) < 0.08


def test_standard_normal_alone() -> None:
    noise = standard_normal(SEEDS, (4, 8, 6))
    assert noise.shape == (4, 4, 8, 6)
    assert torch.equal(standard_normal(SEEDS[[3, 0]], (4, 8, 6)), noise[[3, 0]])
    assert abs(standard_normal(torch.arange(500), (4, 8, 8)).std() - 1) < 0.01
