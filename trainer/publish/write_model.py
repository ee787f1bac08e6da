"""Writes SDXL as others read it: one file with the original names, or a folder in diffusers' layout; streaming.

Reads one tensor at a time and writes it at once, so that beside the largest tensor little memory is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model_files.clip_tokenizer import END_TOKEN, write_clip_tokenizer
from trainer.model_files.components import CONFIGS_KEY, Component, TextProjection, differing_configs
from trainer.model_files.diffusers_folder import WEIGHTS_STEMS
from trainer.model_files.key_map import LOGIT_SCALE, POSITION_IDS, KeyEntry, single_file_keys
from trainer.model_files.modelspec import HASH_KEY
from trainer.model_files.presets import preset
from trainer.model_files.single_file import logit_scale, position_ids, to_file
from trainer.model_files.tensor_file import TensorSpec, aligned, write_tensor_file

_MOST_NAMES = 5


@dataclass(frozen=True)
class Precision:
    """The dtypes that are written; None: as it is stored."""

    model: torch.dtype | None
    vae: torch.dtype | None

    def of(self, component: str, stored: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of a component. What is no floating-point number stays as it is."""
        wanted = self.vae if component == "vae" else self.model
        return wanted if wanted is not None and stored.is_floating_point else stored


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file, and how it is made."""

    spec: TensorSpec
    make: Callable[[], Tensor]


def plan_single_file(
    parts: Mapping[str, Component],
    precision: Precision,
    markers: Sequence[str] = (),
    text_projection: TextProjection = "correct",
) -> list[PlannedTensor]:
    """All tensors of a single file, in the order of their data: for all of SDXL, 2,515 and the markers.

    Args:
        parts: any of SDXL's components; those that are not given are left out.
        markers: `v_pred`, `ztsnr`: empty tensors, by which ComfyUI, A1111 and Forge know them.
        text_projection: "kohya" writes the matrix as a Linear holds it, which kohya's scripts take for their own.
    """
    entries = single_file_keys({name: part.config for name, part in parts.items()})
    planned = [_planned(_with_projection(e, text_projection), parts[e.component], precision) for e in entries]
    if "text_encoder" in parts:
        positions = position_ids(parts["text_encoder"].config.get("max_position_embeddings", 77))
        planned.append(_constant(POSITION_IDS, positions))
    if "text_encoder_2" in parts:
        stored = parts["text_encoder_2"].tensors["text_projection.weight"].meta.dtype
        planned.append(_constant(LOGIT_SCALE, logit_scale(precision.of("text_encoder_2", stored))))
    planned += [_constant(name, torch.tensor([])) for name in markers]
    return _in_order(planned)


def plan_component(part: Component, precision: Precision) -> list[PlannedTensor]:
    """All tensors of a component's own file in a diffusers folder, in the order of their data.

    The first text encoder's names begin with `text_model.` as in published folders: transformers 4 wants it so, and
    transformers 5 takes it.
    """
    prefix = "text_model." if part.name == "text_encoder" else ""
    entries = single_file_keys({part.name: part.config})
    own = [KeyEntry(name, entry.component, (name,)) for entry in entries for name in entry.names]
    return _in_order([_planned(entry, part, precision, prefix) for entry in own])


def total_bytes(planned: Sequence[PlannedTensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.spec.num_bytes for tensor in planned)


def write_single_file(
    path: Path,
    planned: Sequence[PlannedTensor],
    metadata: Mapping[str, str],
    on_written: Callable[[int], None] | None = None,
) -> str:
    """Write what `plan_single_file` gave; returns the SHA-256 of the data, which the metadata get as well.

    Raises:
        UserError: a value is NaN or infinite, or too large for the dtype.
        OSError: the disk is full or gone. In both cases nothing is left behind.
    """
    specs = [tensor.spec for tensor in planned]
    return write_tensor_file(path, specs, _made(planned), metadata, hash_key=HASH_KEY, on_written=on_written)


def file_metadata(parts: Mapping[str, Component]) -> dict[str, str]:
    """What a single file must say for its tensors to be read rightly."""
    configs = differing_configs(parts)
    return {"format": "pt"} | ({CONFIGS_KEY: json.dumps(configs)} if configs else {})


def write_folder(
    folder: Path,
    parts: Mapping[str, Component],
    precision: Precision,
    scheduler: Mapping[str, Any],
    tokenizers: tuple[Path, Path | None],
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Write a folder in diffusers' layout; it is there whole or not at all.

    Args:
        folder: replaced if it exists, at the end.
        scheduler: its `scheduler_config.json`.
        tokenizers: folders to copy both tokenizers from; None: the second is the first with another padding token.

    Raises:
        UserError: a value is NaN or infinite, or too large for the dtype.
        OSError: the disk is full or gone. In both cases nothing is left behind.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, part in parts.items():
            (temporary / name).mkdir(parents=True)
            planned = plan_component(part, precision)
            _write_json(temporary / name / "config.json", _config_of(part, planned))
            file = temporary / name / f"{WEIGHTS_STEMS[name]}.safetensors"
            specs = [tensor.spec for tensor in planned]
            write_tensor_file(file, specs, _made(planned), {"format": "pt"}, on_written=on_written)
        _copy_tokenizers(temporary, *tokenizers)
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(temporary / "model_index.json", preset("model_index"))
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_tokenizers(folder: Path, one: Path, two: Path | None) -> None:
    if two is None:
        write_clip_tokenizer(folder / "tokenizer", END_TOKEN, tokenizer_from=one)
        write_clip_tokenizer(folder / "tokenizer_2", "!", tokenizer_from=one)
        return
    shutil.copytree(one, folder / "tokenizer")
    shutil.copytree(two, folder / "tokenizer_2")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give a written folder its name, in place of what has it."""
    before = folder.with_name(folder.name + ".before")
    if folder.exists():
        folder.rename(before)
    temporary.rename(folder)
    if before.exists():
        shutil.rmtree(before)


def _config_of(part: Component, planned: Sequence[PlannedTensor]) -> dict[str, Any]:
    config = {key: value for key, value in part.config.items() if key not in ("_name_or_path", "dtype", "torch_dtype")}
    if part.name.startswith("text"):
        config["torch_dtype"] = str(planned[0].spec.dtype).removeprefix("torch.")
    return config


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _made(planned: Sequence[PlannedTensor]) -> Iterator[Tensor]:
    """The tensors in their dtypes. What does not fit is gathered, and said at the end."""
    broken: list[str] = []
    beyond: list[tuple[float, str]] = []
    for tensor in planned:
        name, stored = tensor.spec.name, tensor.make()
        cast = stored.to(tensor.spec.dtype)
        if not _is_finite(cast):
            if _is_finite(stored):
                beyond.append((stored.abs().max().item(), name))
            else:
                broken.append(name)
        yield cast
    lines = []
    if broken:
        lines.append(f"{_listed(broken)}: NaN or infinite values; the model is broken")
    if beyond:
        worst = [f"{name} (up to {largest:,.0f})" for largest, name in sorted(beyond, reverse=True)]
        lines.append(f"{_listed(worst)}: beyond what fp16 holds (65,504); choose bf16 or fp32")
    if lines:
        raise UserError(*lines)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # torch compares no fp8
        tensor = tensor.to(torch.float16)
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more tensors" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _planned(entry: KeyEntry, part: Component, precision: Precision, prefix: str = "") -> PlannedTensor:
    sources = [part.tensors[name] for name in entry.names]
    like = to_file(entry, [_as_matrix(entry, source.meta) for source in sources])
    dtype = precision.of(part.name, like.dtype)
    spec = TensorSpec(prefix + entry.file_name, dtype, tuple(like.shape))
    return PlannedTensor(spec, lambda: to_file(entry, [_as_matrix(entry, source.read()) for source in sources]))


def _as_matrix(entry: KeyEntry, tensor: Tensor) -> Tensor:
    """Folders that diffusers before 0.17 wrote hold the VAE's attention as convolutions."""
    return tensor.flatten(1) if entry.form == "conv1x1" else tensor


def _with_projection(entry: KeyEntry, text_projection: TextProjection) -> KeyEntry:
    if entry.form == "transposed" and text_projection == "kohya":
        return KeyEntry(entry.file_name, entry.component, entry.names)
    return entry


def _constant(name: str, tensor: Tensor) -> PlannedTensor:
    return PlannedTensor(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), lambda: tensor)


def _in_order(planned: list[PlannedTensor]) -> list[PlannedTensor]:
    by_name = {tensor.spec.name: tensor for tensor in planned}
    return [by_name[spec.name] for spec in aligned([tensor.spec for tensor in planned])]
