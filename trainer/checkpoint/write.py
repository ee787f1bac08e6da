"""Checkpoints: safetensors and JSON, made visible by a rename only when complete and on the disk.

    checkpoints/step-00001000/
      unet/config.json, unet/diffusion_pytorch_model.safetensors   weights in diffusers' layout; text_encoder/ and
                                                                   text_encoder_2/ beside it, where they train
      unet_ema/...                                                 the same of a running average called `ema`
      training_state/optimizer.safetensors, training_state/state.json
      manifest.json                                                size and xxh3-128 of every file above

No pickle anywhere. A reader trusts a checkpoint only after comparing it with its manifest (`run_dir`). Tensors that
are spread over the workers are put together one by one, so the files do not depend on the number of workers.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.manifest import MANIFEST, STATE, manifest_entry
from trainer.model_files.tensor_file import TensorSpec, aligned, sync_to_disk, write_tensor_file

OPTIMIZER = "training_state/optimizer.safetensors"
WEIGHTS_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint.

    Attributes:
        name: of the file, with its folder in the checkpoint.
        tensors: by name; spread over the workers, or the same on all of them.
        beside: other files in its folder, as name -> text.
    """

    name: str
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, str]


def write_checkpoint(
    path: Path,
    files: Iterable[TensorFile],
    state: Mapping[str, object],
    whole_tensors: Callable[[Iterable[Tensor]], Iterator[Tensor]],
    *,
    writes: bool,
) -> None:
    """Write a complete checkpoint at `path`, which must not exist; a power cut leaves all or nothing.

    All workers take part, because each gives its share of what is spread over them.

    Args:
        state: JSON-able.
        whole_tensors: gives tensors as a whole, in the order asked for.
        writes: whether this worker is the one that writes.

    Raises:
        OSError: (the writing worker) the disk is full or gone; what was there before is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
    failure: OSError | None = None
    for file in files:
        specs = aligned([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in file.tensors.items()])
        wholes = whole_tensors(file.tensors[spec.name] for spec in specs)
        if writes and failure is None:
            try:
                _write_file(temporary, file, specs, wholes)
            except OSError as error:
                failure = error
        for _ in wholes:  # the other workers wait for this one's share of the rest
            pass
    if not writes:
        return
    try:
        if failure is not None:
            raise failure
        publish_folder(temporary, path, state)
    except OSError:
        # At once, for the disk may be full of it: the next checkpoint would find no more room than this one.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path, state: Mapping[str, object]) -> None:
    """Add state and manifest, and give the folder its name once all of it is on the disk."""
    (temporary / STATE).parent.mkdir(exist_ok=True)
    (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {p.relative_to(temporary).as_posix(): manifest_entry(p) for p in written}
    (temporary / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n")
    for item in [*written, temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        sync_to_disk(item)
    temporary.rename(path)
    sync_to_disk(path.parent)


def _write_file(folder: Path, file: TensorFile, specs: list[TensorSpec], wholes: Iterator[Tensor]) -> None:
    place = folder / file.name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_tensor_file(place, specs, wholes, {"format": "pt"})
    for name, text in file.beside.items():
        (place.parent / name).write_text(text, encoding="utf-8")


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file one at a time, so that no second copy of the file is in memory."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, tensors.get_tensor(name)
