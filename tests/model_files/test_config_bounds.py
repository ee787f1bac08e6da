"""Bounds of configurations: SDXL's own pass, and what no sensible network has is refused with key, value and rule."""

from typing import Any

import pytest

from trainer.model_files.config_bounds import ConfigFault, require_bounded
from trainer.model_files.key_map import COMPONENTS
from trainer.model_files.presets import preset

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels": ("unet", {"block_out_channels": [3_200_000_000]}, "block_out_channels = 3200000000: wanted 1 to 4,096"),
    "layers": ("unet", {"layers_per_block": 10**6}, "layers_per_block = 1000000: wanted 1 to 16"),
    "a truth": ("unet", {"layers_per_block": True}, "layers_per_block = True: wanted a whole number"),
    "levels": ("unet", {"block_out_channels": [16] * 9}, "block_out_channels has 9 entries; wanted at most 8"),
    "not as many": ("vae", {"block_out_channels": [16]}, "down_block_types has 4 entries, and block_out_channels 1"),
    "a product": (
        "unet",
        {"transformer_layers_per_block": [0, 32, 32], "layers_per_block": 16},
        "asks for 2,112 transformer blocks in 3 levels; wanted at most 500",
    ),
    "depth": ("vae", {"latents_mean": [[[[[[[[1]]]]]]]]}, "latents_mean is nested too deep"),
    "digits": ("text_encoder", {"hidden_size": 10**500}, "hidden_size = a number of more than 30 digits"),
    "words": ("text_encoder_2", {"vocab_size": 3_000_000}, "vocab_size = 3000000: wanted 1 to 1,000,000"),
    "other code": ("text_encoder", {"auto_map": {"AutoModel": "a.B"}}, "could lead to other code"),
    "an escape": (
        "unet",
        {"cross_attention_dim": "\x1b[2J"},
        r"cross_attention_dim = '\x1b[2J': wanted a whole number",
    ),
}


@pytest.mark.parametrize("component", COMPONENTS)
def test_published_configurations_pass(component: str) -> None:
    require_bounded(component, preset(component))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_network_has_is_refused(name: str) -> None:
    component, change, told = REFUSED[name]
    with pytest.raises(ConfigFault) as refused:
        require_bounded(component, preset(component) | change)
    assert told in str(refused.value)
