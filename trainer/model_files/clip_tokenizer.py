"""CLIP's tokenizer, written as the published SDXL has it; its vocabulary comes from an installed package."""

import gzip
import json
import shutil
from pathlib import Path

from trainer.package_files import find_package_file

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY_SIZE = 49408


def write_clip_tokenizer(folder: Path, pad_token: str, tokenizer_from: Path | None = None) -> None:
    """Write CLIP's tokenizer as the published SDXL has it: `vocab.json`, `merges.txt` and two settings files.

    Args:
        pad_token: the end token for SDXL's first tokenizer, "!" (id 0) for the second.
        tokenizer_from: a folder to copy vocabulary and merges from, if it has them.

    Raises:
        UserError: no installed package has CLIP's vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        if tokenizer_from is not None and tokenizer_from != folder and (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    if not (folder / "vocab.json").is_file():
        vocabulary, merges = _clip_vocabulary()
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN, "pad_token": pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    settings |= {"add_prefix_space": False, "errors": "replace", "clean_up_tokenization_spaces": True}
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", settings | special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and its merges: bytes, bytes that end a word, merges, start, end."""
    path = find_package_file("open_clip", "open_clip_torch", "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # The file holds more merges than CLIP uses; the first line is a comment.
    merges = lines[1 : _VOCABULARY_SIZE - 2 * 256 - 2 + 1]
    # Printable stand-ins for the 256 bytes, in CLIP's order: "!" comes first.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *(m.replace(" ", "") for m in merges),
        START_TOKEN,
        END_TOKEN,
    ]
    return {token: index for index, token in enumerate(tokens)}, merges
