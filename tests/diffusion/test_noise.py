import pytest
import torch

from trainer.diffusion.noise import PLAIN, NoiseRecipe, draw, mixed_noise, standard_normal

SEEDS = torch.tensor([0, 7, 2**62 + 3, 2**63 - 1])
ALL = NoiseRecipe(offset=0.1, offset_probability=0.5, pyramid_levels=3, perturbation=0.1, candidates=2)


@pytest.mark.parametrize("recipe", [PLAIN, ALL], ids=["plain", "all"])
def test_a_sample_draws_the_same_in_any_batch(recipe: NoiseRecipe) -> None:
    uniforms, draws = draw(SEEDS, (4, 8, 6), recipe=recipe)
    latents = torch.randn(4, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    noise, input_noise = mixed_noise(draws, latents, recipe)
    assert noise.shape == (4, 4, 8, 6) and noise.dtype == torch.float32 and uniforms.dtype == torch.float64
    for order in ([2], [3, 1], [1, 1, 0, 2]):
        other_uniforms, other = draw(SEEDS[order], (4, 8, 6), recipe=recipe)
        other_noise, other_input = mixed_noise(other, latents[order], recipe)
        assert torch.equal(other_uniforms, uniforms[order])
        assert torch.equal(other_noise, noise[order]) and torch.equal(other_input, input_noise[order])


def test_what_is_added_changes_neither_position_nor_plain_noise() -> None:
    uniforms, draws = draw(SEEDS, (4, 8, 6))
    for recipe in (NoiseRecipe(offset=0.1), NoiseRecipe(perturbation=0.1)):
        other_uniforms, other = draw(SEEDS, (4, 8, 6), recipe=recipe)
        assert torch.equal(other_uniforms, uniforms) and torch.equal(other.noise, draws.noise)


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(SEEDS, (4, 2, 2), recipe=ALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(SEEDS, (4, 2, 2), recipe=ALL)[1].noise, first[1].noise)


def test_distribution() -> None:
    uniforms, draws = draw(torch.arange(4000), (4, 4, 4))
    noise, timesteps = draws.noise, (uniforms * 1000).long()
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


@pytest.mark.parametrize(
    "recipe",
    [
        NoiseRecipe(offset=0.5),
        NoiseRecipe(offset=0.5, offset_probability=0.3),
        NoiseRecipe(offset=0.1, offset_adaptive=0.4),
        NoiseRecipe(pyramid_levels=6, pyramid_discount=0.8),
    ],
)
def test_the_targets_noise_has_the_variance_of_the_schedule(recipe: NoiseRecipe) -> None:
    """Over 4,000 samples; what is added is seen in the variance of the samples' means, by its formula."""
    _, draws = draw(torch.arange(4000), (4, 8, 8), recipe=recipe)
    latents = torch.full((4000, 4, 8, 8), -1.5)
    noise, input_noise = mixed_noise(draws, latents, recipe)
    assert torch.equal(noise, input_noise)
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    of_means = noise.mean(dim=(2, 3)).var().item()
    if recipe.has_offset:
        strength = recipe.offset + 1.5 * recipe.offset_adaptive
        shifted = (strength**2 + 1 / 64) / (1 + strength**2)
        share = recipe.offset_probability
        assert of_means == pytest.approx(share * shifted + (1 - share) / 64, rel=0.1)
    else:
        assert of_means > 3 / 64


def test_perturbation_is_in_the_input_alone() -> None:
    recipe = NoiseRecipe(perturbation=0.3)
    _, draws = draw(torch.arange(2000), (4, 8, 8), recipe=recipe)
    noise, input_noise = mixed_noise(draws, torch.zeros(2000, 4, 8, 8), recipe)
    assert torch.equal(noise, draws.noise)
    assert (input_noise - noise).std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([(input_noise - noise).flatten(), noise.flatten()]))[0, 1]) < 0.01


def test_the_nearest_of_several_noises_is_taken() -> None:
    recipe = NoiseRecipe(candidates=4)
    _, draws = draw(torch.arange(50), (4, 3, 5), recipe=recipe)
    latents = torch.randn(50, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    noise, _ = mixed_noise(draws, latents, recipe)
    for row in range(50):
        distances = [float((candidate - latents[row]).norm()) for candidate in draws.noise[row]]
        assert torch.equal(noise[row], draws.noise[row, distances.index(min(distances))])
    assert {candidate.shape for candidate in draws.noise[0]} == {(4, 3, 5)}


def test_standard_normal_alone() -> None:
    noise = standard_normal(SEEDS, (4, 8, 6))
    assert noise.shape == (4, 4, 8, 6)
    assert torch.equal(standard_normal(SEEDS[[3, 0]], (4, 8, 6)), noise[[3, 0]])
    assert abs(standard_normal(torch.arange(500), (4, 8, 8)).std() - 1) < 0.01
