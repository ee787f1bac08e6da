"""Models on the Hugging Face hub: found in its cache, or downloaded with only the files that are needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UserError
from trainer.model_files.diffusers_folder import WEIGHTS_STEMS

_SMALL = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|tokenizer(_2)?/[\w.]+\.(json|txt)"
)


def cached_model(hub_id: str) -> Path | None:
    """The folder of a model in the hub's cache, maybe not the whole of it, or None; asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # Not by snapshot_download, which takes a folder for incomplete where not every file of the repository is there.
    try:
        found = try_to_load_from_cache(hub_id, "unet/config.json")
    except HFValidationError:
        return None
    return Path(found).parent.parent if isinstance(found, str) else None


def download_model(hub_id: str) -> Path:
    """Download a diffusers folder into the hub's cache, with a bar; what is there already is not loaded again.

    Raises:
        UserError: no network, no such model, no right to it, or it is not in diffusers' layout.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] - of its HTTP client

    place = f"model.path = {hub_id}: no such file or folder here, and as a hub id it"
    try:
        files = needed_files(HfApi().list_repo_files(hub_id))
        if not any(name.startswith("unet/") and name.endswith(".safetensors") for name in files):
            raise UserError(
                f"{place} names no model in diffusers' layout with safetensors; download its single file and give that"
            )
        print(f"downloading {hub_id} ({len(files)} files) from the hub")
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except errors.OfflineModeIsEnabled:
        reason = "is not in the hub's cache, and HF_HUB_OFFLINE forbids to load it; give a local path, or unset that"
    except errors.GatedRepoError:
        reason = "wants a licence to be accepted on its page; do so, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "does not exist on the hub, or is private; check the spelling, or run `hf auth login`"
    except (HTTPError, OSError, ValueError) as error:
        reason = f"cannot be downloaded ({_first_line(error)}); give a local path, or try again with a network"
    raise UserError(f"{place} {reason}")


def needed_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that training needs: of each component's weights one form, in safetensors.

    The form without a variant name is preferred to fp16 and bf16, as `weight_files` does.
    """
    names = sorted(names)
    chosen = [name for name in names if _SMALL.fullmatch(name)]
    for component, stem in WEIGHTS_STEMS.items():
        for variant in ("", ".fp16", ".bf16"):
            start, number, end = re.escape(f"{component}/{stem}"), r"(-\d+-of-\d+)?", re.escape(variant)
            weights = re.compile(rf"{start}({end}{number}|{number}{end})\.safetensors")
            index = re.compile(rf"{start}({end}\.safetensors\.index|\.safetensors\.index{end})\.json")
            found = [name for name in names if weights.fullmatch(name)]
            if found:
                chosen += [*found, *filter(index.fullmatch, names)]
                break
    return chosen


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
