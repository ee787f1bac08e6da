"""The keys of `exchange`: how workers that each hold the whole model average their gradients, or their weights."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Count, Flag, PositiveInt, Section

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

    bucket_mib: Literal["auto"] | Annotated[float, Field(ge=0.01, le=65536)] = "auto"
    """MiB of gradients that travel together with `memory.strategy: ddp`, while the backward pass computes the next.
    Small ones begin early and leave little for the end; large ones waste less on each message. `auto`: 64, but no more
    than a 16th of all gradients, and 1 at least. `sdxl-train bench` measures them (`--bucket-sizes`)."""

    average_every: PositiveInt = 1
    """H: workers take so many steps each by itself, on its own gradients, and then average how far their weights have
    come (DiLoCo, arXiv 2311.08105): a step sends 1/H. `1`: gradients are averaged in each step. The weights that all
    have in common are those of the latest average; they are validated, drawn from and published. Needs
    `memory.strategy: ddp`, or `auto`, which then means it. `method` says how the differences travel."""
    outer_lr: Annotated[float, Field(gt=0, le=10)] = 1.0
    """`average_every`: the mean difference is a gradient to the common weights; they take a step of this learning rate
    along it. `1` without momentum is a plain average; the paper's, for some hundred steps between averages, is 0.7."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`average_every`: Nesterov momentum of that step; the paper's is 0.9, which is too much for few steps between."""
    outer_place: Literal["device", "host"] = "device"
    """`average_every`: where each worker keeps the common weights and their momentum, 8 bytes for each weight that
    trains: beside its weights, or in the host's memory."""
    fragments: PositiveInt = 1
    """`average_every`: the model is cut into so many runs of layers, which are averaged in turn, each every H steps, so
    that a step sends no more than one of them (streaming DiLoCo, arXiv 2501.18512). At most H."""
    overlap_steps: Count = 0
    """`average_every`: an average that begins after a step takes effect so many steps later, and travels while these
    are computed. Less than H."""
    own_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """`average_every`: how much of its own weights a worker keeps when it takes the common ones; the streaming paper's
    alpha. By default 0, and 0.5 with `overlap_steps`, whose steps would be lost otherwise."""

    @property
    def wished_bucket_mib(self) -> float | None:
        """`bucket_mib`; None for `auto`."""
        return None if self.bucket_mib == "auto" else self.bucket_mib

    @property
    def averages_weights(self) -> bool:
        """Whether workers take steps each by itself."""
        return self.average_every > 1

    @property
    def kept_share(self) -> float:
        """`own_share`, or its default."""
        return self.own_share if self.own_share is not None else (0.5 if self.overlap_steps else 0.0)

    @property
    def keeps_errors(self) -> bool:
        """Whether workers keep what was left out."""
        return self.method == "powersgd" or (self.method in ("int8", "int4") and self.error_feedback)
