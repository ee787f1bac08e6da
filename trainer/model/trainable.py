"""What of the model trains, laid out without memory."""

from collections.abc import Collection

import torch

from trainer.config.sections.trainable_config import TrainableConfig
from trainer.model.denoiser import TrainedModel
from trainer.model.load_weights import empty_text_encoders, empty_unet
from trainer.model.selection.part_names import part_names, without_prefix
from trainer.model.selection.weight_rates import weight_rates
from trainer.model.text import ChunkJoin
from trainer.model_files.run_model import RunModel


def lay_out_model(
    model_files: RunModel,
    parts: TrainableConfig,
    dtype: torch.dtype,
    join: ChunkJoin = "a1111",
    resting: Collection[str] = (),
    *,
    with_text: bool = False,
) -> TrainedModel:
    """What trains, on the meta device, its weights in `dtype`; what is frozen asks for no gradients.

    Args:
        join: how the chunks of a long caption are put together.
        resting: parts that train at another time of the run: theirs ask for none now either.
        with_text: with the text encoders, though neither of them trains.
    Raises:
        UserError: a name in `trainable` means nothing, or nothing is left to train.
    """
    texts = with_text or parts.text_encoder_1.train or parts.text_encoder_2.train
    encoders = empty_text_encoders(model_files, join) if texts else None
    model = TrainedModel(empty_unet(model_files), encoders)
    model.requires_grad_(False)
    modules = {"unet": model.unet}
    if encoders:
        modules |= {"text_encoder_1": encoders.one, "text_encoder_2": encoders.two}
    for part_name, module in modules.items():
        parameters = dict(module.named_parameters())
        rates = weight_rates(getattr(parts, part_name), part_names(part_name, parameters, model_files))
        for name, parameter in parameters.items():
            own = name if part_name == "unet" else without_prefix(name)
            if own in rates:
                parameter.requires_grad_(part_name not in resting)
                model.rates[f"{part_name}.{name}"] = rates[own]
    model.resting = frozenset(name for name in model.rates if name.partition(".")[0] in resting)
    return model.to(dtype)
