"""Puts an adapter into a model: the sum is computed tensor by tensor while it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.adapters.adapter_file import AdapterLayer
from trainer.adapters.adapter_names import COMPONENT_OF, Place
from trainer.adapters.deltas import DoesNotFit, changed_weight
from trainer.errors import UserError, printable
from trainer.model_files.components import Component, ComponentTensor
from trainer.model_files.modelspec import PREFIX
from trainer.publish.adapter_layers import any_adapter, weight_of
from trainer.publish.export_source import open_source, prediction_of
from trainer.publish.plan_export import PreparedExport, Wish, prepare_file, prepare_folder, require_place

if TYPE_CHECKING:
    from torch import Tensor


def prepare_adapter_merge(base: Path, adapter: Path, strength: float, wish: Wish) -> PreparedExport:
    """Everything that writing a model with an adapter in it needs.

    Args:
        base: a checkpoint, run, diffusers folder or single file.
        adapter: a run or checkpoint with an adapter, or an adapter's file.
        strength: how many times the adapter's change counts.
        wish: of the model; `weights` are the adapter's.
    Raises:
        UserError: one of them cannot be read, or they do not go together.
    """
    require_place(wish)
    source = open_source(base, wish.model, wish.vae, "live")
    layers = any_adapter(adapter, source.parts, wish.weights)
    parts = with_adapter(source.parts, layers, adapter, strength)
    prediction, ztsnr = prediction_of(source, wish.prediction_type, wish.ztsnr)
    recipe = {"model": base.absolute().name, "adapter": adapter.absolute().name, "strength": strength}
    merged = replace(source, parts=parts, metadata=_kept(source.metadata))
    if wish.layout == "diffusers":
        return prepare_folder(merged, wish, prediction, ztsnr)
    return prepare_file(merged, wish, prediction, ztsnr, {"sdxl_train.adapter_merge": json.dumps(recipe)})


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the base says of itself, but for its name and picture."""
    gone = {f"{PREFIX}title", f"{PREFIX}thumbnail"}
    return {name: text for name, text in metadata.items() if name not in gone}


def with_adapter(
    parts: Mapping[str, Component], layers: Mapping[Place, AdapterLayer], origin: Path, strength: float
) -> dict[str, Component]:
    """The model's parts with the adapter's changes in their weights, which are computed when they are read.

    Args:
        origin: of the adapter, for what is said of it.
    Raises:
        UserError: the model has no such layer; or, when it is read, a layer has another shape.
    """
    changed: dict[str, dict[str, ComponentTensor]] = {name: dict(part.tensors) for name, part in parts.items()}
    for place, layer in layers.items():
        weight = weight_of(place, parts)
        meta = torch.empty(weight.meta.shape, dtype=torch.float32, device="meta")
        read = _changed(weight, layer, origin, strength)
        changed[COMPONENT_OF[place.part]][f"{place.module}.weight"] = ComponentTensor("F32", meta, read)
    return {name: replace(part, tensors=changed[name]) for name, part in parts.items()}


def _changed(weight: ComponentTensor, layer: AdapterLayer, origin: Path, strength: float) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            return changed_weight(layer.kind, layer.read(), layer.scale(), weight.read(), strength)
        except DoesNotFit:
            does_not_fit = f"does not fit the model's weight of shape {list(weight.meta.shape)}"
            name = printable(layer.name, 100)
            raise UserError(f"{origin}: {name} {does_not_fit}; it was made for another kind of model") from None

    return read
