"""AdamW, and its state as named tensors."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.config.schema import OptimizerConfig

NamedParameters = Mapping[str, torch.nn.Parameter]


def make_optimizer(parameters: NamedParameters, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `parameters`, fused: one pass over memory per step."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        parameters.values(),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Assign the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<state name>` -> tensor, as it is (no copy)."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put back what `optimizer_tensors` gave; each moment goes to its parameter's device and dtype.

    Raises:
        KeyError: a tensor belongs to no parameter of the model.
    """
    for full_name, value in tensors:
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        # Fused AdamW keeps its step counter beside the parameter; moments have the parameter's dtype.
        dtype = torch.float32 if key == "step" else parameter.dtype
        optimizer.state[parameter][key] = value.to(device=parameter.device, dtype=dtype)
