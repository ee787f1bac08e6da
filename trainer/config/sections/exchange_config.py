"""The keys of `exchange`: how workers that each hold the whole model average their gradients."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Count, Flag, Section

ExchangeMethod = Literal["plain", "bf16", "int8", "int4", "powersgd"]


class ExchangeConfig(Section):
    method: ExchangeMethod = "plain"
    """How gradients travel. `plain`: PyTorch's all-reduce, in the precision of the weights. `bf16`: rounded to bf16 at
    random, so that their mean is right, and added up in fp32. `int8`, `int4`: in blocks of 256 and 128 numbers with a
    scale each, in 8.06 and 4.13 bits a gradient. `powersgd`: each gradient as the product of two thin matrices. All
    but `plain` need `memory.strategy: ddp`, or `auto`, which then means it. See `docs/wire.md`."""
    error_feedback: Flag = True
    """`int8` and `int4`: what rounding leaves out is kept by each worker in bf16, two bytes a weight on its card and in
    checkpoints, and added to its next gradients. `false`: they are rounded at random in place of that, so that their
    mean is right; nothing is kept."""
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    """`powersgd`: columns of the thin matrices. More of them keep more of a gradient, and take more on the wire."""
    plain_steps: Count = 0
    """Steps at the start of the run in which gradients still travel as with `plain`; for `powersgd`, whose paper does
    so while gradients are wild, but allowed with all methods."""

    @property
    def keeps_errors(self) -> bool:
        """Whether workers keep what was left out."""
        return self.method == "powersgd" or (self.method in ("int8", "int4") and self.error_feedback)
