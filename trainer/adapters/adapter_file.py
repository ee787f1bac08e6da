"""Reads an adapter from a safetensors file, as kohya's scripts, LyCORIS, diffusers or PEFT name it: headers alone.

What comes from outside is judged here: names, kinds, shapes. Tensors are read when they are asked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.adapters.adapter_names import COMPONENT_OF, FROM_KOHYA, KOHYA_PREFIX, TO_KOHYA, Place, kohya_name
from trainer.adapters.adapter_names import original_unet_modules as unet_names
from trainer.errors import UserError, printable
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.components import ComponentTensor
from trainer.model_files.key_map import single_file_keys
from trainer.model_files.model_source import ModelSource, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = (  # by the tensors of a layer, the rarer first
    ("dora", {"lora_down.weight", "lora_up.weight", "dora_scale"}),
    ("lora", {"lora_down.weight", "lora_up.weight"}),
    ("loha", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    ("lokr", {"lokr_w1", "lokr_w2"}),
    ("lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    ("oft", {"oft_R.weight"}),
)
_UNKNOWN = {
    "lora_mid.weight": "a LoCon with CP decomposition",
    "hada_t1": "a LoHa with Tucker decomposition",
    "lokr_t2": "a LoKr with Tucker decomposition",
    "lokr_w1_a": "a LoKr whose first matrix is decomposed",
    "oft_blocks": "an OFT of LyCORIS, which turns outputs and not inputs",
    "diff": "a full difference of weights",
}
_LEAF = re.compile(
    r"\.((?:lora_(?:down|up|mid)|lora_[AB]|oft_R)\.weight|lora_magnitude_vector(?:\.weight)?|alpha|dora_scale|(?:hada|lokr)_[a-z0-9_]+"
    r"|oft_[a-zA-Z]+|diff(?:_b)?|lora\.(?:down|up)\.weight)$"
)
_PEFT_PARTS = {"unet": "unet", "text_encoder": "text_encoder_1", "text_encoder_2": "text_encoder_2"}
_ALSO = {
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
_MAX_RANK = 4096


@dataclass(frozen=True)
class AdapterLayer:
    """One changed layer of a file.

    Attributes:
        name: in the file.
        kind: `lora`, `dora`, `loha`, `lokr` or `oft`.
        tensors: by kohya's and LyCORIS' names, alpha apart.
        alpha: reads it; None: it is the rank.
    """

    name: str
    kind: str
    tensors: Mapping[str, ComponentTensor]
    alpha: ComponentTensor | None

    @property
    def rank(self) -> int | None:
        """None where the kind has none: a LoKr of two whole matrices; of `oft` the number of blocks' elements."""
        for leaf, axis in (("lora_down.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0)):
            if leaf in self.tensors:
                return self.tensors[leaf].meta.shape[axis]
        return None

    def read(self) -> dict[str, Tensor]:
        """All of its tensors, in fp32."""
        return {leaf: tensor.read().float() for leaf, tensor in self.tensors.items()}

    def scale(self) -> float:
        """How many times its change counts."""
        rank = self.rank
        if self.alpha is None or rank is None:
            return 1.0
        return float(self.alpha.read().float().reshape(()).item()) / rank


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file of which names and shapes are checked.

    Attributes:
        metadata: texts of unknown origin.
    """

    path: Path
    layers: Mapping[str, AdapterLayer]
    metadata: Mapping[str, str]


def open_adapter(path: Path, limits: Limits = DEFAULT_LIMITS) -> AdapterFile:
    """The layers of an adapter file; its header is read, and no tensor.

    Raises:
        UserError: it is no adapter, of a kind that is not known here, or its tensors do not go together.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the adapter's .safetensors file")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    metadata = ModelSource(path, "file", limits).header.metadata
    grouped: dict[str, dict[str, ComponentTensor]] = defaultdict(dict)
    for name, tensor in open_tensors(path, limits).items():
        found = _LEAF.search(name)
        if found is None:
            raise UserError(
                f"{path}: holds {printable(name, 100)}, which is no tensor of an adapter that is known here"
            )
        leaf = found[1]
        leaf = _ALSO.get(leaf, TO_KOHYA.get(leaf, leaf))
        layer = grouped[name[: found.start()]]
        if leaf in layer:
            raise UserError(f"{path}: holds {printable(name, 100)} twice, in two ways of naming")
        layer[leaf] = tensor
    if not grouped:
        raise UserError(f"{path}: holds no tensor; it is no adapter")
    return AdapterFile(path, {name: _layer(path, name, tensors) for name, tensors in grouped.items()}, metadata)


def _layer(path: Path, name: str, tensors: dict[str, ComponentTensor]) -> AdapterLayer:
    alpha = tensors.pop("alpha", None)
    shown = printable(name, 100)
    if alpha is not None and alpha.meta.numel() != 1:
        raise UserError(f"{path}: {shown}.alpha has shape {list(alpha.meta.shape)}; wanted one number")
    for leaf, meaning in _UNKNOWN.items():
        if leaf in tensors:
            raise UserError(f"{path}: {shown} is {meaning}, which is not read here")
    kind = next((kind for kind, leaves in _KINDS if tensors.keys() == leaves), None)
    if kind is None:
        raise UserError(
            f"{path}: {shown} holds {', '.join(sorted(tensors))}, which is no kind of adapter that is known"
        )
    layer = AdapterLayer(name, kind, tensors, alpha)
    _require_shapes(path, layer)
    return layer


def _require_shapes(path: Path, layer: AdapterLayer) -> None:
    """The tensors of a layer go together; whether with the model's layer is seen when it is known."""
    shapes = {leaf: tuple(tensor.meta.shape) for leaf, tensor in layer.tensors.items()}
    pairs = {
        "lora": (("lora_down.weight", 0, "lora_up.weight", 1),),
        "dora": (("lora_down.weight", 0, "lora_up.weight", 1), ("lora_up.weight", 0, "dora_scale", 0)),
        "loha": (("hada_w1_a", 1, "hada_w1_b", 0), ("hada_w2_a", 1, "hada_w2_b", 0), ("hada_w1_a", 0, "hada_w2_a", 0)),
        "lokr": (("lokr_w2_a", 1, "lokr_w2_b", 0),) if "lokr_w2_a" in shapes else (),
        "oft": (),
    }[layer.kind]
    right = all(0 not in shape and 1 <= len(shape) <= 4 for shape in shapes.values())
    right = right and all(
        max(i, 0) < len(shapes[a]) and j < len(shapes[b]) and shapes[a][i] == shapes[b][j] for a, i, b, j in pairs
    )
    least = {"dora_scale": 1}
    right = right and all(len(shape) >= least.get(leaf, 2) for leaf, shape in shapes.items())
    floats = all(tensor.meta.is_floating_point() for tensor in layer.tensors.values())
    if not right or not floats or not 1 <= (layer.rank or 1) <= _MAX_RANK:
        said = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(shapes.items()))
        raise UserError(f"{path}: the tensors of {printable(layer.name, 100)} do not go together: {said}")


def places_by_name(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """The layers of a model by all names that adapter files have for them.

    Args:
        configs: of the components `unet`, `text_encoder`, `text_encoder_2`.
    """
    original, found = unet_names(configs["unet"]), dict[str, Place]()
    for part, component in COMPONENT_OF.items():
        if component not in configs:
            continue
        for entry in single_file_keys({component: configs[component]}):
            for weight in entry.names:
                if not weight.endswith(".weight"):
                    continue
                place = Place(part, weight.removesuffix(".weight"))
                found[kohya_name(place, original)] = place
                found[KOHYA_PREFIX[part] + place.module.replace(".", "_")] = place
                peft = next(name for name, own in _PEFT_PARTS.items() if own == part)
                for module in {
                    place.module,
                    f"text_model.{place.module}" if part == "text_encoder_1" else place.module,
                }:
                    found[f"{peft}.{module}"] = found[f"{part}.{module}"] = place
                if part == "unet":
                    found[f"base_model.model.{place.module}"] = place
    return found


def placed_layers(file: AdapterFile, configs: Mapping[str, Mapping[str, Any]]) -> dict[Place, AdapterLayer]:
    """The file's layers by their places in a model.

    Raises:
        UserError: a layer is none of the model's, or is meant twice.
    """
    known, found = places_by_name(configs), dict[Place, AdapterLayer]()
    for name, layer in file.layers.items():
        place = known.get(name)
        if place is None:
            count = sum(each not in known for each in file.layers)
            raise UserError(
                f"{file.path}: {count} of its {len(file.layers)} layers are none of the model's, such as "
                f"{printable(name, 100)}; it was made for another kind of model"
            )
        if place in found:
            raise UserError(
                f"{file.path}: {printable(name, 100)} and {printable(found[place].name, 100)} are one layer"
            )
        found[place] = layer
    return found


def module_leaf(leaf: str) -> str:
    """A tensor of a layer, as the adapted model's modules name it."""
    return FROM_KOHYA[leaf]
