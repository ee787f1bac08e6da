"""What an adapter starts from: values drawn by the run's seed and each weight's own name, or somebody's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_names import stored_name
from trainer.config.sections.adapter_config import AdapterConfig
from trainer.keyed import draw_seed

_LOHA_SIZES = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}  # as LyCORIS draws them
_ZEROS = ("lora_B", "hada_w2_a", "lokr_w2", "lokr_w2_b", "oft_R")  # so that the change is none at first
_KAIMING = ("lora_A", "lokr_w1", "lokr_w2_a")


@dataclass(frozen=True)
class AdapterStart:
    """An adapter, and what it starts from.

    Attributes:
        seed: the run's.
    """

    config: AdapterConfig
    seed: int = 0

    @property
    def initial(self) -> Path | None:
        """The file to start from."""
        return self.config.initial


def _copy(parameter: Tensor, whole: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(whole)


class Access(NamedTuple):
    """How values get into a model's parameters, which may be spread over workers, and out of them.

    Attributes:
        put: fills a parameter, or this worker's share of it, from the whole tensor.
        whole: all of a parameter; where it is spread, all workers ask.
    """

    put: Callable[[Tensor, Tensor], None] = _copy
    whole: Callable[[Tensor], Tensor] = torch.detach


IN_ONE_PIECE = Access()
"""Of a model that every worker has all of."""


@torch.no_grad()
def draw_initial(parameter: nn.Parameter, name: str, seed: int, access: Access = IN_ONE_PIECE) -> None:
    """Fill a parameter of an adapter; magnitudes of DoRA are left to `fill_magnitudes`.

    The values hang on the seed and the stored name alone, so that they are the same for any number of workers.

    Args:
        name: in the adapted model, with the part of the model it is in.
    """
    leaf, size = _leaf(name), parameter.shape
    generator = torch.Generator().manual_seed(draw_seed(seed, "adapter", stored_name(name)))
    if leaf in _KAIMING:
        bound = 1 / math.sqrt(math.prod(size[1:]))  # Kaiming's uniform with a = sqrt(5), as PEFT and LyCORIS have it
        values = torch.rand(size, generator=generator).mul_(2 * bound).sub_(bound)
    elif leaf in _LOHA_SIZES:
        values = torch.randn(size, generator=generator).mul_(_LOHA_SIZES[leaf])
    else:
        assert leaf in _ZEROS or leaf == "lora_magnitude_vector", name
        values = torch.zeros(size)
    access.put(parameter, values)


@torch.no_grad()
def fill_magnitudes(model: nn.Module, keep: Collection[str] = (), access: Access = IN_ONE_PIECE) -> None:
    """DoRA's magnitudes as the norms of the base's rows with the change as it is; all else has its values.

    Args:
        keep: names of parameters that have theirs.
    """
    from trainer.adapters.dora import weight_norms
    from trainer.adapters.parameters import PEFT_NAME

    for name, module in model.named_modules():
        layer: Any = module
        own = f"{name}.lora_magnitude_vector.{PEFT_NAME}.weight"
        if not len(getattr(module, "lora_magnitude_vector", ())) or own in keep:
            continue
        magnitude: Tensor = layer.lora_magnitude_vector[PEFT_NAME].weight
        down, up = (access.whole(part[PEFT_NAME].weight) for part in (layer.lora_A, layer.lora_B))
        norms = weight_norms(access.whole(layer.base_layer.weight), down, up, layer.scaling[PEFT_NAME])
        access.put(magnitude, norms.view(magnitude.shape))


def _leaf(name: str) -> str:
    parts = stored_name(name).split(".")
    return parts[-2] if parts[-1] == "weight" else parts[-1]
