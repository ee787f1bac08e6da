"""What of SDXL trains and how fast, by the names of its weights; on the meta device, with SDXL's own configurations."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from trainer.config.sections.trainable_config import TextEncoderPart, TrainableConfig, UnetPart
from trainer.errors import UserError
from trainer.model.selection.part_names import part_names
from trainer.model.selection.weight_rates import Rate, weight_rates
from trainer.model.trainable import lay_out_model
from trainer.model_files.key_map import single_file_keys
from trainer.model_files.presets import preset


class Sdxl:
    """Its configurations, without weights."""

    def config(self, component: str) -> Mapping[str, Any]:
        return preset(component)


SDXL: Any = Sdxl()
COUNTS = {
    "all": 2_567_463_684,
    "unet_71": 1_827_058_244,
    "unet_68": 1_764_781_124,
    "unet_63": 1_629_562_564,
    "attention": 955_353_600,
    "cross_attention": 545_670_400,
    "deepest_half": 2_447_439_360,
    "deepest_quarter": 1_195_101_440,
    "outer_half": 120_024_324,
}


def names_of(component: str) -> list[str]:
    return [name for entry in single_file_keys({component: preset(component)}) for name in entry.names]


def unet_rates(**part: Any) -> dict[str, Rate]:
    return weight_rates(UnetPart.model_validate(part), part_names("unet", names_of("unet"), SDXL))


def text_rates(which: int = 1, **part: Any) -> dict[str, Rate]:
    name, component = f"text_encoder_{which}", "text_encoder" if which == 1 else "text_encoder_2"
    named = part_names(name, names_of(component), SDXL)
    return weight_rates(TextEncoderPart.model_validate({"train": True, **part}), named)


@pytest.mark.parametrize("name", COUNTS)
def test_the_presets_train_so_many_weights(name: str) -> None:
    model = lay_out_model(SDXL, TrainableConfig.model_validate({"unet": {"preset": name}}), torch.bfloat16)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(weight.is_meta for weight in weights.values())
    assert sum(weight.numel() for weight in weights.values()) == COUNTS[name]
    assert model.rates.keys() == weights.keys() and not model.resting


def test_the_presets_by_depth_part_the_unet() -> None:
    deep, outer = unet_rates(preset="deepest_half"), unet_rates(preset="outer_half")
    assert not deep.keys() & outer.keys() and len(deep) + len(outer) == len(unet_rates())
    assert unet_rates(preset="deepest_quarter").keys() < deep.keys()
    assert {"conv_in.weight", "conv_out.bias", "time_embedding.linear_1.weight"} <= outer.keys()


def test_the_last_pattern_that_means_a_weight_counts() -> None:
    rates = unet_rates(lr_scale={"attn2": 0.5, "middle_block": 2.0, "attn2.to_k": 0.1, "input_blocks.0*": 0})
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert rates[f"{block}.attn2.to_q.weight"] == Rate(2.0)
    assert rates[f"{block}.attn2.to_k.weight"] == Rate(0.1)
    assert rates[f"{block}.attn1.to_k.weight"] == Rate(2.0)
    assert rates["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight"] == Rate(0.5)
    assert rates["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == Rate()
    assert not {"conv_in.weight", "conv_in.bias"} & rates.keys()


def test_a_pattern_is_whole_words_in_either_naming() -> None:
    of_file, of_module = unet_rates(only=["input_blocks.4.1"]), unet_rates(only=["down_blocks.1.attentions.0"])
    assert of_file.keys() == of_module.keys() and len(of_file) > 20
    for none in ("ttn2", "attn2.to_", "input_blocks.4.1x", "blocks.4"):
        with pytest.raises(UserError, match="is the beginning of no weight's name"):
            unet_rates(only=[none])
    inside = unet_rates(only=["to_k"])
    assert inside and all(".to_k." in name for name in inside)


def test_only_freeze_and_preset_meet() -> None:
    rates = unet_rates(preset="attention", only=["middle_block", "output_blocks"], freeze=["to_v"])
    assert all(".attn" in n and n.startswith(("mid_", "up_")) and ".to_v." not in n for n in rates) and rates


def test_layer_decay_goes_by_the_distance_from_the_output() -> None:
    rates = unet_rates(layer_decay=0.9, lr_scale={"to_k": 0.5})
    distances = {
        "conv_out.weight": 0,
        "up_blocks.2.resnets.2.conv1.weight": 1,
        "up_blocks.0.resnets.0.conv1.weight": 9,
        "mid_block.resnets.1.conv1.weight": 10,
        "down_blocks.2.resnets.1.conv1.weight": 11,
        "conv_in.bias": 19,
        "time_embedding.linear_1.weight": 20,
        "add_embedding.linear_1.weight": 20,
    }
    assert {name: rates[name].lr_scale for name in distances} == {name: 0.9**d for name, d in distances.items()}
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert rates[key].lr_scale == 0.5 * 0.9**10


@pytest.mark.parametrize(("which", "last", "used"), [(1, 10, 11), (2, 31, 32)])
def test_layer_decay_of_text_encoders(which: int, last: int, used: int) -> None:
    """Of the first one, the last layer and the final norm are never used."""
    rates = text_rates(which, layer_decay=0.8)
    scales = {name.removeprefix("text_model."): rate.lr_scale for name, rate in rates.items()}
    assert scales[f"encoder.layers.{last}.mlp.fc1.weight"] == 0.8
    assert scales["encoder.layers.0.mlp.fc1.weight"] == 0.8**used
    assert scales["embeddings.token_embedding.weight"] == 0.8 ** (used + 1)
    assert scales.get("final_layer_norm.bias") == (None if which == 1 else 1.0)
    assert scales.get("text_projection.weight") == (None if which == 1 else 1.0)
    assert (f"encoder.layers.{last + 1}.mlp.fc1.weight" in scales) is False


NOTHING_LEFT = "leaves nothing to train; write `trainable.unet.train: false`"
NO_NAME = "is the beginning of no weight's name"


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"freeze": ["input_block.1"]}, f"freeze: `input_block.1` {NO_NAME}; did you mean `input_blocks.1`?"),
        ({"only": ["atn2"]}, f"only: `atn2` {NO_NAME}; did you mean `attn2`?"),
        ({"lr_scale": {"midle_block": 1.0}}, f"lr_scale: `midle_block` {NO_NAME}; did you mean `middle_block`?"),
        ({"weight_decay_scale": {"zzz": 1.0}}, f"weight_decay_scale: `zzz` {NO_NAME}"),
        (
            {"lr_scale": {"attn2.to_k": 0.1, "attn2": 0.5}},
            "lr_scale: `attn2.to_k` counts for no weight, for patterns after it mean all of its own; write the general "
            "ones first",
        ),
        (
            {"lr_scale": {"attn2": 0.1}, "only": ["attn1"]},
            "lr_scale: `attn2` means only weights that do not train",
        ),
        (
            {"weight_decay_scale": {"attn2": 0}, "lr_scale": {"attn2": 0}},
            "weight_decay_scale: `attn2` means only weights that do not train",
        ),
        ({"lr_scale": {"*": 0}}, f"lr_scale: {NOTHING_LEFT}"),
        ({"freeze": ["*"]}, f"freeze: {NOTHING_LEFT}"),
        ({"only": ["conv_in"], "preset": "deepest_half"}, f"only: {NOTHING_LEFT}"),
    ],
)
def test_each_mistake_is_one_line(part: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        unet_rates(**part)
    assert str(refused.value) == f"trainable.unet.{line}"


def test_a_preset_of_another_unet_is_refused() -> None:
    class Small:
        def config(self, component: str) -> Mapping[str, Any]:
            more = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
            return preset(component) | more | {"block_out_channels": [320, 640], "transformer_layers_per_block": [1, 1]}

    small: Any = Small()
    entries = single_file_keys({"unet": small.config("unet")})
    named = part_names("unet", [name for entry in entries for name in entry.names], small)
    with pytest.raises(UserError, match=r"trainable\.unet\.preset = unet_63: is for SDXL's UNet; this one has no `"):
        weight_rates(UnetPart(preset="unet_63"), named)
