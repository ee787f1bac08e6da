"""The section `new_tokens`: words of the user's own with vectors that train (textual inversion)."""

from typing import Annotated

from pydantic import Field

from trainer.config.values import PathField, Section

DEFAULT_LR = 1e-3


class NewTokenConfig(Section):
    token: Annotated[str, Field(min_length=1, max_length=64)]
    """The word, as it stands in captions and prompts, such as `<my-cat>`: without spaces and commas; upper and lower
    case are one."""
    vectors: Annotated[int, Field(ge=1, le=75)] = 1
    """How many tokens it counts for, each with a vector of its own in both text encoders. More hold more detail, and
    leave less room for other words."""
    initial: Annotated[str, Field(min_length=1)] | None = None
    """A text whose tokens' vectors it starts from, in turn, such as `cat`. Default: drawn at random, as common as the
    vocabulary's."""
    file: PathField | None = None
    """An embedding to start from in place of that: a `.safetensors` with `clip_l` and `clip_g` and as many vectors."""


class NewTokensConfig(Section):
    tokens: list[NewTokenConfig] = []
    """The words, such as `[{token: <my-cat>, vectors: 4, initial: cat}]`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of their vectors. Default: 0.001; with an optimizer that finds the rate itself,
    `optimizer.lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of their vectors."""
