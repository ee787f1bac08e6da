"""Recognises what is added to a diffusion model: LoRAs, textual inversions, ControlNets, adapters; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

_Shapes = Mapping[str, tuple[int, ...]]
_LORA = re.compile(
    r"^lora_(unet|te\d?|prior)_|\.lora_[AB]\.|\.lora_(up|down)\b|\.lora\.(up|down)\.|\.lora_(linear|embedding)"
    r"|\.(hada|lokr)_w[12]|\.oft_(blocks|diag)|\.boft_|\.dora_scale$|^(oft|boft)_unet_"
)
_CONTROLNET = re.compile(r"(control_model\.|input_hint_block\.|controlnet_|zero_convs\.)")
_ADAPTER = (
    (re.compile(r"(image_proj|ip_adapter)\."), "an IP-Adapter"),
    (re.compile(r"(adapter\.)?body\.\d+\.(block1|resnets)\."), "a T2I-Adapter"),
    (re.compile(r".*motion_modules\."), "an AnimateDiff motion module"),
)
_BASES = (
    (re.compile(r"sdxl|stable-diffusion-xl|^xl$", re.I), "SDXL"),
    (re.compile(r"flux", re.I), "Flux"),
    (re.compile(r"sd_?3|stable-diffusion-3", re.I), "Stable Diffusion 3"),
    (re.compile(r"sd_?v?2|stable-diffusion-v2", re.I), "Stable Diffusion 2"),
    (re.compile(r"sd_?v?1|stable-diffusion-v1", re.I), "Stable Diffusion 1"),
)
_TEXT_WIDTHS = {2048: "SDXL", 1280: "the SDXL refiner", 1024: "Stable Diffusion 2", 768: "Stable Diffusion 1"}


def adapter(shapes: _Shapes, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(kind, description) of an addition to a model, from its tensors and metadata; None if it is none.

    The kinds are `lora`, `embedding`, `controlnet` and `adapter`.
    """
    if any(_LORA.search(name) for name in shapes):
        return "lora", _lora(shapes, metadata)
    if any(_CONTROLNET.match(name) for name in shapes):
        return "controlnet", "a ControlNet"
    for pattern, name in _ADAPTER:
        if any(pattern.match(own) for own in shapes):
            return "adapter", name
    if len(shapes) <= 8 and all(len(shape) == 2 and 0 < shape[0] <= 256 for shape in shapes.values()):
        return _embedding(shapes)
    return None


def _lora(shapes: _Shapes, metadata: Mapping[str, str]) -> str:
    base = _lora_base(shapes, metadata)
    kind, rank = _lora_kind(shapes)
    named = f"a LoRA for {base}" if base else "a LoRA"
    return f"{named} ({kind}, rank {rank})" if rank else f"{named} ({kind})"


def _lora_base(shapes: _Shapes, metadata: Mapping[str, str]) -> str | None:
    for key in ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"):
        for pattern, base in _BASES:
            if pattern.search(metadata.get(key, "")):
                return base
    if any(re.search(r"lora_te2_|text_encoder_2\.", name) for name in shapes):
        return "SDXL"
    if any(re.search(r"double_blocks|single_transformer_blocks", name) for name in shapes):
        return "Flux"
    if any("joint_blocks" in name for name in shapes):
        return "Stable Diffusion 3"
    for name, shape in shapes.items():
        if re.search(r"attn2[._](processor\.)?to_[kv].*(lora_down|lora_A|lora\.down|to_[kv]_lora\.down)", name):
            return _TEXT_WIDTHS.get(shape[-1] if shape else 0)
    return None


def _lora_kind(shapes: _Shapes) -> tuple[str, int | None]:
    """Whose naming it is, and the rank of the first pair."""
    for pattern, kind in (
        (r"\.hada_w1", "LyCORIS LoHa"),
        (r"\.lokr_w[12]", "LyCORIS LoKr"),
        (r"(oft|boft)_", "OFT"),
    ):
        if any(re.search(pattern, name) for name in shapes):
            return kind, None
    down = next((s for n, s in shapes.items() if re.search(r"lora_down|lora_A|lora\.down|lora_linear.*down", n)), None)
    rank = down[0] if down else None
    if any(re.match(r"lora_(unet|te\d?)_", name) for name in shapes):
        return "kohya", rank
    return ("PEFT" if any(".lora_A." in name for name in shapes) else "diffusers"), rank


def _embedding(shapes: _Shapes) -> tuple[str, str] | None:
    tokens, width = next(iter(shapes.values()))
    if {"clip_l", "clip_g"} <= shapes.keys():
        return "embedding", f"a textual inversion for SDXL ({tokens} tokens)"
    if shapes.keys() & {"emb_params", "clip_l", "clip_g"} or (len(shapes) <= 2 and width in _TEXT_WIDTHS):
        base = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}.get(width)
        return "embedding", f"a textual inversion{f' for {base}' if base else ''} ({tokens} tokens)"
    return None
