"""The one table of names between SDXL's single file and the components' modules, for both directions; without torch.

The table is generated from the components' configurations. A single file names the UNet as the reference
implementation does (`model.diffusion_model.`), the VAE as CompVis did (`first_stage_model.`), the first text encoder as
transformers 4 did and the second as OpenCLIP did (`conditioner.embedders.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.model_files.config_bounds import require_bounded

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ENCODER_PREFIX = "conditioner.embedders.0.transformer.text_model."
TEXT_ENCODER_2_PREFIX = "conditioner.embedders.1.model."
PREFIXES = {
    "unet": UNET_PREFIX,
    "vae": VAE_PREFIX,
    "text_encoder": TEXT_ENCODER_PREFIX,
    "text_encoder_2": TEXT_ENCODER_2_PREFIX,
}
# Published files hold two tensors that no module has: both are constants, ignored when read.
POSITION_IDS = TEXT_ENCODER_PREFIX + "embeddings.position_ids"  # int64 [1, 77]: 0 to 76
LOGIT_SCALE = TEXT_ENCODER_2_PREFIX + "logit_scale"  # scalar, ln(100) = 4.6052
LOGIT_SCALE_VALUE = 4.6052
TEXT_PROJECTION = TEXT_ENCODER_2_PREFIX + "text_projection"

Form = Literal["same", "transposed", "stacked", "conv1x1"]
# (module's, file's) names
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
)
_CLIP_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm1",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm2",
)
_OPEN_CLIP_PARTS = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("layer_norm2", "ln_2"),
)
_WEIGHT_AND_BIAS = ("weight", "bias")


@dataclass(frozen=True)
class KeyEntry:
    """One tensor of a single file and where it goes.

    Attributes:
        file_name: its name in a single file.
        component: one of `COMPONENTS`.
        names: its names in the component's module, as diffusers 0.42 and transformers 5 have them; three for
            OpenCLIP's stacked query, key and value, else one.
        form: `same`; `transposed`: the file has the matrix of x @ P, the module a Linear's weight; `stacked`: the
            module's tensors one below the other; `conv1x1`: the file has [out, in, 1, 1], the module [out, in].
    """

    file_name: str
    component: str
    names: tuple[str, ...]
    form: Form = "same"


def single_file_keys(configs: Mapping[str, Mapping[str, Any]]) -> tuple[KeyEntry, ...]:
    """The table for components of these configurations, in the file's usual order.

    Args:
        configs: `config.json` of any of `COMPONENTS`, by name. The UNet is of SDXL's kind: its middle block has
            attention, its residual blocks take the time embedding.
    Raises:
        ConfigFault: a configuration has no sensible size.
    """
    for name, config in configs.items():
        require_bounded(name, config)
    makers = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder, "text_encoder_2": _text_encoder_2}
    return tuple(entry for name in COMPONENTS if name in configs for entry in makers[name](configs[name]))


def _pairs(component: str, prefix: str, pairs: Iterator[tuple[str, str]]) -> Iterator[KeyEntry]:
    """Entries for weight and bias of modules, given as (module's, file's) names."""
    for name, file_name in pairs:
        for part in _WEIGHT_AND_BIAS:
            yield KeyEntry(f"{prefix}{file_name}.{part}", component, (f"{name}.{part}",))


def _unet(config: Mapping[str, Any]) -> Iterator[KeyEntry]:
    yield from _pairs("unet", UNET_PREFIX, _unet_modules(config))
    for name, file_name, depth in _unet_transformers(config):
        inner = [("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out")]
        yield from _pairs("unet", UNET_PREFIX, ((f"{name}.{part}", f"{file_name}.{at}") for part, at in inner))
        for layer in range(depth):
            for part in _TRANSFORMER_BLOCK:
                rest = f"transformer_blocks.{layer}.{part}"
                yield KeyEntry(f"{UNET_PREFIX}{file_name}.{rest}", "unet", (f"{name}.{rest}",))


_TRANSFORMER_BLOCK = (
    *(f"{attention}.to_{part}.weight" for attention in ("attn1", "attn2") for part in "qkv"),
    *(f"{attention}.to_out.0.{part}" for attention in ("attn1", "attn2") for part in _WEIGHT_AND_BIAS),
    *(f"ff.net.{layer}.{part}" for layer in ("0.proj", "2") for part in _WEIGHT_AND_BIAS),
    *(f"norm{n}.{part}" for n in (1, 2, 3) for part in _WEIGHT_AND_BIAS),
)


def _unet_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Modules outside the transformers, as (module's, file's) names."""
    for layer, at in (("linear_1", "0"), ("linear_2", "2")):
        yield f"time_embedding.{layer}", f"time_embed.{at}"
        yield f"add_embedding.{layer}", f"label_emb.0.{at}"
    yield "conv_in", "input_blocks.0.0"
    channels, layers = _channels(config), _layers(config)
    last = len(channels) - 1
    skips = [channels[0]]  # channels that the way up gets from the way down, in the order they are made
    at, width = 1, channels[0]
    for i, out in enumerate(channels):
        for j in range(layers[i]):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{at}.0", width != out)
            at, width = at + 1, out
            skips.append(out)
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{at}.0.op"
            at += 1
            skips.append(out)
    yield from _resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", False)
    at = 0
    for i, out in enumerate(reversed(channels)):
        with_attention = _has_attention(config["up_block_types"][i])
        for j in range(layers[last - i] + 1):
            skip = skips.pop()
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{at}.0", width + skip != out)
            if i < last and j == layers[last - i]:
                yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{at}.{2 if with_attention else 1}.conv"
            at, width = at + 1, out
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _resnet(name: str, file_name: str, with_shortcut: bool) -> Iterator[tuple[str, str]]:
    for part, at in _RESNET:
        yield f"{name}.{part}", f"{file_name}.{at}"
    if with_shortcut:
        yield f"{name}.conv_shortcut", f"{file_name}.skip_connection"


def _unet_transformers(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Transformers as (module's name, file's name, blocks)."""
    layers = _layers(config)
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(layers) if isinstance(depths, int) else list(depths)
    at = 1
    for i, kind in enumerate(config["down_block_types"]):
        if _has_attention(kind):
            for j in range(layers[i]):
                yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{at + j}.1", depths[i]
        at += layers[i] + 1
    yield "mid_block.attentions.0", "middle_block.1", depths[-1]
    at = 0
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    for i, kind in enumerate(config["up_block_types"]):
        count = layers[len(layers) - 1 - i] + 1
        if _has_attention(kind):
            for j in range(count):
                yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{at + j}.1", up_depths[i]
        at += count


def _has_attention(kind: str) -> bool:
    return kind.startswith("CrossAttn")


def _channels(config: Mapping[str, Any]) -> list[int]:
    return list(config["block_out_channels"])


def _layers(config: Mapping[str, Any]) -> list[int]:
    layers = config.get("layers_per_block", 2)
    return [layers] * len(_channels(config)) if isinstance(layers, int) else list(layers)


def _vae(config: Mapping[str, Any]) -> Iterator[KeyEntry]:
    yield from _pairs("vae", VAE_PREFIX, _vae_modules(config))
    if config.get("mid_block_add_attention", True):
        for half in ("encoder", "decoder"):
            name, file_name = f"{half}.mid_block.attentions.0", f"{VAE_PREFIX}{half}.mid.attn_1"
            yield from _pairs("vae", "", iter([(f"{name}.group_norm", f"{file_name}.norm")]))
            for part, at in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
                yield KeyEntry(f"{file_name}.{at}.weight", "vae", (f"{name}.{part}.weight",), "conv1x1")
                yield KeyEntry(f"{file_name}.{at}.bias", "vae", (f"{name}.{part}.bias",))


def _vae_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Modules outside the attention, as (module's, file's) names."""
    channels, layers = _channels(config), config.get("layers_per_block", 1)
    last = len(channels) - 1
    width = channels[0]
    for i, out in enumerate(channels):
        for j in range(layers):
            yield from _vae_resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", width != out)
            width = out
        if i < last:
            yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
    # The decoder's blocks are numbered from the image in the file, from the latents in the module.
    for i, out in enumerate(reversed(channels)):
        at = f"decoder.up.{last - i}"
        for j in range(layers + 1):
            yield from _vae_resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"{at}.block.{j}", width != out)
            width = out
        if i < last:
            yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"{at}.upsample.conv"
    for half in ("encoder", "decoder"):
        for n in (0, 1):
            yield from _vae_resnet(f"{half}.mid_block.resnets.{n}", f"{half}.mid.block_{n + 1}", False)
        for part, at in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{part}", f"{half}.{at}"
    if config.get("use_quant_conv", True):
        yield "quant_conv", "quant_conv"
    if config.get("use_post_quant_conv", True):
        yield "post_quant_conv", "post_quant_conv"


def _vae_resnet(name: str, file_name: str, with_shortcut: bool) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{name}.{part}", f"{file_name}.{part}"
    if with_shortcut:
        yield f"{name}.conv_shortcut", f"{file_name}.nin_shortcut"


def _text_encoder(config: Mapping[str, Any]) -> Iterator[KeyEntry]:
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for layer in range(config.get("num_hidden_layers", 12)):
        names += [f"encoder.layers.{layer}.{part}.{kind}" for part in _CLIP_PARTS for kind in _WEIGHT_AND_BIAS]
    names += [f"final_layer_norm.{kind}" for kind in _WEIGHT_AND_BIAS]
    for name in names:
        yield KeyEntry(TEXT_ENCODER_PREFIX + name, "text_encoder", (name,))


def _text_encoder_2(config: Mapping[str, Any]) -> Iterator[KeyEntry]:
    component, prefix, at = "text_encoder_2", TEXT_ENCODER_2_PREFIX, "text_model."
    yield KeyEntry(f"{prefix}token_embedding.weight", component, (f"{at}embeddings.token_embedding.weight",))
    yield KeyEntry(f"{prefix}positional_embedding", component, (f"{at}embeddings.position_embedding.weight",))
    for n in range(config.get("num_hidden_layers", 12)):
        layer, block = f"{at}encoder.layers.{n}", f"{prefix}transformer.resblocks.{n}"
        for kind in _WEIGHT_AND_BIAS:
            stacked = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield KeyEntry(f"{block}.attn.in_proj_{kind}", component, stacked, "stacked")
        yield from _pairs(component, "", ((f"{layer}.{name}", f"{block}.{own}") for name, own in _OPEN_CLIP_PARTS))
    yield from _pairs(component, prefix, iter([(f"{at}final_layer_norm", "ln_final")]))
    yield KeyEntry(TEXT_PROJECTION, component, ("text_projection.weight",), "transposed")


_BLOCKS = (
    (re.compile(r"model\.diffusion_model\.((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+|[a-z_]+)\."), r"\1"),
    (re.compile(r"first_stage_model\.((?:en|de)coder)\.(mid|(?:down|up)\.\d+|[a-z_]+)\..*"), r"vae.\1.\2"),
    (re.compile(r"first_stage_model\.([a-z_]+)\..*"), r"vae.\1"),
    (re.compile(r"conditioner\.embedders\.0\.transformer\.text_model\.encoder\.(layers\.\d+)\."), r"text_encoder_1.\1"),
    (re.compile(r"conditioner\.embedders\.0\.transformer\.text_model\.([a-z_]+)"), r"text_encoder_1.\1"),
    (re.compile(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\."), r"text_encoder_2.layers.\1"),
    (re.compile(r"conditioner\.embedders\.1\.model\.(?:token_embedding|positional_embedding)"),
     r"text_encoder_2.embeddings"),
    (re.compile(r"conditioner\.embedders\.1\.model\.ln_final"), r"text_encoder_2.final_layer_norm"),
    (re.compile(r"conditioner\.embedders\.1\.model\.(text_projection|logit_scale)"), r"text_encoder_2.\1"),
)  # fmt: skip


def block_of(file_name: str) -> str:
    """The block that a tensor of a single file belongs to; "other" if its name is not SDXL's.

    UNet: `input_blocks.4.1` (the residual block is .0, its transformer .1), `middle_block.1`, `output_blocks.2.2`,
    `time_embed`, `label_emb`, `out`. VAE: `vae.encoder.down.1`, `vae.decoder.mid`, `vae.quant_conv`. Text encoders:
    `text_encoder_1.layers.3`, `text_encoder_2.embeddings`, `.final_layer_norm`, `.text_projection`.
    """
    for pattern, form in _BLOCKS:
        found = pattern.match(file_name)
        if found:
            return found.expand(form)
    return "other"
