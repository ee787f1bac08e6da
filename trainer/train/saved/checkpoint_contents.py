"""What a checkpoint holds of a run: the components that train, their averages, and the optimizer's state."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from trainer.adapters.adapter_names import stored_name
from trainer.adapters.parameters import adapter_parameters
from trainer.checkpoint.ema_folders import average_folder
from trainer.checkpoint.write import OPTIMIZER, WEIGHTS_FILES, TensorFile
from trainer.model.adapted import SETTINGS, settings_text
from trainer.model.denoiser import TrainedModel
from trainer.model.new_tokens import FOLDER, WORDS_FILE, NewTokenVectors, words_text
from trainer.optim.ema_contents import ema_parts
from trainer.optim.kinds.schedule_free import average_blends
from trainer.optim.optimizers import optimizer_tensors
from trainer.parallel.local_shard import Blend, Held, held
from trainer.train.saved.exchange_state import exchange_files
from trainer.train.saved.worker_state import common_weights, worker_files
from trainer.train.step import StepParts


class TrainedComponent(NamedTuple):
    """A component of which anything trains, the adapter, or the vectors of new tokens.

    Attributes:
        folder: its name in diffusers' layout.
        weights: what is stored of it, by name in the file; `names`: those in the model.
        beside: other files in its folder, as name -> text.
    """

    folder: str
    weights: Mapping[str, nn.Parameter]
    names: Mapping[str, str]
    beside: Mapping[str, str]


def checkpoint_files(parts: StepParts) -> list[TensorFile]:
    """The files in diffusers' layout; nothing is copied or exchanged yet."""
    blends, outer = average_blends(parts.optimizer, parts.strategy.parameters), parts.strategy.outer

    def common(each: TrainedComponent) -> dict[str, Held]:
        return common_weights(outer, each.weights, each.names) if outer else {}

    files = [
        TensorFile(f"{each.folder}/{WEIGHTS_FILES[each.folder]}", _blended(each, blends) | common(each), each.beside)
        for each in trained_components(parts.denoiser.model)
    ]
    files += average_files(parts, parts.averages.profiles if parts.averages else ())
    state = optimizer_tensors(parts.optimizer, parts.strategy.parameters)
    if outer:
        files += worker_files(outer, parts.strategy.parameters, state, parts.comm)
    else:
        files.append(TensorFile(OPTIMIZER, {name: held(tensor) for name, tensor in state.items()}, {}))
    return [*files, *exchange_files(parts.strategy, parts.comm)]


def average_files(parts: StepParts, names: Iterable[str], dtype: torch.dtype | None = None) -> list[TensorFile]:
    """The averages of these names as folders like those of the components, whole but for what is frozen.

    Args:
        dtype: in which averages are written; None: fp32, as they are.
    """
    files = []
    for name in names:
        assert parts.averages is not None
        averaged = ema_parts(parts.averages, name, parts.strategy.ever_trained)
        for each in trained_components(parts.denoiser.model):
            tensors = _weights(each)
            for weight in tensors:
                if average := averaged.get(each.names[weight]):
                    tensors[weight] = average._replace(dtype=dtype or average.dtype)
            file = f"{average_folder(each.folder, name)}/{WEIGHTS_FILES[each.folder]}"
            files.append(TensorFile(file, tensors, each.beside))
    return files


def _weights(component: TrainedComponent) -> dict[str, Held]:
    return {name: held(parameter) for name, parameter in component.weights.items()}


def _blended(component: TrainedComponent, blends: Mapping[str, Blend]) -> dict[str, Held]:
    """The weights, with averages in the place of those that have one."""
    return {
        name: each._replace(blend=blends[component.names[name]], dtype=torch.float32)
        if component.names[name] in blends
        else each
        for name, each in _weights(component).items()
    }


def trained_components(model: TrainedModel) -> list[TrainedComponent]:
    """Those of which a checkpoint holds the weights: anything of them trains, now or at another time of the run."""
    added = [] if model.new_tokens is None else [_new_tokens(model.new_tokens)]
    if model.adapter is not None:
        own = adapter_parameters(model)
        names = {stored_name(name): name for name in own}
        weights = {stored: own[name] for stored, name in names.items()}
        settings = {SETTINGS: settings_text(model.adapter.config)}
        return [TrainedComponent("adapter", weights, names, settings), *added]
    found = [_component("unet", "unet", model.unet, model.unet.to_json_string())]
    if model.text_encoders:
        encoders = model.text_encoders.one, model.text_encoders.two
        for number, folder, encoder in zip((1, 2), ("text_encoder", "text_encoder_2"), encoders, strict=True):
            config = encoder.config.to_json_string(use_diff=False)
            found.append(_component(folder, f"text_encoder_{number}", encoder, config))
    ever = {name for each in found for name in each.names.values() if name in model.resting}
    trained = [
        each
        for each in found
        if any(p.requires_grad for p in each.weights.values()) or not ever.isdisjoint(each.names.values())
    ]
    return trained + added


def _new_tokens(vectors: NewTokenVectors) -> TrainedComponent:
    weights = dict(vectors.named_parameters())
    names = {name: f"{FOLDER}.{name}" for name in weights}
    return TrainedComponent(FOLDER, weights, names, {WORDS_FILE: words_text(vectors.start.words)})


def _component(folder: str, prefix: str, module: nn.Module, config: str) -> TrainedComponent:
    weights = dict(module.named_parameters())
    return TrainedComponent(folder, weights, {name: f"{prefix}.{name}" for name in weights}, {"config.json": config})
