"""What a checkpoint holds of a run: the components that train, their averages, and the optimizer's state."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from trainer.checkpoint.ema_folders import average_folder
from trainer.checkpoint.write import OPTIMIZER, WEIGHTS_FILES, TensorFile
from trainer.model.denoiser import TrainedModel
from trainer.optim.ema_contents import ema_parts
from trainer.optim.kinds.schedule_free import average_blends
from trainer.optim.optimizers import optimizer_tensors
from trainer.parallel.local_shard import Blend, Held, held
from trainer.train.step import StepParts


class TrainedComponent(NamedTuple):
    """A component of which anything trains.

    Attributes:
        folder: its name in diffusers' layout; `prefix`: of its parameters in the model.
        config: the text of its `config.json`.
    """

    folder: str
    prefix: str
    module: nn.Module
    config: str


def checkpoint_files(parts: StepParts) -> list[TensorFile]:
    """The files in diffusers' layout; nothing is copied or exchanged yet."""
    blends = average_blends(parts.optimizer, parts.strategy.parameters)
    files = [
        TensorFile(
            f"{folder}/{WEIGHTS_FILES[folder]}", _blended(_weights(module), prefix, blends), {"config.json": config}
        )
        for folder, prefix, module, config in trained_components(parts.denoiser.model)
    ]
    files += average_files(parts, parts.averages.profiles if parts.averages else ())
    state = optimizer_tensors(parts.optimizer, parts.strategy.parameters)
    return [*files, TensorFile(OPTIMIZER, {name: held(tensor) for name, tensor in state.items()}, {})]


def average_files(parts: StepParts, names: Iterable[str], dtype: torch.dtype | None = None) -> list[TensorFile]:
    """The averages of these names as folders like those of the components, whole but for what is frozen.

    Args:
        dtype: in which averages are written; None: fp32, as they are.
    """
    files = []
    for name in names:
        assert parts.averages is not None
        averaged = ema_parts(parts.averages, name, parts.strategy.parameters)
        for folder, prefix, module, config in trained_components(parts.denoiser.model):
            tensors = _weights(module)
            for weight, parameter in module.named_parameters():
                if parameter.requires_grad:
                    average = averaged[f"{prefix}.{weight}"]
                    tensors[weight] = average._replace(dtype=dtype or average.dtype)
            file = f"{average_folder(folder, name)}/{WEIGHTS_FILES[folder]}"
            files.append(TensorFile(file, tensors, {"config.json": config}))
    return files


def _blended(weights: dict[str, Held], prefix: str, blends: Mapping[str, Blend]) -> dict[str, Held]:
    """With averages in the place of the weights that have one."""
    return {
        name: each._replace(blend=blends[f"{prefix}.{name}"], dtype=torch.float32)
        if f"{prefix}.{name}" in blends
        else each
        for name, each in weights.items()
    }


def _weights(module: nn.Module) -> dict[str, Held]:
    return {name: held(parameter) for name, parameter in module.named_parameters()}


def trained_components(model: TrainedModel) -> list[TrainedComponent]:
    """Those of which a checkpoint holds the weights."""
    found = [TrainedComponent("unet", "unet", model.unet, model.unet.to_json_string())]
    if model.text_encoders:
        encoders = model.text_encoders.one, model.text_encoders.two
        for number, folder, encoder in zip((1, 2), ("text_encoder", "text_encoder_2"), encoders, strict=True):
            config = encoder.config.to_json_string(use_diff=False)
            found.append(TrainedComponent(folder, f"text_encoder_{number}", encoder, config))
    return [each for each in found if any(parameter.requires_grad for parameter in each.module.parameters())]
