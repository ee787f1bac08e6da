"""Where the files of SDXL's two tokenizers lie, and whether transformers reads them rightly; without torch."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from trainer.errors import UserError
from trainer.model_files.model_source import ModelSource

_CLIP = "openai/clip-vit-large-patch14"
# Where the hub's cache may have CLIP's vocabulary: repository, folder in it.
_CACHED = ((_CLIP, ""), ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"))
_OLDEST_TRANSFORMERS = 5, 20


def require_whole_captions() -> None:
    """Refuse a transformers whose CLIP tokenizers cut what a caption has beyond 75 tokens without a word.

    Looks at the installed package's metadata and imports nothing.

    Raises:
        UserError: it is older than 5.20.
    """
    installed = version("transformers")
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST_TRANSFORMERS:
        wanted = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise UserError(
            f"transformers {installed}: cuts captions of more than 75 tokens without an error; "
            f"run `pip install 'transformers>={wanted}'`"
        )


def tokenizer_folders(source: ModelSource, tokenizer: Path | None) -> tuple[Path, Path | None]:
    """The folders of the first tokenizer and of the second; None: the second is the first with the padding id 0.

    They are looked for in `tokenizer` if it is given, else in the model's folder, else in the hub's cache.

    Args:
        tokenizer: a tokenizer's folder, or a model's with `tokenizer/` in it.
    Raises:
        UserError: nowhere is a tokenizer.
    """
    if tokenizer is not None:
        found = _in_folder(tokenizer)
        if found is None:
            raise UserError(f"model.tokenizer = {tokenizer}: holds no tokenizer; wanted vocab.json and merges.txt")
        return found
    if source.kind == "folder" and (found := _in_folder(source.path)):
        return found
    cached = _in_hub_cache()
    if cached is not None:
        return cached, None
    of = "has no tokenizer" if source.kind == "folder" else "is a single file, with which no tokenizer comes"
    raise UserError(
        f"model.path: {source.path} {of}, and the hub's cache has none: "
        f"run `hf download {_CLIP} vocab.json merges.txt`, or give a folder by model.tokenizer"
    )


def _in_folder(folder: Path) -> tuple[Path, Path | None] | None:
    if _is_tokenizer(folder):
        return folder, None
    if _is_tokenizer(folder / "tokenizer"):
        two = folder / "tokenizer_2"
        return folder / "tokenizer", two if _is_tokenizer(two) else None
    return None


def _is_tokenizer(folder: Path) -> bool:
    names = ("vocab.json", "merges.txt")
    return all((folder / name).is_file() for name in names) or (folder / "tokenizer.json").is_file()


def _in_hub_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in _CACHED:
        files = [try_to_load_from_cache(repository, folder + name) for name in ("vocab.json", "merges.txt")]
        if all(isinstance(file, str) for file in files):
            return Path(str(files[0])).parent
    return None
