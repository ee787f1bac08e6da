"""Says what an adapter file is, from its header and its alphas."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainer.adapters.adapter_file import AdapterFile, AdapterLayer
from trainer.errors import printable

_WORDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
}
_PARTS = (
    ("UNet", ("lora_unet_", "unet.", "base_model.model.")),
    ("text encoder 1", ("lora_te1_", "text_encoder.", "text_encoder_1.")),
    ("text encoder 2", ("lora_te2_", "text_encoder_2.")),
)
_SHOWN = (
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.trigger_phrase", "modelspec.architecture",
    "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_args", "ss_steps", "ss_resolution",
    "sdxl_train.version",
)  # fmt: skip
_MOST = 200


def adapter_facts(file: AdapterFile) -> dict[str, Any]:
    """What there is to say, as plain values: kinds, ranks, alphas, layers by part, metadata."""
    layers = list(file.layers.values())
    parts = Counter(_part(layer.name) for layer in layers)
    return {
        "kinds": dict(Counter(_kind(layer) for layer in layers)),
        "naming": "kohya" if any(layer.name.startswith("lora_") for layer in layers) else "PEFT",
        "layers": dict(parts),
        "ranks": dict(sorted(Counter(layer.rank for layer in layers if layer.rank).items())),
        "alphas": dict(sorted(Counter(_alpha(layer) for layer in layers if layer.alpha is not None).items())),
        "weights": sum(tensor.meta.numel() for layer in layers for tensor in layer.tensors.values()),
        "dtypes": sorted({tensor.dtype for layer in layers for tensor in layer.tensors.values()}),
        "metadata": {name: printable(file.metadata[name], _MOST) for name in _SHOWN if name in file.metadata},
    }


def describe_adapter(file: AdapterFile) -> list[str]:
    """The same as lines of text."""
    facts = adapter_facts(file)
    lines = [
        f"{file.path}: {', '.join(facts['kinds'])} named as in {facts['naming']}'s files, {facts['weights']:,} weights "
        f"in {', '.join(facts['dtypes'])}"
    ]
    lines.append("layers: " + ", ".join(f"{name} {count:,}" for name, count in facts["layers"].items()))
    if facts["ranks"]:
        lines.append("rank: " + _counted(facts["ranks"]))
    lines.append("alpha: " + (_counted(facts["alphas"]) if facts["alphas"] else "none, so that changes count once"))
    if not any(name.startswith("text") for name in facts["layers"]):
        lines.append("text encoders: unchanged")
    return lines + [f"{name}: {text}" for name, text in facts["metadata"].items()]


def _counted(found: dict[Any, int]) -> str:
    if len(found) == 1:
        return f"{next(iter(found)):g}"
    return ", ".join(f"{value:g} ({count:,} layers)" for value, count in found.items())


def _kind(layer: AdapterLayer) -> str:
    wide = layer.kind == "lora" and layer.tensors["lora_down.weight"].meta.shape[2:] not in ((), (1, 1))
    return "LoCon" if wide else _WORDS[layer.kind]


def _part(name: str) -> str:
    return next((part for part, beginnings in _PARTS if name.startswith(beginnings)), "other")


def _alpha(layer: AdapterLayer) -> float:
    assert layer.alpha is not None
    return round(float(layer.alpha.read().float().reshape(()).item()), 4)
