"""Noises dealt out over a step, and images to be told apart from: found by trying all, and the same for any cut."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from tests.train.real_run import ALONE as ONE_WORKER
from tests.train.test_step import make_batch
from trainer.data.loader import Batch
from trainer.diffusion.noise import NoiseRecipe, draw
from trainer.diffusion.objective import Objective
from trainer.diffusion.prediction import flow
from trainer.train.step_companions import ALONE, Meeting, meeting_of, optimal_pairing

PLAIN = NoiseRecipe()


def meet(*batches: Batch) -> dict[int, tuple[int, Tensor, int]]:
    """Of each image that counts, by its seed: whose noise it has, its negative, and whose noise that has."""
    found = {}
    for batch, companions in Meeting(ONE_WORKER, PLAIN, pairs=True, contrasts=True)(batches):
        whose, negatives, theirs = companions.noise_seeds, companions.negatives, companions.negative_seeds
        assert whose is not None and negatives is not None and theirs is not None
        for row, seed in enumerate(batch.draw_seeds.tolist()):
            if batch.weights[row]:
                found[seed] = (int(whose[row]), negatives[row], int(theirs[row]))
    return found


def noise_of(seed: int) -> Tensor:
    return draw(torch.tensor([seed]), (4, 8, 8))[1].noise[0]


def test_the_pairing_is_the_best_of_all() -> None:
    batch = make_batch(range(6))
    assert batch.latents is not None
    images, noises = batch.latents.double(), torch.stack([noise_of(seed) for seed in range(6)]).double()
    costs = {order: float((images - noises[list(order)]).square().sum()) for order in permutations(range(6))}
    best = min(costs, key=costs.__getitem__)
    assert optimal_pairing(batch.latents, batch.draw_seeds, PLAIN).tolist() == list(best)
    assert {seed: row[0] for seed, row in meet(batch).items()} == dict(enumerate(best))


def test_each_image_has_another_one_with_the_noise_that_it_has() -> None:
    batch = make_batch(range(6))
    assert batch.latents is not None
    found = meet(batch)
    taken = []
    for seed, (_, negative, their_noise) in found.items():
        other = next(s for s in range(6) if torch.equal(batch.latents[s], negative))
        assert other != seed and their_noise == found[other][0]
        taken.append(other)
    assert sorted(taken) == list(range(6))


def test_the_cut_changes_nothing_and_padding_takes_no_part() -> None:
    whole = meet(make_batch(range(6)))
    cut = meet(make_batch(range(4, 6)), make_batch(range(2)), make_batch(range(2, 4)))
    padded = meet(make_batch(range(9), [1.0] * 6 + [0.0] * 3))
    for others in (cut, padded):
        assert others.keys() == whole.keys()
        for seed, (whose, negative, their) in whole.items():
            assert others[seed][0] == whose and others[seed][2] == their
            assert torch.equal(others[seed][1], negative)


def test_a_step_of_one_image_has_no_companions() -> None:
    met = list(Meeting(ONE_WORKER, PLAIN, True, True)([make_batch(range(2), [1.0, 0.0])]))
    assert [companions for _, companions in met] == [ALONE]


def test_what_is_not_asked_for_is_not_given() -> None:
    (pair,) = (c for _, c in Meeting(ONE_WORKER, PLAIN, True, False)([make_batch(range(4))]))
    (other,) = (c for _, c in Meeting(ONE_WORKER, PLAIN, False, True)([make_batch(range(4))]))
    assert pair.negatives is None and pair.negative_seeds is None and pair.noise_seeds is not None
    assert other.noise_seeds is None and other.negatives is not None
    assert other.negative_seeds is not None and sorted(other.negative_seeds.tolist()) == [0, 1, 2, 3]
    batches = [make_batch(range(4))]
    ((batch, none),) = meeting_of(Objective(flow()), ONE_WORKER)(batches)
    assert batch is batches[0] and none is ALONE


def test_all_but_the_position_is_drawn_from_the_other_stream() -> None:
    recipe = NoiseRecipe(perturbation=0.1)
    own, theirs = torch.tensor([3, 4]), torch.tensor([4, 3])
    uniforms, plain = draw(own, (4, 8, 8), recipe=recipe)
    swapped_uniforms, swapped = draw(own, (4, 8, 8), "cpu", recipe, theirs)
    assert torch.equal(uniforms, swapped_uniforms)
    assert torch.equal(swapped.noise, plain.noise.flip(0))
    assert swapped.perturbation is not None and plain.perturbation is not None
    assert torch.equal(swapped.perturbation, plain.perturbation.flip(0))


def test_contrastive_flow_matching() -> None:
    """|p - (n - x)|^2 - c |p - (n' - x')|^2, by Stoica et al. 2025, eq. 7."""
    generator = torch.Generator().manual_seed(0)
    image, noise, other, other_noise, prediction = torch.randn(5, 2, 4, 8, 8, generator=generator)
    objective = Objective(flow(), contrast=0.05)
    mixture = flow().mix(torch.tensor([0.2, 0.7], dtype=torch.float64))
    found = objective.losses(prediction, noise - image, mixture, other_noise - other)
    expected = (prediction - noise + image) ** 2 - 0.05 * (prediction - other_noise + other) ** 2
    assert found.tolist() == pytest.approx(expected.mean(dim=(1, 2, 3)).tolist(), rel=1e-6)
