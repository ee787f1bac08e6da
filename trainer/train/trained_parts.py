"""What of the model gets gradients, with an adapter or without: the parts, and their learning rates."""

from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter
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
    return {name: part for name, part in parts.items() if part.train}
