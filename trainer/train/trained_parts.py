"""What of the model gets gradients, with an adapter or without: the parts, and their learning rates."""

from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter
from trainer.config.sections.new_tokens_config import DEFAULT_LR
from trainer.config.sections.optimizer_config import FINDS_LR
from trainer.config.sections.trainable_config import TextEncoderPart, TrainableConfig, UnetPart


def what_trains(config: Config) -> TrainableConfig:
    """`trainable` as it is, or with an adapter the parts that have one."""
    adapter = config.adapter
    if not trains_adapter(adapter):
        return config.trainable
    text = TextEncoderPart(train=adapter.text_encoders, lr=adapter.text_encoder_lr)
    return TrainableConfig(unet=UnetPart(lr=config.trainable.unet.lr), text_encoder_1=text, text_encoder_2=text)


def trained_parts(config: Config) -> dict[str, TextEncoderPart]:
    """The parts of the model that train at any time of the run, by name."""
    trains = what_trains(config)
    parts = {name: getattr(trains, name) for name in type(trains).model_fields}
    if config.new_tokens.tokens:
        parts["new_tokens"] = _new_tokens(config)
    return {name: part for name, part in parts.items() if part.train}


def packed_parts(config: Config) -> list[str]:
    """The parts of the model whose weights `model.frozen_weights` says how to hold: those that run with what trains."""
    texts = config.new_tokens.tokens or config.adapter.text_encoders
    return ["unet", *(("text_encoder_1", "text_encoder_2") if texts else ())]


def _new_tokens(config: Config) -> TextEncoderPart:
    """Their learning rate and weight decay, as those of a part."""
    own, finds = config.new_tokens, config.optimizer.kind in FINDS_LR
    lr = own.lr or (config.optimizer.lr if finds else DEFAULT_LR)
    return TextEncoderPart(train=True, lr=lr, weight_decay=own.weight_decay)
