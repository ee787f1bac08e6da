"""Checkpoints: safetensors and JSON, made visible by a rename only when complete and on the disk.

    checkpoints/step-00001000/
      unet/config.json, unet/diffusion_pytorch_model.safetensors   weights in diffusers' layout
      training_state/optimizer.safetensors, training_state/state.json
      manifest.json                                                size and xxh3-128 of every file above

No pickle anywhere. A reader trusts a checkpoint only after comparing it with its manifest (`run_dir`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.train.run_dir import MANIFEST, STATE, manifest_entry

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OPTIMIZER = "training_state/optimizer.safetensors"


def write_checkpoint(
    path: Path,
    save_unet: Callable[[Path], None],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, object],
) -> None:
    """Write a complete checkpoint at `path`, which must not exist; a power cut leaves all or nothing.

    Args:
        save_unet: writes `config.json` and the weights into the folder it is given.
        optimizer: contiguous tensors by name.
        state: JSON-able.

    Raises:
        OSError: the disk is full or gone; what was there before is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "training_state").mkdir(parents=True)
    save_unet(temporary / "unet")
    save_file(dict(optimizer), temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {p.relative_to(temporary).as_posix(): manifest_entry(p) for p in files}
    (temporary / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n")
    for item in [*files, temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _fsync(item)
    temporary.rename(path)
    _fsync(path.parent)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file one at a time, so that no second copy of the file is in memory."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, tensors.get_tensor(name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
