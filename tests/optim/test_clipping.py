import pytest
import torch
from torch import nn

from trainer.optim.clipping import clip_units


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_each_units_gradient_is_so_much_of_its_weights_at_most(loss_scale: float) -> None:
    """By the paper's formula in float64, unit by unit; small gradients and vectors are left alone."""
    torch.manual_seed(0)
    shapes = ((5, 7), (4, 3, 3, 3), (6,))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    with torch.no_grad():
        parameters[0][2] = 0  # a unit that begins at zero may move by limit * 1e-3
    gradients = [torch.randn(shape) * scale for shape, scale in zip(shapes, (1.0, 1e-4, 5.0), strict=True)]
    gradients[1][3] *= 1e6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * loss_scale
    clip_units(parameters, 0.01, loss_scale)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        expected = gradient.double().clone()
        if parameter.dim() > 1:
            for row in range(len(expected)):
                limit = 0.01 * max(float(parameter[row].detach().double().norm()), 1e-3)
                norm = float(expected[row].norm())
                expected[row] *= min(1.0, limit / norm)
        torch.testing.assert_close(parameter.grad.double() / loss_scale, expected, rtol=1e-5, atol=1e-12)
    assert torch.equal(parameters[2].grad, gradients[2] * loss_scale)


def test_rows_of_a_worker_are_clipped_as_in_the_whole() -> None:
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 4))
    whole.grad = torch.randn(6, 4)
    shares = [nn.Parameter(whole.detach()[i : i + 3].clone()) for i in (0, 3)]
    for share, gradient in zip(shares, whole.grad.split(3), strict=True):
        share.grad = gradient.clone()
        clip_units([share], 0.02, 1.0)
    clip_units([whole], 0.02, 1.0)
    assert torch.equal(torch.cat([share.grad for share in shares if share.grad is not None]), whole.grad)
