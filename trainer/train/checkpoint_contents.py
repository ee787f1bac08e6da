"""What a checkpoint holds of a run: the components that train, their averages, and the optimizer's state."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.checkpoint.ema_folders import average_folder
from trainer.checkpoint.write import OPTIMIZER, WEIGHTS_FILES, TensorFile
from trainer.model.denoiser import TrainedModel
from trainer.optim.ema_contents import ema_tensors
from trainer.optim.optimizers import optimizer_tensors
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
    files = [
        TensorFile(f"{folder}/{WEIGHTS_FILES[folder]}", dict(module.named_parameters()), {"config.json": config})
        for folder, _, module, config in trained_components(parts.denoiser.model)
    ]
    files += average_files(parts, parts.averages.profiles if parts.averages else ())
    return [*files, TensorFile(OPTIMIZER, optimizer_tensors(parts.optimizer, parts.strategy.parameters), {})]


def average_files(parts: StepParts, names: Iterable[str], dtype: torch.dtype | None = None) -> list[TensorFile]:
    """The averages of these names as folders like those of the components, whole but for what is frozen.

    Args:
        dtype: in which averages are written; None: fp32, as they are.
    """
    files = []
    for name in names:
        assert parts.averages is not None
        averaged = ema_tensors(parts.averages, name, parts.strategy.parameters)
        for folder, prefix, module, config in trained_components(parts.denoiser.model):
            tensors = _Averaged(averaged, dict(module.named_parameters()), prefix, dtype)
            file = f"{average_folder(folder, name)}/{WEIGHTS_FILES[folder]}"
            files.append(TensorFile(file, tensors, {"config.json": config}))
    return files


class _Averaged(Mapping[str, Tensor]):
    """A module's parameters: the average of what trains, the weights of what does not; made when asked for."""

    def __init__(
        self, averaged: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None
    ) -> None:
        self._averaged, self._weights, self._prefix, self._dtype = averaged, weights, prefix, dtype

    def __getitem__(self, name: str) -> Tensor:
        weight, full_name = self._weights[name], f"{self._prefix}.{name}"
        if not weight.requires_grad:
            return weight
        average = self._averaged[full_name]
        return average.to(self._dtype) if self._dtype else average

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def trained_components(model: TrainedModel) -> list[TrainedComponent]:
    """Those of which a checkpoint holds the weights."""
    found = [TrainedComponent("unet", "unet", model.unet, model.unet.to_json_string())]
    if model.text_encoders:
        encoders = model.text_encoders.one, model.text_encoders.two
        for number, folder, encoder in zip((1, 2), ("text_encoder", "text_encoder_2"), encoders, strict=True):
            config = encoder.config.to_json_string(use_diff=False)
            found.append(TrainedComponent(folder, f"text_encoder_{number}", encoder, config))
    return [each for each in found if any(parameter.requires_grad for parameter in each.module.parameters())]
