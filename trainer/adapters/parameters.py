"""An adapted model's own parameters among the base's; imports no PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn

PEFT_NAME = "default"
"""What PEFT's layers call the one adapter, in the names of its parameters."""


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What of an adapted model is the adapter's, by name."""
    inside, at_end = f".{PEFT_NAME}.", f".{PEFT_NAME}"
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (inside in name or name.endswith(at_end)) and ".base_layer." not in name
    }


def scale_in(layer: Any) -> float:
    """How many times an adapted layer's change counts; 1 of a rotation."""
    return float(getattr(layer, "scaling", {}).get(PEFT_NAME, 1.0))
