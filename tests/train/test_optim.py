"""AdamW against the paper's formula, and its state through tensors and back."""

import torch
from torch import nn

from trainer.config.schema import OptimizerConfig
from trainer.train.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors


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
