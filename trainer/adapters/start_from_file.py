"""Starts an adapter from a file: somebody's, or one that was exported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_file import AdapterLayer, module_leaf, open_adapter, placed_layers
from trainer.adapters.adapter_names import Place, split_stored, stored_name
from trainer.adapters.parameters import scale_in
from trainer.errors import UserError, printable

_CARRIES_SCALE = {"lora": "lora_up.weight", "dora": "lora_up.weight", "loha": "hada_w1_a", "lokr": "lokr_w1"}
_TELLS = "which `sdxl-train adapter inspect` tells"


def values_of_file(
    path: Path, own: Mapping[str, nn.Parameter], model: nn.Module, unet_config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Values of an adapter's parameters by name, fp32, as a file has them; those that it does not hold are left out.

    Where the file's change counts otherwise than the run's, one of the matrices takes the difference.

    Args:
        own: from `adapter_parameters` of `model`.
    Raises:
        UserError: the file is no adapter, or of another kind, rank or layers than the run's.
    """
    configs: dict[str, Mapping[str, Any]] = {"unet": unet_config}
    for number, component in ((1, "text_encoder"), (2, "text_encoder_2")):
        encoder = getattr(model, f"text_encoder_{number}", None)
        if isinstance(encoder, nn.Module):
            config: Any = encoder.config
            configs[component] = config.to_dict()
    file = open_adapter(path)
    names = {split_stored(stored_name(name)): name for name in own}
    found: dict[str, Tensor] = {}
    for place, layer in placed_layers(file, configs).items():
        said = f"adapter.initial = {path}: {printable(layer.name, 100)}"
        for leaf, tensor in _values(path, place, layer, model).items():
            name = names.get((place, leaf))
            if name is None:
                mend = "set adapter.kind, adapter.targets and adapter.text_encoders as the file is"
                raise UserError(f"{said} holds {leaf}, for which the run's adapter has no place; {mend}, {_TELLS}")
            is_vector = leaf == "lora_magnitude_vector.weight"  # a row, or a column
            if tensor.numel() != own[name].numel() or (len(tensor) != len(own[name]) and not is_vector):
                shapes = f"{list(tensor.shape)}, and the run's adapter has {list(own[name].shape)}"
                mend = "set adapter.rank and adapter.conv_rank as the file is"
                raise UserError(f"{said} holds {leaf} {shapes}; {mend}, {_TELLS}")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{said} holds NaN or infinite values")
            found[name] = tensor.reshape(own[name].shape)
    return found


def _values(path: Path, place: Place, layer: AdapterLayer, model: nn.Module) -> dict[str, Tensor]:
    try:
        scale = scale_in(model.get_submodule(".".join(place)))
    except AttributeError:
        raise UserError(f"adapter.initial = {path}: {printable(layer.name, 100)} is no layer of the model") from None
    tensors, carrier = layer.read(), _CARRIES_SCALE.get(layer.kind)
    if carrier is not None and layer.scale() != scale:
        tensors[carrier] = tensors[carrier] * (layer.scale() / scale)
    return {module_leaf(leaf): tensor for leaf, tensor in tensors.items()}
