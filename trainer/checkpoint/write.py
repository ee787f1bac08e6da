"""Checkpoints: safetensors and JSON, made visible by a rename only when complete and on the disk.

    checkpoints/step-00001000/
      unet/config.json, unet/diffusion_pytorch_model.safetensors   weights in diffusers' layout; text_encoder/ and
                                                                   text_encoder_2/ beside it, where they train
      unet_ema/...                                                 the same of a running average called `ema`
      adapter/...                                                  in place of them: an adapter, and its settings
      new_tokens/...                                               beside all of these: their vectors, and the words
      training_state/optimizer.safetensors, training_state/state.json
      training_state/exchange.safetensors                          where workers keep what their gradients lacked
      training_state/workers.safetensors                           where they take steps each by itself: what is not
                                                                   the same on all, and what averages are made with
      manifest.json                                                size and xxh3-128 of every file above

No pickle anywhere. A reader trusts a checkpoint only after comparing it with its manifest (`run_dir`). Each worker
writes its own bytes of every file (`pieces`), beside the training (`saver`); the files do not depend on the number of
workers, but for `exchange.safetensors` and `workers.safetensors`, which have each worker's own.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.manifest import MANIFEST, STATE, manifest_entry
from trainer.model_files.tensor_file import sync_to_disk
from trainer.parallel.local_shard import Held

OPTIMIZER = "training_state/optimizer.safetensors"
EXCHANGE = "training_state/exchange.safetensors"
WORKERS = "training_state/workers.safetensors"
WEIGHTS_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "adapter": "adapter_model.safetensors",
    "new_tokens": "new_tokens.safetensors",
}


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint.

    Attributes:
        name: of the file, with its folder in the checkpoint.
        tensors: by name, what this worker has of them.
        beside: other files in its folder, as name -> text.
    """

    name: str
    tensors: Mapping[str, Held]
    beside: Mapping[str, str]


def publish_folder(
    temporary: Path, path: Path, state: Mapping[str, object], read: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Add state and manifest, and give the folder its name once all of it is on the disk; `read` hears what is read."""
    (temporary / STATE).parent.mkdir(exist_ok=True)
    (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
    written = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {p.relative_to(temporary).as_posix(): manifest_entry(p, read) for p in written}
    (temporary / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n")
    publish_copy(temporary, path)


def publish_copy(temporary: Path, path: Path) -> None:
    """Give a whole folder its name once all of it is on the disk."""
    items = sorted(temporary.rglob("*"))
    for item in [*(p for p in items if p.is_file()), *(p for p in items if p.is_dir()), temporary]:
        sync_to_disk(item)
    temporary.rename(path)
    for folder in (path.parent, path.parent.parent):  # the first one has made its folder, too
        sync_to_disk(folder)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file one at a time, so that no second copy of the file is in memory."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, tensors.get_tensor(name)
