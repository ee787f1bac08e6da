"""Where the files of SDXL's two tokenizers lie, and whether transformers reads them rightly; without torch."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.guards import Limits, printable, read_json, read_text
from trainer.model_files.model_source import ModelSource

_CLIP = "openai/clip-vit-large-patch14"
# Where the hub's cache may have CLIP's vocabulary: repository, folder in it.
_CACHED = ((_CLIP, ""), ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"))
_OLDEST_TRANSFORMERS = 5, 20
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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


def require_sound(folder: Path, limits: Limits, most_words: int) -> None:
    """Refuse a tokenizer that is none of CLIP's kind, before a library reads it.

    Args:
        folder: one of `tokenizer_folders`.
        most_words: rows of the text encoder's table of words, which the tokenizer's numbers must lie within.
    Raises:
        UserError: a file is too large, of another encoding, or not of its form.
    """
    most_words = min(most_words, limits.vocabulary)
    for file in (folder / name for name in _SETTINGS):
        if file.is_file() and not isinstance(_json(file, limits), dict):
            raise UserError(f"{file}: not a JSON object")
    whole = folder / "tokenizer.json"
    if whole.is_file():
        model = _json(whole, limits)
        model = model.get("model") if isinstance(model, dict) else None
        _check_words(whole, model.get("vocab") if isinstance(model, dict) else None, most_words)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        words = _json(vocabulary, limits)
        _check_words(vocabulary, words, most_words)
        _check_merges(merges, words, limits)


def _json(file: Path, limits: Limits) -> Any:
    return read_json(file, limits, most_bytes=limits.tokenizer_bytes)


def _check_words(file: Path, words: object, most: int) -> None:
    if not isinstance(words, dict) or not words:
        raise UserError(f"{file}: holds no vocabulary; wanted words with their numbers")
    if len(words) > most:
        raise UserError(f"{file}: a vocabulary of {len(words):,} words; the text encoder has {most:,}")
    for word, number in words.items():
        if type(number) is not int or not 0 <= number < most:
            shown = printable(str(number), 40)
            raise UserError(f"{file}: {printable(word, 40)} has the number {shown}; wanted 0 to {most - 1:,}")


def _check_merges(file: Path, words: dict[str, int], limits: Limits) -> None:
    """Each line joins two words to one, and all three are in the vocabulary."""
    lines = read_text(file, limits.tokenizer_bytes).split("\n")
    if len(lines) > limits.vocabulary:
        raise UserError(f"{file}: {len(lines):,} merges; at most {limits.vocabulary:,} are read")
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or (number == 1 and line.startswith("#version")):
            continue
        if len(parts) != 2 or not {*parts, "".join(parts)} <= words.keys():
            raise UserError(f"{file}:{number}: {printable(line, 60)}: wanted two words whose union is in vocab.json")


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
