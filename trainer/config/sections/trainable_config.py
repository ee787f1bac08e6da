"""The section `trainable`: what of the model trains, how fast, and when; documented as those of `schema.py` are."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Flag, OpenFraction, PositiveInt, Section

Scale = Annotated[float, Field(ge=0)]
Moment = PositiveInt | OpenFraction
"""Optimizer steps done, or a share of the run's steps."""
UnetPreset = Literal[
    "all",
    "unet_71",
    "unet_68",
    "unet_63",
    "attention",
    "cross_attention",
    "deepest_half",
    "deepest_quarter",
    "outer_half",
]


class TextEncoderPart(Section):
    train: Flag = False
    """Whether it trains. Where neither does, both are held in `model.text_encoder_precision`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Default: `optimizer.lr`."""
    lr_scale: dict[str, Scale] = {}
    """Learning rates of blocks or weights as shares of the part's, by patterns as in `freeze`, such as
    `{encoder.layers: 0.5, fc1: 0.1}`; of several that mean a weight, the last one counts; 0 freezes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rates also times this to the power of a block's distance from the output: the last layer 1, the one
    before 2, ..."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay. Default: `optimizer.weight_decay`."""
    weight_decay_scale: dict[str, Scale] = {}
    """Weight decay of blocks or weights as shares of the part's, by patterns as in `lr_scale`."""
    only: list[str] = []
    """Blocks or weights that train, all others staying as they are; patterns as in `freeze`, which still takes away."""
    freeze: list[str] = []
    """Blocks or weights that stay as they are, by the beginning of their names or words within: `encoder.layers.3`,
    `embeddings`, `fc1`; `*` stands for anything."""
    start_at: Moment | None = None
    """Begin to train after so many optimizer steps, or, below 1, after this share of the run. Default: at the start."""
    stop_at: Moment | None = None
    """Train no more after so many optimizer steps of the run, or this share of it. Default: at its end."""


class UnetPart(TextEncoderPart):
    train: Flag = True
    """Whether it trains."""
    preset: UnetPreset = "all"
    """Which blocks train, by a name; `only` and `freeze` still take away. `unet_71`, `unet_68`, `unet_63`: 71, 68 and
    63 % of SDXL's weights. `attention`, `cross_attention`: in all blocks. `deepest_half`, `deepest_quarter`: the blocks
    nearest to the middle; `outer_half`: the others. See `docs/what_trains.md`."""
    lr_scale: dict[str, Scale] = {}
    """Learning rates of blocks or weights as shares of the part's, by patterns as in `freeze`, such as
    `{attn2: 0.5, "input_blocks.0*": 0}`; of several that mean a weight, the last one counts; 0 freezes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rates also times this to the power of a block's distance from the output: `output_blocks.8` 1, ...,
    `input_blocks.0` 19, the embeddings of time and size 20."""
    freeze: list[str] = []
    """Blocks or weights that stay as they are, by the beginning of their names or words within, in the original
    checkpoint's terms (`input_blocks.4`, `output_blocks.0.1`) or diffusers' (`down_blocks.1`, `attn2.to_k`); `*` stands
    for anything."""


class TrainableConfig(Section):
    unet: UnetPart = UnetPart()
    """The UNet."""
    text_encoder_1: TextEncoderPart = TextEncoderPart()
    """CLIP ViT-L. Its last layer and final norm are never used by SDXL and stay frozen."""
    text_encoder_2: TextEncoderPart = TextEncoderPart()
    """OpenCLIP ViT-bigG."""
