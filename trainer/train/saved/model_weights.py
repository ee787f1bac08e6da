"""Where the weights of a run's model come from: a checkpoint, an average in it, or the model that it started from."""

from pathlib import Path

from torch import Tensor, nn

from trainer.adapters.initial_values import Access
from trainer.checkpoint.ema_folders import average_folder
from trainer.config.sections.ema_config import LIVE
from trainer.model.adapted import fill_adapted
from trainer.model.denoiser import TrainedModel
from trainer.model.frozen.packed_layers import packed_layers, stands_for
from trainer.model.load_weights import read_weights
from trainer.model.new_tokens import FOLDER, fill_new_tokens
from trainer.model_files.components import Component
from trainer.model_files.model_source import open_folder_component
from trainer.model_files.run_model import RunModel
from trainer.parallel.sharding import copy_share, whole_tensor


def fill_model(model_files: RunModel, checkpoint: Path | None, model: nn.Module, average: str = LIVE) -> None:
    """Put weights into a model that has memory, or into this worker's shares of it.

    What a checkpoint holds comes from there, the rest from the run's model.

    Args:
        average: name of the one that is taken of what trains; `live`: the weights themselves.
    """
    assert isinstance(model, TrainedModel)
    if model.new_tokens is not None:
        folder = FOLDER if average == LIVE else average_folder(FOLDER, average)
        fill_new_tokens(model_files, checkpoint and checkpoint / folder, model.new_tokens, copy_share)
    if model.adapter is not None:
        folder = "adapter" if average == LIVE else average_folder("adapter", average)
        fill_adapted(model_files, checkpoint and checkpoint / folder, model, Access(copy_share, whole_tensor))
        return
    modules: dict[str, nn.Module] = {"unet": model.unet}
    if model.text_encoders:
        modules |= {"text_encoder": model.text_encoders.one, "text_encoder_2": model.text_encoders.two}
    for name, module in modules.items():
        part = component_part(model_files, checkpoint, name, average)
        _fill_component(module, part)


def _fill_component(module: nn.Module, part: Component) -> None:
    parameters, packed = dict(module.named_parameters()), packed_layers(module)

    def place(name: str, weight: Tensor) -> None:
        if name in packed:
            packed[name].fill(weight)
        else:
            copy_share(parameters[name], weight)

    read_weights(module.state_dict() | {name: stands_for(layer) for name, layer in packed.items()}, part, place)


def component_part(model_files: RunModel, checkpoint: Path | None, name: str, average: str = LIVE) -> Component:
    """A component's weights as they are now: in the checkpoint if it trains, else in the run's model."""
    folder = name if average == LIVE else average_folder(name, average)
    if checkpoint is not None and (checkpoint / folder).is_dir():
        return open_folder_component(name, checkpoint / folder)
    return model_files.part(name)
