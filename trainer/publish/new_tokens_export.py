"""Publishes the new tokens of a checkpoint: for each word a file with `clip_l` and `clip_g`, as A1111 and ComfyUI read
embeddings; in these, a word's name is that of its file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainer import __version__
from trainer.checkpoint.ema_folders import average_folder
from trainer.checkpoint.manifest import MANIFEST, manifest_entry, read_manifest
from trainer.checkpoint.run_dir import CHECKPOINTS, checkpoint_at, checkpoint_step
from trainer.checkpoint.write import WEIGHTS_FILES
from trainer.config.sections.ema_config import LIVE
from trainer.errors import UserError
from trainer.model.new_tokens import FOLDER, VECTORS, read_words
from trainer.model.token_words import rows_of_words
from trainer.model_files.components import ComponentTensor
from trainer.model_files.model_source import open_tensors
from trainer.model_files.modelspec import PREFIX, modelspec
from trainer.model_files.tensor_file import TensorSpec
from trainer.publish.export_source import require_average
from trainer.publish.plan_export import PreparedExport, Wish, disk_errors, run_thumbnail
from trainer.publish.write_model import PlannedTensor, total_bytes, write_single_file


@dataclass(frozen=True)
class _Embedding:
    """A file that is going to be written."""

    out: Path
    planned: list[PlannedTensor]
    metadata: dict[str, str]


def tokens_in(place: Path) -> Path | None:
    """The checkpoint that `place` means, if it is a run or a checkpoint and holds new tokens."""
    if not ((place / MANIFEST).is_file() or (place / CHECKPOINTS).is_dir()):
        return None
    found = checkpoint_at(place)
    return found.absolute() if found is not None and (found / FOLDER).is_dir() else None


def holds_only_tokens(checkpoint: Path) -> bool:
    """Whether nothing else trained."""
    return not any((checkpoint / folder).is_dir() for folder in WEIGHTS_FILES if folder != FOLDER)


def embeddings_folder(out: Path) -> Path:
    """Where the files lie beside what `out` holds."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}-embeddings")


def prepare_tokens(checkpoint: Path, wish: Wish, model: PreparedExport | None) -> PreparedExport:
    """Look at everything that writing a checkpoint's new tokens needs.

    Args:
        checkpoint: from `tokens_in`.
        model: what is written at `wish.out`; None: nothing else trained, and a single word is.
    Raises:
        UserError: something is damaged, or in the way.
    """
    if model is None:
        _refuse_idle(checkpoint, wish)
    words, folder = [*rows_of_words(read_words(checkpoint / FOLDER).words)], embeddings_folder(wish.out)
    alone = model is None and len(words) == 1
    if not alone and folder.exists() and not wish.overwrite:
        raise UserError(f"{folder}: exists; give another name, or --overwrite")
    tensors = _stored(checkpoint, wish.weights)
    files = [
        _embedding(wish.out if alone else folder / f"{name}.safetensors", word, rows, tensors, checkpoint, wish)
        for (word, rows), name in zip(words, _file_names(word for word, _ in words), strict=True)
    ]

    def write(on_written: Callable[[int], None] | None) -> None:
        if model is not None:
            model.write(on_written)
        for each in files:
            with disk_errors(each.out):
                each.out.parent.mkdir(exist_ok=True)
                write_single_file(each.out, each.planned, each.metadata, on_written)

    listed = ", ".join(str(each.out) for each in files)
    note = f"embeddings: {listed}; in A1111 and ComfyUI each is called by the name of its file"
    size = sum(total_bytes(each.planned) for each in files)
    place = None if model or alone else folder
    before = (model.total_bytes, model.notes) if model else (0, ())
    return PreparedExport(before[0] + size, (*before[1], note), write, place)


def _refuse_idle(checkpoint: Path, wish: Wish) -> None:
    if wish.layout != "single-file":
        raise UserError(
            f"--layout {wish.layout}: {checkpoint} holds new tokens alone; each word is written as one file"
        )
    if wish.vae is not None or wish.vae_dtype is not None:
        raise UserError(f"--vae and --vae-dtype: have no effect; {checkpoint} holds new tokens alone")


def _stored(checkpoint: Path, weights: str) -> dict[str, ComponentTensor]:
    require_average(checkpoint, weights)
    folder = FOLDER if weights == LIVE else average_folder(FOLDER, weights)
    file = checkpoint / folder / WEIGHTS_FILES[FOLDER]
    name = file.relative_to(checkpoint).as_posix()
    if read_manifest(checkpoint).get(name) != manifest_entry(file):
        raise UserError(f"{checkpoint}: {name} is not what was written (checksum); take another checkpoint")
    return open_tensors(file)


def _embedding(
    out: Path, word: str, rows: range, tensors: dict[str, ComponentTensor], checkpoint: Path, wish: Wish
) -> _Embedding:
    """In fp32, whatever the model's: it is some kilobytes."""
    planned = [
        PlannedTensor(
            TensorSpec(name, torch.float32, (len(rows), tensors[name].meta.shape[1])),
            lambda read=tensors[name].read: read()[rows.start : rows.stop].float(),
        )
        for name in VECTORS
    ]
    spec = modelspec(
        replace(wish.description, title=out.stem, trigger_phrase=out.stem),
        resolution="1024x1024",
        prediction_type="epsilon",
        unet_dtype="",
        vae_dtype="",
        thumbnail=run_thumbnail(wish, checkpoint),
    )
    for name in ("unet_dtype", "vae_dtype", "prediction_type", "resolution"):
        spec.pop(PREFIX + name)
    spec[f"{PREFIX}architecture"] += "/textual-inversion"
    own = {"format": "pt", "sdxl_train.version": __version__, "sdxl_train.step": str(checkpoint_step(checkpoint))}
    return _Embedding(out, planned, spec | own | {"sdxl_train.weights": wish.weights, "sdxl_train.token": word})


def _file_names(words: Iterator[str]) -> list[str]:
    """The words without what file names and prompts should not hold; `<my-cat>` is `my-cat`."""
    names: list[str] = []
    for word in words:
        plain = re.sub(r"[^\w.-]", "", word).strip(".") or "token"
        names.append(plain if plain not in names else f"{plain}-{len(names) + 1}")
    return names
