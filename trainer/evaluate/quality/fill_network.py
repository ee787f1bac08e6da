"""A network of a library or of ours, with weights from files: laid out without memory, filled in fp32, at rest."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer.errors import UserError, printable
from trainer.model.load_weights import read_weights
from trainer.model_files.components import Component

_Network = TypeVar("_Network", bound=nn.Module)


def fill_network(
    build: Callable[[], _Network],
    part: Component,
    device: torch.device | str,
    old_names: Mapping[str, str] = MappingProxyType({}),
) -> _Network:
    """What `build` makes, with `part`'s tensors in it; without gradients, in `eval` mode.

    Args:
        old_names: what files call otherwise than the network, as parts of names; files may have either.

    Raises:
        UserError: nothing can be built by the configuration, or the tensors do not fit it.
    """
    from accelerate.big_modeling import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    try:
        with init_empty_weights():
            network = build()
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        said = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{part.origin / 'config.json'}: no {part.name} can be built by it: {said}") from None
    weights: dict[str, Tensor] = {}
    tensors, own = {}, network.state_dict().keys()
    for name, tensor in part.tensors.items():
        old = next((old for old in old_names if old in name), None) if name not in own else None
        tensors[name if old is None else name.replace(old, old_names[old])] = tensor

    def place(name: str, stored: Tensor) -> None:
        weights[name] = torch.empty(stored.shape, dtype=torch.float32, device=device).copy_(stored)

    read_weights(network, replace(part, tensors=tensors), place)
    network.load_state_dict(weights, assign=True)
    network.to(device)
    return network.requires_grad_(False).eval()
