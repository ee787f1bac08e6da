"""Makes a LoRA of the difference of two models: the best approximation of its rank, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trainer import __version__
from trainer.adapters.adapter_file import AdapterLayer
from trainer.adapters.adapter_names import COMPONENT_OF, Place
from trainer.config.sections.adapter_config import AdapterConfig
from trainer.errors import UserError
from trainer.keyed import draw_seed
from trainer.model_files.components import Component, ComponentTensor
from trainer.model_files.modelspec import PREFIX, modelspec
from trainer.publish.adapter_export import adapter_metadata, planned_file
from trainer.publish.export_source import Source, open_source, prediction_of
from trainer.publish.plan_export import Wish, disk_errors, require_place
from trainer.publish.write_model import write_single_file

_WHOLE_SIDE = 512  # of a matrix of which all singular values are computed
_MORE, _ROUNDS = 16, 6  # of the randomized decomposition (Halko et al. 2011): directions beyond the rank, iterations


@dataclass(frozen=True)
class PlannedLayer:
    """A layer whose difference is to be taken."""

    place: Place
    base: ComponentTensor
    tuned: ComponentTensor
    rank: int


@dataclass(frozen=True)
class PlannedExtract:
    """An extraction of which everything but the values is checked.

    Attributes:
        source: the base.
        elements: of all layers.
    """

    layers: tuple[PlannedLayer, ...]
    source: Source
    rank: int
    conv_rank: int | None
    prediction: tuple[str, bool]

    @property
    def elements(self) -> int:
        """Of all differences."""
        return sum(layer.base.meta.numel() for layer in self.layers)


@dataclass(frozen=True)
class Extracted:
    """What was found.

    Attributes:
        share: of the differences' squares that the LoRA holds, from 0 to 1.
        changed: layers that differ.
    """

    share: float
    changed: int
    total_bytes: int


def plan_extract(
    base: Path, tuned: Path, rank: int, conv_rank: int | None, text_encoders: bool, wish: Wish
) -> PlannedExtract:
    """Which layers differ in what; headers alone are read.

    Args:
        base, tuned: checkpoints, runs, diffusers folders or single files.
        conv_rank: of convolutions larger than 1 x 1; None: they, and all of residual blocks, are left out.
    Raises:
        UserError: they are not of the same shape.
    """
    require_place(wish)
    first, second = open_source(base, None, None, "live"), open_source(tuned, None, None, "live")
    found: list[PlannedLayer] = []
    for part, component in COMPONENT_OF.items():
        if part == "unet" or text_encoders:
            found += _layers(part, first.parts[component], second.parts[component], rank, conv_rank)
    return PlannedExtract(tuple(found), first, rank, conv_rank, prediction_of(second, None, False))


def _layers(part: str, base: Component, tuned: Component, rank: int, conv_rank: int | None) -> Iterator[PlannedLayer]:
    for name, tensor in base.tensors.items():
        shape, module = tuple(tensor.meta.shape), name.removesuffix(".weight")
        if not name.endswith(".weight") or len(shape) not in (2, 4) or not _is_changed(part, module, conv_rank):
            continue
        other = tuned.tensors.get(name)
        if other is None or other.meta.shape != tensor.meta.shape:
            said = f"has shape {list(other.meta.shape)}" if other else "is missing"
            raise UserError(f"{tuned.origin}: {base.name}'s {name} {said}, and {base.origin} has {list(shape)}")
        own = (conv_rank or rank) if len(shape) == 4 and shape[2:] != (1, 1) else rank
        yield PlannedLayer(Place(part, module), tensor, other, min(own, shape[0], tensor.meta.numel() // shape[0]))


def _is_changed(part: str, module: str, conv_rank: int | None) -> bool:
    """As `adapter.targets` chooses by default."""
    if part != "unet":
        return ".self_attn." in module or ".mlp." in module
    if ".attentions." in module:
        return "norm" not in module.rpartition(".")[2]
    in_blocks = any(mark in module for mark in (".resnets.", ".downsamplers.", ".upsamplers."))
    return conv_rank is not None and in_blocks and "norm" not in module.rpartition(".")[2]


def extract(plan: PlannedExtract, wish: Wish, dtype: torch.dtype, on_done: Callable[[int], None]) -> Extracted:
    """Take the differences one at a time and write the LoRA; only its own matrices stay in memory.

    Args:
        on_done: told of every layer's elements.
    Raises:
        UserError: the models are equal, or hold values that are not finite.
    """
    layers: dict[Place, AdapterLayer] = {}
    energy = held = 0.0
    for layer in plan.layers:
        difference = layer.tuned.read().float() - layer.base.read().float()
        if not torch.isfinite(difference).all():
            raise UserError(f"{'.'.join(layer.place)}: NaN or infinite values in one of the models")
        whole = difference.double().square().sum().item()
        if whole > 0:
            down, up = truncated(difference, layer.rank, ".".join(layer.place))
            energy += whole
            held += (up.flatten(1).double() @ down.flatten(1).double()).square().sum().item()
            layers[layer.place] = _stored(layer.place, down.to(dtype), up.to(dtype))
        on_done(difference.numel())
    if not layers:
        raise UserError(f"{wish.out}: not written; the layers of both models are equal")
    planned = planned_file(layers, plan.source, dtype)
    with disk_errors(wish.out):
        write_single_file(wish.out, planned, _metadata(plan, wish))
    return Extracted(held / energy, len(layers), sum(tensor.spec.num_bytes for tensor in planned))


@torch.no_grad()
def truncated(difference: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """(down, up) in LoRA's forms, whose product is the best approximation of this rank (Eckart and Young 1936).

    Args:
        difference: [out, in] or [out, in, height, width], float32.
        name: by which the random directions of a large matrix are drawn.
    """
    matrix = difference.flatten(1)
    if min(matrix.shape) <= _WHOLE_SIDE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed("extract", name))
            left, values, right = torch.svd_lowrank(matrix, min(rank + _MORE, *matrix.shape), niter=_ROUNDS)
        right = right.mT
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if difference.ndim == 4:
        return down.reshape(-1, *difference.shape[1:]), up[:, :, None, None]
    return down.contiguous(), up.contiguous()


def _stored(place: Place, down: Tensor, up: Tensor) -> AdapterLayer:
    def held(tensor: Tensor) -> ComponentTensor:
        return ComponentTensor("F32", torch.empty_like(tensor, device="meta"), lambda: tensor)

    tensors: Mapping[str, ComponentTensor] = {"lora_down.weight": held(down), "lora_up.weight": held(up)}
    return AdapterLayer(".".join(place), "lora", tensors, held(torch.tensor(float(len(down)))))


def _metadata(plan: PlannedExtract, wish: Wish) -> dict[str, str]:
    title = wish.description.title or wish.out.stem
    prediction = "epsilon" if plan.prediction[0] == "edm" else plan.prediction[0]
    description = replace(wish.description, title=title)
    spec = modelspec(
        description, resolution="1024x1024", prediction_type=prediction, unet_dtype="", vae_dtype="", thumbnail=None
    )
    for name in ("unet_dtype", "vae_dtype"):
        spec.pop(PREFIX + name)
    spec[f"{PREFIX}architecture"] += "/lora"
    kind = "locon" if plan.conv_rank else "lora"
    config = AdapterConfig(kind=kind, rank=plan.rank, conv_rank=plan.conv_rank)
    own = {"format": "pt", "sdxl_train.version": __version__, "sdxl_train.adapter": kind}
    return spec | own | adapter_metadata(title, config)
