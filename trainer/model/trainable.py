"""What of the model trains, laid out without memory."""

from collections.abc import Collection

from torch import nn

from trainer.config.schema import Config, TextEncoderPart
from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.model.denoiser import TrainedModel
from trainer.model.freeze import frozen_names, never_used, original_unet_names
from trainer.model.load import empty_text_encoders, empty_unet
from trainer.optim.precision import precision_of


def lay_out_model(config: Config) -> TrainedModel:
    """What trains, on the meta device, in the dtype its weights are held in; what is frozen asks for no gradients.

    Raises:
        UserError: a name in `trainable` means nothing, or nothing is left to train.
    """
    path, parts = config.model.path, config.trainable
    encoders = empty_text_encoders(path) if text_encoders_train(config) else None
    model = TrainedModel(empty_unet(path), encoders)
    model.requires_grad_(False)
    _thaw(model.unet, "unet", parts.unet, original_unet_names(dict(model.unet.config)))
    if encoders:
        one = dict(encoders.one.named_parameters())
        unused = never_used(one, encoders.one.config.num_hidden_layers)
        _thaw(encoders.one, "text_encoder_1", parts.text_encoder_1, {}, unused)
        _thaw(encoders.two, "text_encoder_2", parts.text_encoder_2, {})
    return model.to(precision_of(config.train.precision).weights)


def text_encoders_train(config: Config) -> bool:
    """Whether any of them does."""
    return config.trainable.text_encoder_1.train or config.trainable.text_encoder_2.train


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
