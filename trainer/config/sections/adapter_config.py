"""A small addition that trains in place of the model's own weights: the section `adapter`."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.sections.trainable_config import TrainableConfig
from trainer.config.values import Flag, PathField, PositiveInt, Section

AdapterKind = Literal["none", "lora", "locon", "loha", "lokr", "dora", "oft"]


class AdapterConfig(Section):
    kind: AdapterKind = "none"
    """`none`: the weights of `trainable` themselves train. Otherwise they are held once, frozen, in the precision of
    the passes, and an adapter trains beside them, in fp32 or as `train.precision: bf16_*` says: `lora`; `locon`, which
    is LoRA on the convolutions as well; `loha`; `lokr`; `dora`; `oft`. See `docs/adapters.md`."""
    rank: PositiveInt = 16
    """Rank of the change of each layer; of `oft`, the side of the blocks that are turned, in channels."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The change counts `alpha / rank` times. Default: `rank`, so that it counts once."""
    conv_rank: PositiveInt | None = None
    """Rank at convolutions larger than 1 x 1; with `loha`, `lokr` and `dora` it says that convolutions are changed as
    well. Default: `rank` of `locon`, else convolutions stay as they are."""
    conv_alpha: Annotated[float, Field(gt=0)] | None = None
    """`alpha` of these convolutions. Default: `alpha` times `conv_rank / rank`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that an element between the two matrices of `lora`, `locon` and `dora` is left out while training; a
    function of the noisy image and the place."""
    targets: list[str] = []
    """Which layers, by names or beginnings of names in the original checkpoint's terms (`input_blocks.4`) or diffusers'
    (`mid_block.attentions.0`), of text encoders as `text_encoder_1.encoder.layers.3`; `*` stands for anything.
    Default: the linear layers of all transformers, and where convolutions are changed all residual blocks, as kohya's
    scripts choose."""
    text_encoders: Flag = False
    """Whether both text encoders get one too. `trainable` is not asked."""
    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of that. Default: `optimizer.lr`."""
    rank_stabilized: Flag = False
    """The change counts `alpha / sqrt(rank)` times (Kalajdzievski 2023), so that high ranks learn as fast as low."""
    lokr_factor: Annotated[int, Field(ge=2)] | None = None
    """Of `lokr`: the largest side of the first of its two matrices. Default: both about the same, the smallest file."""
    initial: PathField | None = None
    """An adapter file to start from, somebody's or an exported one: of the same kind, ranks and layers. What it does
    not hold starts as always."""


def trains_adapter(config: AdapterConfig) -> bool:
    """Whether there is one."""
    return config.kind != "none"


def only_additions_train(trainable: TrainableConfig, config: AdapterConfig) -> bool:
    """Whether no weight of the model itself trains: an adapter does, or new tokens alone."""
    parts = (trainable.unet, trainable.text_encoder_1, trainable.text_encoder_2)
    return trains_adapter(config) or not any(part.train for part in parts)


def changes_convolutions(config: AdapterConfig) -> bool:
    """Whether those larger than 1 x 1 are changed."""
    return config.kind == "locon" or config.conv_rank is not None


def rank_of(config: AdapterConfig, *, is_conv: bool) -> int:
    """The rank at a layer; `is_conv`: at a convolution larger than 1 x 1."""
    return (config.conv_rank or config.rank) if is_conv else config.rank


def scale_of(config: AdapterConfig, *, is_conv: bool) -> float:
    """How many times the change of a layer counts."""
    rank, alpha = rank_of(config, is_conv=is_conv), float(config.alpha or config.rank)
    if is_conv:
        alpha = config.conv_alpha or alpha * rank / config.rank
    return alpha / (rank**0.5 if config.rank_stabilized else rank)
