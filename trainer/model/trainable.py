"""What of the model trains, laid out without memory."""

from collections.abc import Collection

import torch
from torch import nn

from trainer.config.schema import TextEncoderPart, TrainableConfig
from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.model.denoiser import TrainedModel
from trainer.model.freeze import frozen_names, never_used, original_unet_names
from trainer.model.load_weights import empty_text_encoders, empty_unet
from trainer.model.text import ChunkJoin
from trainer.model_files.run_model import RunModel


def lay_out_model(
    model_files: RunModel, parts: TrainableConfig, dtype: torch.dtype, join: ChunkJoin = "a1111"
) -> TrainedModel:
    """What trains, on the meta device, its weights in `dtype`; what is frozen asks for no gradients.

    Args:
        join: how the chunks of a long caption are put together.
    Raises:
        UserError: a name in `trainable` means nothing, or nothing is left to train.
    """
    texts = parts.text_encoder_1.train or parts.text_encoder_2.train
    encoders = empty_text_encoders(model_files, join) if texts else None
    model = TrainedModel(empty_unet(model_files), encoders)
    model.requires_grad_(False)
    _thaw(model.unet, "unet", parts.unet, original_unet_names(dict(model.unet.config)))
    if encoders:
        one = dict(encoders.one.named_parameters())
        unused = never_used(one, encoders.one.config.num_hidden_layers)
        _thaw(encoders.one, "text_encoder_1", parts.text_encoder_1, {}, unused)
        _thaw(encoders.two, "text_encoder_2", parts.text_encoder_2, {})
    return model.to(dtype)


def _thaw(
    module: nn.Module,
    part_name: str,
    part: TextEncoderPart,
    other_names: dict[str, str],
    unused: Collection[str] = (),
) -> None:
    """Let the parameters of one part ask for gradients, but for those that are to stay as they are."""
    if not part.train:
        return
    parameters = {name.removeprefix("text_model."): parameter for name, parameter in module.named_parameters()}
    frozen, idle = frozen_names(parameters, part.freeze, other_names)
    key = f"trainable.{part_name}.freeze"
    if idle:
        beginnings = {name.rsplit(".", cut)[0] for name in (*parameters, *other_names.values()) for cut in range(1, 6)}
        offer = nearest(idle[0], beginnings)
        meant = f"; did you mean `{offer}`?" if offer else ""
        raise UserError(f"{key}: `{idle[0]}` is the beginning of no weight's name{meant}")
    trained = [name for name in parameters if name not in frozen and name not in unused]
    if not trained:
        raise UserError(f"{key}: leaves nothing to train; write `trainable.{part_name}.train: false`")
    for name in trained:
        parameters[name].requires_grad_(True)
