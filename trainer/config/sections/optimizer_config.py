"""The section `optimizer`: which one, and its numbers; documented as those of `schema.py` are.

A number that is left out is what the kind's paper has; `KIND_DEFAULTS` lists them, and says which kind takes which key.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from trainer.config.values import Flag, PositiveInt, Section

OptimizerKind = Literal[
    "adamw",
    "adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
    "came",
    "prodigy",
    "dadapt_adam",
    "schedule_free_adamw",
    "stable_adamw",
    "adopt",
    "muon",
]
KINDS: tuple[OptimizerKind, ...] = get_args(OptimizerKind)
FINDS_LR = ("prodigy", "dadapt_adam")
"""Kinds that find the learning rate by themselves: `lr` is a factor of it."""

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_LION = {"betas": (0.9, 0.99), "weight_decay": 0.1}
_DISTANCE = {"d0": 1e-6, "d_coef": 1.0, "growth_rate": float("inf"), "bias_correction": False}
KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "lion": _LION,
    "lion_8bit": _LION,
    "adafactor": {
        "eps": 1e-30,
        "eps2": 1e-3,
        "weight_decay": 0.0,
        "clip_threshold": 1.0,
        "decay_rate": 0.8,
        "scale_by_weights": True,
    },
    "came": {
        "betas": (0.9, 0.999),
        "beta3": 0.9999,
        "eps": 1e-30,
        "eps2": 1e-16,
        "weight_decay": 0.01,
        "clip_threshold": 1.0,
    },
    "prodigy": _ADAM | _DISTANCE | {"beta3": None, "safeguard_warmup": False},
    "dadapt_adam": _ADAM | _DISTANCE,
    "schedule_free_adamw": _ADAM,
    "stable_adamw": _ADAM | {"betas": (0.9, 0.99)},
    "adopt": _ADAM | {"betas": (0.9, 0.9999), "eps": 1e-6},
    "muon": _ADAM | {"weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "lr_scale": "like_adamw"},
}
"""The numbers that each kind takes, with what they are where the configuration says nothing."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class OptimizerConfig(Section):
    kind: OptimizerKind = "adamw"
    """`docs/optimizers.md` says which to take. `adamw`: both moments in fp32, 8 bytes per weight. `adamw_8bit`: in
    blocks of 8 bits, 2.03 bytes per weight; biases, norms and other small tensors stay in fp32. `lion` (Chen et al.
    2023): one moment, 4 bytes; `lion_8bit`: 1.02. `adafactor` (Shazeer and Stern 2018): sums of rows and columns, next
    to nothing. `came` (Luo et al. 2023): the same with a first moment, 4 bytes. `prodigy` (Mishchenko and Defazio
    2023) and `dadapt_adam` (Defazio and Mishchenko 2023) find the learning rate by themselves, 16 and 12 bytes.
    `schedule_free_adamw` (Defazio et al. 2024): an average of the weights in place of a schedule, 8 bytes.
    `stable_adamw` (Wortsman et al. 2023): AdamW whose updates are clipped tensor by tensor, 8 bytes. `adopt`
    (Taniguchi et al. 2024): Adam that converges at any second decay rate, 8 bytes. `muon` (Jordan et al. 2024): the
    momentum of matrices and filters is made orthogonal, 4 bytes; AdamW for the rest."""
    lr: Positive
    """Peak learning rate; `trainable` may give parts of the model their own. About 1 with `prodigy` and
    `dadapt_adam`, whose own estimate is taken times this; with `lion`, a third to a tenth of AdamW's."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    """Decay rates of the gradient's first and second moment. Default: [0.9, 0.999]; with `lion` [0.9, 0.99], where the
    first is of the update and the second of the moment; `stable_adamw` [0.9, 0.99]; `adopt` [0.9, 0.9999]."""
    eps: Positive | None = None
    """The term that keeps the division finite. Default: 1e-8; 1e-6 with `adopt`; 1e-30, which is added to squares,
    with `adafactor` and `came`."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decoupled weight decay. Default: 0.01; 0.1 with `lion` and `muon`, none with `adafactor`."""
    decay_norms_and_biases: Flag = True
    """Whether weight decay is for norms and biases too; all that is no matrix or convolution."""
    beta3: Beta | None = None
    """Of `came`: decay rate of the updates' instability, 0.9999. Of `prodigy`: decay rate of what the learning rate is
    estimated from; by default the root of the second of `betas`."""
    eps2: Positive | None = None
    """Of `adafactor`: the least size of a weight that updates are measured by, 1e-3. Of `came`: added to the squares of
    the instability, 1e-16."""
    clip_threshold: Positive | None = None
    """Of `adafactor` and `came`: an update of a tensor is scaled down to this root mean square, 1."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of `adafactor`: the second moment's decay rate at step t is 1 - t^-decay_rate; 0.8."""
    scale_by_weights: Flag | None = None
    """Of `adafactor`: whether updates are in proportion to the size of a tensor's weights, as in the paper; then
    `lr` is some 30 times what it else is. Default: true."""
    d0: Positive | None = None
    """Of `prodigy` and `dadapt_adam`: the first estimate of the learning rate, 1e-6; it can only rise."""
    d_coef: Positive | None = None
    """Of `prodigy` and `dadapt_adam`: factor of the estimate, 1; 0.5 to 2 to learn slower or faster."""
    growth_rate: Annotated[float, Field(gt=1)] | None = None
    """Of `prodigy` and `dadapt_adam`: by how much the estimate may rise in a step, such as 1.02. Default: any."""
    bias_correction: Flag | None = None
    """Of `prodigy` and `dadapt_adam`: AdamW's correction of young moments. Default: false, as in the papers' code."""
    safeguard_warmup: Flag | None = None
    """Of `prodigy`: keep a warm-up of `lr_schedule` out of the estimate. Default: false."""
    momentum: Beta | None = None
    """Of `muon`: decay rate of the momentum, 0.95."""
    nesterov: Flag | None = None
    """Of `muon`: look one step ahead. Default: true."""
    ns_steps: PositiveInt | None = None
    """Of `muon`: Newton-Schulz iterations that make an update orthogonal, 5."""
    lr_scale: Literal["like_adamw", "original"] | None = None
    """Of `muon`: `like_adamw` makes updates as large as AdamW's, so that one learning rate serves all weights (Liu et
    al. 2025); `original` takes them times the root of rows / columns, at least 1. Default: `like_adamw`."""
    compile: Literal["auto"] | Flag = "auto"
    """Fuse the arithmetic of `adamw_8bit`, and of `adamw` over bf16 weights, by torch.compile; `adamw` over fp32
    weights is fused as it is. `auto`: from 100 million weights a worker on, where this machine has a C++ compiler."""

    def settings(self) -> dict[str, Any]:
        """The kind's numbers but for the learning rate: those given, else its own."""
        given = {name: getattr(self, name) for name in KIND_DEFAULTS[self.kind]}
        numbers = {name: KIND_DEFAULTS[self.kind][name] if value is None else value for name, value in given.items()}
        if "betas" in numbers:
            numbers["betas"] = tuple(numbers["betas"])
        return numbers
