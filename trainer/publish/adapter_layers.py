"""The layers of an adapter, of a checkpoint or of a file, by their places in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.adapters.adapter_file import AdapterLayer, open_adapter, placed_layers
from trainer.adapters.adapter_names import COMPONENT_OF, TO_KOHYA, Place, split_stored
from trainer.checkpoint.ema_folders import average_folder
from trainer.checkpoint.manifest import MANIFEST, manifest_entry, read_manifest
from trainer.checkpoint.run_dir import CHECKPOINTS, checkpoint_at
from trainer.checkpoint.write import WEIGHTS_FILES
from trainer.config.sections.adapter_config import AdapterConfig, scale_of
from trainer.config.sections.ema_config import LIVE
from trainer.errors import UserError
from trainer.model.adapted import read_settings
from trainer.model_files.components import Component, ComponentTensor
from trainer.model_files.model_source import open_tensors
from trainer.publish.export_source import require_average

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class StoredAdapter:
    """A checkpoint's adapter.

    Attributes:
        layers: as a file would have them, alphas and all.
    """

    config: AdapterConfig
    layers: dict[Place, AdapterLayer]


def adapter_in(place: Path) -> Path | None:
    """The checkpoint that `place` means, if it is a run or a checkpoint and holds an adapter."""
    if not ((place / MANIFEST).is_file() or (place / CHECKPOINTS).is_dir()):
        return None
    found = checkpoint_at(place)
    return found.absolute() if found is not None and (found / "adapter").is_dir() else None


def stored_adapter(checkpoint: Path, weights: str, parts: Mapping[str, Component]) -> StoredAdapter:
    """The adapter of a checkpoint, compared with its manifest.

    Args:
        weights: `live`, or a running average by its name.
        parts: of the model that it belongs to, by component.
    Raises:
        UserError: it is damaged, or belongs to another model.
    """
    require_average(checkpoint, weights)
    folder = checkpoint / ("adapter" if weights == LIVE else average_folder("adapter", weights))
    file = folder / WEIGHTS_FILES["adapter"]
    name = file.relative_to(checkpoint).as_posix()
    if read_manifest(checkpoint).get(name) != manifest_entry(file):
        raise UserError(f"{checkpoint}: {name} is not what was written (checksum); take another checkpoint")
    config = read_settings(folder)
    grouped: dict[Place, dict[str, ComponentTensor]] = {}
    for stored, tensor in open_tensors(file).items():
        place, leaf = split_stored(stored)
        grouped.setdefault(place, {})[TO_KOHYA[leaf]] = tensor
    return StoredAdapter(config, {place: _layer(place, own, config, parts) for place, own in grouped.items()})


def _layer(
    place: Place, tensors: dict[str, ComponentTensor], config: AdapterConfig, parts: Mapping[str, Component]
) -> AdapterLayer:
    weight = weight_of(place, parts)
    scale = scale_of(config, is_conv=weight.meta.ndim == 4 and tuple(weight.meta.shape[2:]) != (1, 1))
    kind = "lora" if config.kind == "locon" else config.kind
    if "dora_scale" in tensors:  # a column, which is how other programs tell it from the magnitudes of inputs
        stored = tensors["dora_scale"]
        tensors["dora_scale"] = _made(stored, (weight.meta.shape[0], *[1] * (weight.meta.ndim - 1)))
    layer = AdapterLayer(".".join(place), kind, tensors, None)
    if kind == "oft":
        return layer
    if layer.rank is None:  # two whole matrices, beside which other programs do not look at alpha
        tensors["lokr_w1"] = _made(tensors["lokr_w1"], tuple(tensors["lokr_w1"].meta.shape), scale)
    return AdapterLayer(layer.name, kind, tensors, _number(scale * (layer.rank or 1)))


def _made(stored: ComponentTensor, shape: tuple[int, ...], factor: float = 1.0) -> ComponentTensor:
    if factor != 1.0:  # which bf16 would round
        meta = torch.empty(shape, device="meta")
        return ComponentTensor("F32", meta, lambda: (stored.read().float() * factor).reshape(shape))
    meta = torch.empty(shape, dtype=stored.meta.dtype, device="meta")
    return ComponentTensor(stored.dtype, meta, lambda: stored.read().reshape(shape))


def _number(value: float) -> ComponentTensor:
    return ComponentTensor("F32", torch.empty((), device="meta"), lambda: torch.tensor(value, dtype=torch.float32))


def weight_of(place: Place, parts: Mapping[str, Component]) -> ComponentTensor:
    """The base's weight at a place.

    Raises:
        UserError: the model has no such layer.
    """
    part = parts[COMPONENT_OF[place.part]]
    found = part.tensors.get(f"{place.module}.weight")
    if found is None:
        raise UserError(f"{part.origin}: its {part.name} has no layer {place.module}, which the adapter changes")
    return found


def any_adapter(place: Path, parts: Mapping[str, Component], weights: str = LIVE) -> dict[Place, AdapterLayer]:
    """The layers of a run's or checkpoint's adapter, or of a file.

    Raises:
        UserError: it is none, or belongs to another kind of model.
    """
    if (checkpoint := adapter_in(place)) is not None:
        return stored_adapter(checkpoint, weights, parts).layers
    return placed_layers(open_adapter(place), {name: part.config for name, part in parts.items() if name != "vae"})
