"""The training step: it learns, and its gradient does not depend on how the step is cut, padded or damaged."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.config.schema import OptimizerConfig
from trainer.data.loader import Batch
from trainer.data.store.rows import RowProblem
from trainer.diffusion.importance import LossHistory
from trainer.diffusion.learner import Learner
from trainer.diffusion.objective import Objective, taught
from trainer.diffusion.prediction import epsilon
from trainer.diffusion.uncertainty import LearnedWeights
from trainer.model.denoiser import Denoiser, TrainedModel
from trainer.model.load_weights import load_unet
from trainer.model_files.run_model import open_model
from trainer.optim.optimizers import make_optimizer
from trainer.parallel.comm import Comm
from trainer.parallel.strategy import Sharing, Strategy
from trainer.train.step import StepParts, batch_losses, by_loss_weight, train_step

ALONE = Comm(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def denoiser(model_folder: Path) -> Denoiser:
    model = TrainedModel(load_unet(open_model(model_folder), torch.float32, "cpu"))
    return Denoiser(model, Objective(epsilon()), None, None, 0.13025)


def make_parts(denoiser: Denoiser, lr: float = 1e-3, max_grad_norm: float = 0.0) -> StepParts:
    own = replace(denoiser, model=copy.deepcopy(denoiser.model).train())
    strategy = Strategy(own.model, dict(own.model.named_parameters()), 1, Sharing("single"))
    optimizer = make_optimizer(strategy.parameters, OptimizerConfig(lr=lr, weight_decay=0.0))
    return StepParts(ALONE, strategy, optimizer, own, max_grad_norm)


def problem(row: int) -> RowProblem:
    return RowProblem("shard", row, 0, "checksum")


def make_batch(rows: range, weights: list[float] | None = None, problems: tuple[RowProblem, ...] = ()) -> Batch:
    """Row i has latents, text and noise of its own, whatever batch it is in."""
    generators = [torch.Generator().manual_seed(row) for row in rows]
    return Batch(
        latents=torch.stack([torch.randn(4, 8, 8, generator=g) * 7 for g in generators]).half(),
        pixels=None,
        vae_seeds=None,
        input_ids=None,
        text_hidden=torch.stack([torch.randn(77, 40, generator=g) for g in generators]).half(),
        pooled=torch.stack([torch.randn(24, generator=g) for g in generators]).half(),
        time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(rows)),
        weights=torch.tensor(weights or [1.0] * len(rows)),
        draw_seeds=torch.tensor(list(rows), dtype=torch.int64),
        keys=tuple(map(str, rows)),
        problems=problems,
    )


def weights_after(parts: StepParts, batches: list[Batch], planned: float) -> tuple[dict[str, Tensor], float, float]:
    result = train_step(parts, batches, len(batches), planned, 1.0, False)
    return dict(parts.denoiser.unet.state_dict()), result.loss, result.grad_norm


def assert_same_step(
    denoiser: Denoiser, batches: list[Batch], planned: float, others: list[Batch], other: float
) -> None:
    """Two ways to take one step give the same loss, gradient norm and weights, to rounding."""
    # SGD-like comparison through the gradient norm: AdamW's first step would hide the gradients' size.
    first, loss_one, norm_one = weights_after(make_parts(denoiser), batches, planned)
    second, loss_two, norm_two = weights_after(make_parts(denoiser), others, other)
    assert loss_one == pytest.approx(loss_two, abs=1e-6)
    assert norm_one == pytest.approx(norm_two, rel=1e-4)
    moved = [abs(first[name] - second[name]) for name in first]
    # A gradient that is zero but for rounding makes a full AdamW step in either direction.
    assert torch.cat([m.flatten() for m in moved]).quantile(0.99) < 1e-5


@pytest.mark.e2e
def test_one_batch_is_learnt_by_heart(denoiser: Denoiser) -> None:
    parts = make_parts(denoiser, max_grad_norm=1.0)
    batch = make_batch(range(4))
    losses = [train_step(parts, [batch], 1, 4.0, 8.0 if step < 80 else 1.0, False).loss for step in range(120)]
    assert losses[0] > 0.8
    assert losses[-1] < 1e-3


def test_micro_batches_make_the_same_step(denoiser: Denoiser) -> None:
    whole, halves = [make_batch(range(4))], [make_batch(range(2)), make_batch(range(2, 4))]
    assert_same_step(denoiser, whole, 4.0, halves, 4.0)


def test_padding_does_not_count(denoiser: Denoiser) -> None:
    assert_same_step(denoiser, [make_batch(range(3))], 3.0, [make_batch(range(4), [1.0, 1.0, 1.0, 0.0])], 3.0)


def test_an_unreadable_row_leaves_the_mean_of_the_others(denoiser: Denoiser) -> None:
    """The plan counted on four images; one could not be read."""
    damaged = make_batch(range(4), [1.0, 1.0, 1.0, 0.0], (problem(3),))
    assert_same_step(denoiser, [make_batch(range(3))], 3.0, [damaged], 4.0)


@pytest.mark.parametrize("cut", [(6,), (2, 2, 2), (1, 5)])
def test_loss_weights_multiply_the_losses_and_leave_the_denominator(denoiser: Denoiser, cut: tuple[int, ...]) -> None:
    """Against each image's loss and gradient alone, summed by hand in float64; row 5 could not be read."""
    loss_weights, readable = [0.5, 0.5, 4.0, 1.0, 0.01, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    expected, total = [torch.zeros_like(p, dtype=torch.float64) for p in denoiser.model.parameters()], 0.0
    alone = make_parts(denoiser)
    for row in range(5):
        (loss,) = batch_losses(alone, make_batch(range(row, row + 1)), 0, 1.0).losses
        total += loss_weights[row] * loss.item() / 5
        for sum_, gradient in zip(expected, torch.autograd.grad(loss, alone.denoiser.model.parameters()), strict=True):
            sum_ += loss_weights[row] * gradient.double() / 5
    batches, begin = [], 0
    for size in cut:
        rows = range(begin, begin + size)
        weights = torch.tensor(loss_weights[begin : begin + size])
        bad = (problem(5),) if 5 in rows else ()
        batches.append(replace(make_batch(rows, readable[begin : begin + size], bad), loss_weights=weights))
        begin += size
    parts = replace(make_parts(denoiser), weigh=by_loss_weight)
    result = train_step(parts, batches, len(batches), 6.0, 1.0, False)
    assert (result.num_images, result.bad_rows) == (5, 1)
    assert result.loss == pytest.approx(total, rel=1e-6)
    moments = [parts.optimizer.state[p]["exp_avg"] for p in parts.strategy.parameters.values()]
    assert result.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-5)
    for moment, gradient in zip(moments, expected, strict=True):  # after one step a tenth of the gradient
        torch.testing.assert_close(moment, (0.1 * gradient).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("learner", [LearnedWeights, LossHistory])
def test_a_learner_looks_at_plain_losses_and_the_told_loss_is_weighted(
    denoiser: Denoiser, learner: Callable[[], Learner]
) -> None:
    """What is learnt of a noise level does not hang on which images are wanted more."""
    batch, alike, apart = make_batch(range(3)), learner(), learner()
    plain, weighted = (
        make_parts(replace(denoiser, objective=taught(denoiser.objective, each))) for each in (alike, apart)
    )
    each = [train_step(make_parts(denoiser), [make_batch(range(i, i + 1))], 1, 1.0, 0.0, False).loss for i in range(3)]
    train_step(plain, [batch], 1, 3.0, 0.0, False)
    batch = replace(batch, loss_weights=torch.tensor([0.25, 1.0, 4.0]))
    result = train_step(replace(weighted, weigh=by_loss_weight), [batch], 1, 3.0, 0.0, False)
    assert result.loss == pytest.approx((0.25 * each[0] + each[1] + 4 * each[2]) / 3, rel=1e-5)
    assert apart.record() == alike.record() != learner().record()


@pytest.mark.parametrize("cut", [(6,), (2, 2, 2), (1, 5)])
@pytest.mark.parametrize("learner", [None, LearnedWeights, LossHistory])
def test_the_sums_by_timestep_are_those_of_each_image_alone(
    denoiser: Denoiser, cut: tuple[int, ...], learner: Callable[[], Learner] | None
) -> None:
    """Each image's loss is put where its own timestep is; row 5 could not be read. All parts together are the loss."""
    if learner:
        denoiser = replace(denoiser, objective=taught(denoiser.objective, learner()))
    readable, expected = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0.0] * 16
    for row in range(5):
        parts = make_parts(denoiser)
        (timestep,) = batch_losses(parts, make_batch(range(row, row + 1)), 0, 1.0).mixture.timesteps.tolist()
        loss = train_step(parts, [make_batch(range(row, row + 1))], 1, 1.0, 0.0, False).loss
        expected[timestep // 125] += loss
        expected[8 + timestep // 125] += 1
    assert sum(value > 0 for value in expected[8:]) > 1, "of several parts"
    ends = [sum(cut[: i + 1]) for i in range(len(cut))]
    batches = [
        make_batch(range(end - size, end), readable[end - size : end]) for size, end in zip(cut, ends, strict=True)
    ]
    result = train_step(make_parts(denoiser), batches, len(cut), 6.0, 0.0, False)
    assert result.by_timestep == pytest.approx(expected, rel=1e-5)
    assert sum(result.by_timestep[:8]) == pytest.approx(result.loss * result.num_images, rel=1e-6)


def test_a_step_without_any_image_changes_nothing(denoiser: Denoiser) -> None:
    parts = make_parts(denoiser)
    before = copy.deepcopy(parts.denoiser.unet.state_dict())
    result = train_step(parts, [make_batch(range(2), [0.0, 0.0], (problem(0), problem(1)))], 1, 2.0, 1.0, False)
    assert result.loss != result.loss and result.num_images == 0 and result.bad_rows == 2
    assert all(torch.equal(before[name], value) for name, value in parts.denoiser.unet.state_dict().items())


def test_clipping_scales_to_the_norm(denoiser: Denoiser) -> None:
    """AdamW forgets a constant scale after its first step, so the clipped moment itself is looked at."""
    free, clipped = make_parts(denoiser), make_parts(denoiser, max_grad_norm=0.01)
    norm = train_step(free, [make_batch(range(4))], 1, 4.0, 1.0, False).grad_norm
    assert train_step(clipped, [make_batch(range(4))], 1, 4.0, 1.0, False).grad_norm == norm > 0.01
    moments = [torch.cat([s["exp_avg"].flatten() for s in p.optimizer.state.values()]) for p in (free, clipped)]
    assert moments[1].norm() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert moments[0].norm() == pytest.approx(0.1 * norm, rel=1e-3)


def test_a_stop_request_is_passed_on(denoiser: Denoiser) -> None:
    parts = make_parts(denoiser)
    assert train_step(parts, [make_batch(range(2))], 1, 2.0, 1.0, True).stop
    assert not train_step(parts, [make_batch(range(2))], 1, 2.0, 1.0, False).stop


def test_a_step_whose_gradients_are_not_finite_changes_nothing(denoiser: Denoiser) -> None:
    parts = make_parts(denoiser)
    before = copy.deepcopy(parts.denoiser.unet.state_dict())
    broken = replace(make_batch(range(2)), latents=torch.full((2, 4, 8, 8), torch.nan, dtype=torch.float16))
    result = train_step(parts, [broken], 1, 2.0, 1.0, False)
    assert math.isnan(result.grad_norm) and not parts.optimizer.state
    assert all(torch.equal(before[name], value) for name, value in parts.denoiser.unet.state_dict().items())


def test_the_loss_scale_leaves_the_step_as_it_is(denoiser: Denoiser) -> None:
    plain, scaled = make_parts(denoiser, max_grad_norm=0.01), make_parts(denoiser, max_grad_norm=0.01)
    one = train_step(plain, [make_batch(range(2))], 1, 2.0, 1.0, False)
    two = train_step(scaled, [make_batch(range(2))], 1, 2.0, 1.0, False, 1024.0)
    assert (two.loss, two.grad_norm) == (one.loss, pytest.approx(one.grad_norm, rel=1e-5))
    moments = [torch.cat([s["exp_avg"].flatten() for s in p.optimizer.state.values()]) for p in (plain, scaled)]
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-9)
