"""AdamW against the paper's formula, and its state through tensors and back."""

import pytest
import torch
from torch import nn

from trainer.config.schema import OptimizerConfig
from trainer.errors import UserError
from trainer.optim.adamw import BlockAdamW
from trainer.optim.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors, scale_lr


def test_two_steps_follow_the_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, written out."""
    start = torch.tensor([0.5, -2.0, 3.0])
    gradients = [torch.tensor([0.1, -0.2, 0.3]), torch.tensor([-0.4, 0.1, 0.2])]
    config = OptimizerConfig(lr=0.1, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.05)
    parameter = nn.Parameter(start.clone())
    optimizer = make_optimizer({"w": parameter}, config)
    expected, first, second = start.double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        first = 0.9 * first + 0.1 * g
        second = 0.99 * second + 0.01 * g * g
        update = first / (1 - 0.9**t) / ((second / (1 - 0.99**t)).sqrt() + 1e-8)
        expected = expected - 0.1 * (update + 0.05 * expected)
    assert torch.allclose(parameter.detach().double(), expected, atol=1e-6)


def test_state_goes_through_tensors_and_back() -> None:
    """A new optimizer with the loaded state takes the same next step, to the bit."""
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.01)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = make_optimizer(dict(ours.named_parameters()), config)
    for _ in range(3):
        ours(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.load_state_dict(ours.state_dict())
    tensors = {
        name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, dict(ours.named_parameters())).items()
    }
    assert set(tensors) == {f"{p}.{s}" for p in ("weight", "bias") for s in ("exp_avg", "exp_avg_sq", "step")}
    other = make_optimizer(dict(theirs.named_parameters()), config)
    load_optimizer_tensors(other, dict(theirs.named_parameters()), tensors.items())
    batch = torch.randn(4, 3)
    for module, opt in ((ours, optimizer), (theirs, other)):
        module(batch).square().sum().backward()
        opt.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_groups_have_their_own_learning_rates() -> None:
    unet, text = nn.Linear(3, 2), nn.Linear(2, 2)
    groups = {
        "unet": {f"unet.{name}": p for name, p in unet.named_parameters()},
        "text_encoder_1": {f"text_encoder_1.{name}": p for name, p in text.named_parameters()},
    }
    optimizer = make_optimizer(groups, OptimizerConfig(lr=1e-3), peak_lrs={"text_encoder_1": 1e-4})
    assert scale_lr(optimizer, 0.5) == {"unet": 5e-4, "text_encoder_1": 5e-5}
    assert scale_lr(optimizer, {"unet": 1.0, "text_encoder_1": 0.0}) == {"unet": 1e-3, "text_encoder_1": 0.0}
    before = [p.detach().clone() for p in (*unet.parameters(), *text.parameters())]
    for parameter in (*unet.parameters(), *text.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [not torch.equal(p, was) for p, was in zip((*unet.parameters(), *text.parameters()), before, strict=True)]
    assert moved == [True, True, False, False]
    with pytest.raises(ValueError, match="same name"):
        make_optimizer({"a": dict(unet.named_parameters()), "b": dict(text.named_parameters())}, OptimizerConfig(lr=1))


def test_fused_where_all_is_fp32_and_ours_elsewhere() -> None:
    def kind_of(kind: str, dtype: torch.dtype, **more: str) -> type:
        named = {"w": nn.Parameter(torch.zeros(64, 64, dtype=dtype))}
        config = OptimizerConfig.model_validate({"lr": 1e-3, "kind": kind})
        return type(make_optimizer(named, config, **more))

    assert issubclass(kind_of("adamw", torch.float32), torch.optim.AdamW)
    assert kind_of("adamw_8bit", torch.float32) is BlockAdamW
    assert kind_of("adamw", torch.bfloat16, rounding="stochastic") is BlockAdamW
    with pytest.raises(ValueError, match="bf16 weights need it"):
        kind_of("adamw", torch.bfloat16)
    with pytest.raises(ValueError, match="others have none"):
        kind_of("adamw", torch.float32, rounding="kahan")


@pytest.mark.parametrize("kinds", [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_of_another_kind_are_refused(kinds: tuple[str, str]) -> None:
    named = {"w": nn.Parameter(torch.zeros(64, 64))}
    first, other = (make_optimizer(named, OptimizerConfig.model_validate({"lr": 1e-3, "kind": kind})) for kind in kinds)
    named["w"].grad = torch.ones(64, 64)
    first.step()
    with pytest.raises(UserError, match=f"go on with optimizer.kind={kinds[0]}$"):
        load_optimizer_tensors(other, named, optimizer_tensors(first, named).items())


def test_what_trained_must_go_on_training() -> None:
    named = {f"unet.{name}": parameter for name, parameter in nn.Linear(3, 2).named_parameters()}
    optimizer = make_optimizer({"unet": named}, OptimizerConfig(lr=0.1))
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fewer = {"unet.weight": named["unet.weight"]}
    with pytest.raises(UserError, match=r"has trained unet\.bias, which is to stay"):
        load_optimizer_tensors(
            make_optimizer({"unet": fewer}, OptimizerConfig(lr=0.1)), fewer, optimizer_tensors(optimizer, named).items()
        )
