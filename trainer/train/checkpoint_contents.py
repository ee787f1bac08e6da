"""What a checkpoint holds of a run: the components that train, and the optimizer's state."""

from torch import nn

from trainer.checkpoint.write import OPTIMIZER, WEIGHTS_FILES, TensorFile
from trainer.model.denoiser import TrainedModel
from trainer.optim.optimizers import optimizer_tensors
from trainer.train.step import StepParts


def checkpoint_files(parts: StepParts) -> list[TensorFile]:
    """The files in diffusers' layout; nothing is copied or exchanged yet."""
    strategy, model = parts.strategy, parts.denoiser.model
    files = [
        TensorFile(f"{folder}/{WEIGHTS_FILES[folder]}", dict(module.named_parameters()), {"config.json": config})
        for folder, module, config in _components(model)
        if any(parameter.requires_grad for parameter in module.parameters())
    ]
    return [*files, TensorFile(OPTIMIZER, optimizer_tensors(parts.optimizer, strategy.parameters), {})]


def _components(model: TrainedModel) -> list[tuple[str, nn.Module, str]]:
    """Folder name, module and `config.json` of each component."""
    components: list[tuple[str, nn.Module, str]] = [("unet", model.unet, model.unet.to_json_string())]
    if model.text_encoders:
        for folder, encoder in (("text_encoder", model.text_encoders.one), ("text_encoder_2", model.text_encoders.two)):
            components.append((folder, encoder, encoder.config.to_json_string(use_diff=False)))
    return components
