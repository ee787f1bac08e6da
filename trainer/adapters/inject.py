"""Puts an adapter's layers (PEFT's) into a model that lies on the meta device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.big_modeling import init_empty_weights
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.adapters.dora import ExactDora
from trainer.adapters.parameters import PEFT_NAME
from trainer.adapters.targets import Target
from trainer.config.sections.adapter_config import AdapterConfig, rank_of, scale_of
from trainer.errors import UserError

_LORAS = ("lora", "locon", "dora")


def inject(
    module: nn.Module, targets: Sequence[Target], config: AdapterConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Replace the target layers of one part of the model; in place. What is new lies on the meta device, in `dtype`.

    Everything but the new parameters is frozen.

    Args:
        targets: of this part, at least one.
    Raises:
        UserError: the blocks of `oft` do not divide a layer.
    """
    names = {target.place.module: target.is_conv for target in targets}
    if config.kind == "oft":
        _require_blocks(module, names, config.rank)
    with init_empty_weights():
        inject_adapter_in_model(peft_config(names, config), module, PEFT_NAME)
    for name, is_conv in names.items():
        layer: Any = module.get_submodule(name)
        assert isinstance(layer, BaseTunerLayer), f"{name} was not replaced"
        _settle(layer, scale_of(config, is_conv=is_conv), config)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def peft_config(names: dict[str, bool], config: AdapterConfig) -> PeftConfig:
    """PEFT's own configuration of an adapter on these modules (name -> whether it is a larger convolution)."""
    wide = [re.escape(name) for name, is_conv in names.items() if is_conv]
    rank, common = config.rank, dict[str, Any](target_modules=sorted(names))
    if config.kind == "oft":
        return OFTConfig(r=0, oft_block_size=rank, use_cayley_neumann=False, **common)
    alphas = {is_conv: scale_of(config, is_conv=is_conv) * _divisor(config, is_conv) for is_conv in (False, True)}
    common |= {"r": rank, "lora_alpha" if config.kind in _LORAS else "alpha": alphas[False]}
    if wide:  # one expression for all of them: each pattern is tried on each layer
        pattern = "|".join(wide)
        common |= {"rank_pattern": {pattern: rank_of(config, is_conv=True)}, "alpha_pattern": {pattern: alphas[True]}}
    if config.kind == "loha":
        return LoHaConfig(**common)
    if config.kind == "lokr":
        return LoKrConfig(decompose_factor=config.lokr_factor or -1, **common)
    return LoraConfig(use_rslora=config.rank_stabilized, use_dora=config.kind == "dora", **common)


def _divisor(config: AdapterConfig, is_conv: bool) -> float:
    """What PEFT divides its alpha by; LoHa and LoKr know no stabilized ranks there."""
    rank = rank_of(config, is_conv=is_conv)
    return rank**0.5 if config.rank_stabilized and config.kind in _LORAS else rank


def _settle(layer: Any, scale: float, config: AdapterConfig) -> None:
    """What of PEFT's layers is not as exact as it has to be."""
    layer.cast_input_dtype_enabled = False  # autocast's matter; else activations would be kept in fp32
    if config.kind == "oft":
        return
    layer.scaling[PEFT_NAME] = scale
    if config.kind in ("loha", "lokr"):
        layer.module_dropout[PEFT_NAME] = -1.0  # PEFT leaves the layer out where a random number is not above it
    if config.kind == "dora":
        layer.lora_variant[PEFT_NAME] = ExactDora()


def _require_blocks(module: nn.Module, names: dict[str, bool], side: int) -> None:
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.in_features % side:
            raise UserError(
                f"adapter.rank = {side}: blocks of `oft` must divide the layers, and {name} takes {layer.in_features} "
                "channels; 16, 32 and 64 divide all of SDXL's"
            )
