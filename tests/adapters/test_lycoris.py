"""What LyCORIS' own loader makes of exported adapters; skipped where the package is not installed.

pip install lycoris-lora
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.test_adapter_export import base_unet, exported, ours, output, prepared, runs  # noqa: F401 - fixtures
from trainer.config.schema import Config

pytestmark = pytest.mark.slow


THEIR_NAMES = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
THEIR_NAMES |= {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2"}
THEIR_NAMES |= {"skip_connection": "conv_shortcut", "samplers_0_op": "samplers_0_conv"}


def in_diffusers_terms(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The UNet's layers by the names of diffusers' modules, where LyCORIS looks them up: blocks by diffusers' table."""
    of_unet = {name: tensor for name, tensor in state.items() if name.startswith("lora_unet_")}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(of_unet), SimpleNamespace(**dict(config)))
    for theirs, mine in THEIR_NAMES.items():
        mapped = {name.replace(theirs, mine): tensor for name, tensor in mapped.items()}
    return {**mapped, **{name: tensor for name, tensor in state.items() if name not in of_unet}}


def under_one_name(encoder: nn.Module) -> nn.Module:
    """A text encoder whose modules begin with `text_model`, as kohya's scripts find them."""
    if any(name.startswith("text_model") for name, _ in encoder.named_modules()):
        return encoder
    holder = nn.Module()
    holder.text_model = encoder
    return holder


@pytest.mark.parametrize("kind", ["lora", "locon", "loha", "lokr", "dora"])
def test_lycoris_gives_the_same_output(
    runs: dict[str, Config],  # noqa: F811
    model_folder: Path,
    prepared: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    """The UNet's output and the second text encoder's to 1e-5; each layer of the file has found its module."""
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet, second = base_unet(model_folder), CLIPTextModelWithProjection.from_pretrained(model_folder / "text_encoder_2")
    parts = {
        "lora_unet": unet,
        "lora_te1": under_one_name(CLIPTextModel.from_pretrained(model_folder / "text_encoder")),
        "lora_te2": under_one_name(second),
    }
    places = {
        f"{prefix}_{name}".replace(".", "_"): module
        for prefix, part in parts.items()
        for name, module in part.named_modules()
    }
    state, plain = load_file(exported(runs[kind], tmp_path / "fox.safetensors")), output(unet)
    state = in_diffusers_terms(state, unet.config)
    for name in dict.fromkeys(key.split(".")[0] for key in state):
        # As `lycoris.kohya.create_network_from_weights` does it.
        algorithm, tensors = modules.get_module(state, name)
        layer = modules.make_module(algorithm, tensors, name, places[name])
        layer.apply_to()
    model, ids = ours(runs[kind], prepared), torch.arange(77).view(1, 77)
    expected = output(model.unet)
    assert (expected - plain).abs().max() > 1e-2
    assert (output(unet) - expected).abs().max() < 1e-5
    with torch.no_grad():
        theirs, mine = (encoder.eval()(ids).text_embeds for encoder in (second, model.text_encoder_2))
    assert (theirs - mine).abs().max() < 1e-5
