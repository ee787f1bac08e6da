"""What a checkpoint calls the state of each kind, so that a state is never taken for that of another kind."""

import torch
from torch import Tensor

from trainer.optim.eight_bit import takes_8_bits
from trainer.optim.kinds.rule import Rule

COLUMNS = "_col"
"""The end of the names of what every worker has all of: the moments of columns."""
TRAINED = "trained"
"""The weights that train, where the checkpoint's components hold others."""
_OF_ALL = ("step", "compensation")


def stored_name(rule: Rule | None, key: str) -> str:
    """The name in a checkpoint: with the kind before it, but for AdamW's and for what all kinds have."""
    return key if rule is None or key in _OF_ALL else f"{rule.kind}-{key}"


def kind_that_keeps(key: str, value: Tensor, parameter: Tensor) -> str | None:
    """The kind whose checkpoint holds this state of a parameter; None where its name and bits do not tell."""
    kind, divider, _ = key.rpartition("-")
    if divider:
        return kind
    if key not in ("exp_avg", "exp_avg_sq"):
        return None
    if value.dtype == torch.uint8:
        return "adamw_8bit"
    return "adamw" if takes_8_bits(tuple(parameter.shape)) else None
