"""What of the model gets gradients, with an adapter or without: the parts, and their learning rates."""

from trainer.config.schema import Config, TextEncoderPart, TrainableConfig, UnetPart
from trainer.config.sections.adapter_config import trains_adapter


def trained_parts(config: Config) -> TrainableConfig:
    """`trainable` as it is, or with an adapter the parts that have one."""
    adapter = config.adapter
    if not trains_adapter(adapter):
        return config.trainable
    text = TextEncoderPart(train=adapter.text_encoders, lr=adapter.text_encoder_lr)
    return TrainableConfig(unet=UnetPart(lr=config.trainable.unet.lr), text_encoder_1=text, text_encoder_2=text)
