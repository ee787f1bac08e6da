"""Each kind against another implementation of its paper: pytorch_optimizer's, transformers' or torch's own."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig
from trainer.optim.kinds.rule_optimizer import RuleOptimizer
from trainer.optim.kinds.schedule_free import average_in_model
from trainer.optim.optimizers import make_optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer as library
from transformers.optimization import Adafactor

SHAPES = {"block.matrix": (24, 40), "block.tall": (70, 12), "block.bias": (77,)}
STEPS = 12
Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adafactor(scale: bool, lr: float) -> Made:
    return lambda p: Adafactor(p, lr=lr, scale_parameter=scale, relative_step=False, warmup_init=False)


CASES: dict[str, tuple[dict[str, Any], Made]] = {
    "lion": ({"lr": 1e-3}, lambda p: library.Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)),
    "lion, others": (
        {"lr": 1e-2, "betas": [0.8, 0.95], "weight_decay": 0.0},
        lambda p: library.Lion(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.0),
    ),
    "adopt": (
        {"lr": 1e-2, "weight_decay": 0.0},
        lambda p: library.ADOPT(p, lr=1e-2, betas=(0.9, 0.9999), eps=1e-6, weight_decay=0.0,
                                clip_lambda=lambda step: (step - 1) ** 0.25),
    ),
    "stable_adamw": (
        {"lr": 1e-2},
        lambda p: library.StableAdamW(p, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, kahan_sum=False),
    ),
    "adafactor": ({"lr": 1e-2}, adafactor(True, 1e-2)),
    "adafactor, unscaled": ({"lr": 1e-3, "scale_by_weights": False}, adafactor(False, 1e-3)),
    "came": ({"lr": 1e-3}, lambda p: library.CAME(p, lr=1e-3, weight_decay=0.01)),
    "prodigy": ({"lr": 1.0, "d0": 1e-4}, lambda p: library.Prodigy(p, lr=1.0, d0=1e-4, weight_decay=0.01)),
    "prodigy, careful": (
        {"lr": 0.5, "d0": 1e-4, "d_coef": 2.0, "bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.5},
        lambda p: library.Prodigy(p, lr=0.5, d0=1e-4, d_coef=2.0, bias_correction=True, safeguard_warmup=True,
                                  growth_rate=1.5, weight_decay=0.01),
    ),
    "dadapt_adam": (
        {"lr": 1.0, "d0": 1e-4, "growth_rate": 1.3},
        lambda p: library.DAdaptAdam(p, lr=1.0, d0=1e-4, growth_rate=1.3, weight_decay=0.01, weight_decouple=True),
    ),
}  # fmt: skip


def weights(dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter((torch.randn(s, generator=draw) * 0.1).to(dtype)) for name, s in shapes.items()}


def gradients(step: int, named: dict[str, nn.Parameter]) -> None:
    """Towards a fixed goal, with noise, so that distances from the start come to something."""
    draw = torch.Generator().manual_seed(step)
    for parameter in named.values():
        noise = torch.randn(parameter.shape, generator=draw) * 0.3
        goal = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        parameter.grad = ((0.5 - goal + noise) * 1e-2).to(parameter.dtype)


def stepped(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range = range(STEPS)) -> None:
    for step in steps:
        gradients(step, named)
        optimizer.step()


def ours(named: dict[str, nn.Parameter], kind: str, **more: Any) -> RuleOptimizer:
    rounding = more.pop("rounding", None)
    config = OptimizerConfig.model_validate({"kind": kind, "lr": 1e-2} | more)
    optimizer = make_optimizer(named, config, rounding=rounding, seed=3)
    assert isinstance(optimizer, RuleOptimizer)
    return optimizer


def assert_close(found: dict[str, nn.Parameter], expected: list[Tensor] | list[nn.Parameter]) -> None:
    for (name, mine), theirs in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(
            mine.detach(), theirs.detach(), rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("case", CASES)
def test_follows_another_implementation(case: str) -> None:
    settings, make = CASES[case]
    mine, theirs = weights(), weights()
    start = [parameter.detach().clone() for parameter in mine.values()]
    stepped(ours(mine, case.split(",")[0], **settings), mine)
    stepped(make([*theirs.values()]), theirs)
    assert_close(mine, [*theirs.values()])
    assert all(not torch.allclose(p.detach(), was, atol=1e-4) for p, was in zip(mine.values(), start, strict=True))


def test_schedule_free_follows_the_paper() -> None:
    """Defazio et al. 2024, algorithm 1 in its terms y, z and x, which the code never holds; weights by lr^2."""
    named = weights()
    x, beta1, beta2, wd, lr = [p.detach().double() for p in named.values()], 0.9, 0.999, 0.01, 1e-2
    z, second = [each.clone() for each in x], [torch.zeros_like(each) for each in x]
    optimizer, counted = ours(named, "schedule_free_adamw"), 0.0
    for t in range(1, STEPS + 1):
        gradients(t, named)
        rate = lr * min(t / 5, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        counted += rate**2
        for i, parameter in enumerate(named.values()):
            assert parameter.grad is not None
            g, y = parameter.grad.double(), (1 - beta1) * z[i] + beta1 * x[i]
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            z[i] = z[i] - rate * g / ((second[i] / (1 - beta2**t)).sqrt() + 1e-8) - rate * wd * y
            x[i] = (1 - rate**2 / counted) * x[i] + rate**2 / counted * z[i]
        optimizer.step()
    trained = [p.detach().clone() for p in named.values()]
    assert_close(named, [((1 - beta1) * a + beta1 * b).float() for a, b in zip(z, x, strict=True)])
    with average_in_model(optimizer, named):
        assert_close(named, [each.float() for each in x])
    assert all(torch.equal(p.detach(), was) for p, was in zip(named.values(), trained, strict=True))


@pytest.mark.parametrize("scale", ["original", "like_adamw"])
def test_muon_follows_torch(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as torch.optim.Muon in fp32, filters as rows of one; vectors and outer layers as AdamW."""
    shapes = SHAPES | {"block.conv": (16, 4, 3, 3), "conv_in.weight": (8, 4, 3, 3), "emb.position_embedding": (9, 5)}
    mine, theirs = weights(shapes=shapes), weights(shapes=shapes)
    stepped(ours(mine, "muon", lr=1e-2, lr_scale=scale), mine)
    matrices = {name: theirs[name] for name in ("block.matrix", "block.tall", "emb.position_embedding")}
    matrices["block.conv"] = nn.Parameter(theirs["block.conv"].detach().view(16, 36))
    adjust = {"original": "original", "like_adamw": "match_rms_adamw"}[scale]
    muon = torch.optim.Muon(matrices.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW([theirs["block.bias"], theirs["conv_in.weight"]], lr=1e-2, weight_decay=0.1)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's own iteration is in bf16
    for step in range(STEPS):
        gradients(step, theirs)
        conv = theirs["block.conv"].grad
        assert conv is not None
        matrices["block.conv"].grad = conv.view(16, 36)
        muon.step()
        adamw.step()
    with torch.no_grad():
        theirs["block.conv"].copy_(matrices["block.conv"].view(16, 4, 3, 3))
    assert_close(mine, [*theirs.values()])


def test_came_and_adafactor_take_filters_as_rows() -> None:
    shapes = {"conv": (16, 4, 3, 3)}
    for kind, number in (("adafactor", 16 + 36), ("came", 16 * 36 + 2 * (16 + 36))):
        filters, matrix = weights(shapes=shapes), weights(shapes={"conv": (16, 36)})
        stepped(first := ours(filters, kind), filters)
        stepped(ours(matrix, kind), matrix)
        assert_close(filters, [matrix["conv"].detach().view(16, 4, 3, 3)])
        assert sum(value.numel() for value in first.state[filters["conv"]].values()) == number + 1  # and the step
