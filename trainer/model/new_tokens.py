"""Vectors of new tokens in both text encoders: beside the vocabulary's, which do not change (Gal et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.sections.new_tokens_config import NewTokenConfig
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, read_json
from trainer.keyed import draw_seed
from trainer.model.text import TextEncoders, load_tokenizers
from trainer.model.token_words import TokenWords, words_of
from trainer.model_files.model_source import open_tensors
from trainer.model_files.run_model import RunModel

FOLDER = "new_tokens"
WORDS_FILE = "words.json"
"""Beside a checkpoint's vectors: the words, each with how many of them are its."""
VECTORS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""By name of the vectors, as other programs' embedding files have it, the encoder's component."""


@dataclass(frozen=True)
class NewTokens:
    """New tokens, and what they start from; `seed` is the run's."""

    tokens: tuple[NewTokenConfig, ...] = ()
    seed: int = 0

    @property
    def words(self) -> TokenWords:
        """As captions hold them."""
        return words_of(self.tokens)


NO_NEW_TOKENS = NewTokens()


class NewTokenVectors(nn.Module):
    """Their vectors: `clip_l` [tokens, D1] and `clip_g` [tokens, D2], on the meta device."""

    def __init__(self, start: NewTokens, widths: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.start = start
        shapes = [(start.words.count, width) for width in widths]
        self.clip_l, self.clip_g = (nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in shapes)


class _ExtendedEmbedding(nn.Embedding):
    """A vocabulary's vectors, and those of new tokens for negative ids: -1 is the first of them."""

    def extend(self, vectors: NewTokenVectors, name: str) -> None:
        # In a tuple, so that the vectors are no parameters of this module as well. They are asked for at each pass:
        # a model that is spread over workers has others then.
        self._new = (vectors, name)

    def forward(self, input: Tensor) -> Tensor:
        known = super().forward(input.clamp(min=0))
        vectors, name = self._new
        new = F.embedding((-1 - input).clamp(min=0), getattr(vectors, name))
        return torch.where((input < 0).unsqueeze(-1), new.to(known.dtype), known)


def add_new_tokens(encoders: TextEncoders, start: NewTokens, dtype: torch.dtype) -> NewTokenVectors:
    """Vectors of new tokens for text encoders, which look them up from now on.

    Args:
        encoders: laid out, with or without memory.
        dtype: of the vectors.
    """
    both = [_embedding(encoder) for encoder in (encoders.one, encoders.two)]
    vectors = NewTokenVectors(start, (both[0].embedding_dim, both[1].embedding_dim), dtype)
    for embedding, name in zip(both, VECTORS, strict=True):
        embedding.__class__ = _ExtendedEmbedding
        assert isinstance(embedding, _ExtendedEmbedding)
        embedding.extend(vectors, name)
    return vectors


def _embedding(encoder: nn.Module) -> nn.Embedding:
    """The vocabulary's, by the ending of its name."""
    found = [m for name, m in encoder.named_modules() if name.endswith("token_embedding")]
    assert len(found) == 1 and isinstance(found[0], nn.Embedding)
    return found[0]


def fill_new_tokens(
    model_files: RunModel, stored: Path | None, vectors: NewTokenVectors, put: Callable[[Tensor, Tensor], None]
) -> None:
    """Give vectors that have memory, or this worker's shares of them, their values.

    Args:
        stored: folder of a checkpoint that holds them, or an average of them; None: they start here.
        put: fills a parameter, or this worker's share of it, from the whole tensor.
    Raises:
        UserError: the stored ones are others, or a text or file to start from does not fit.
    """
    new = vectors.start
    if stored is not None:
        require_same_words(stored, new.words)
        for name, tensor in open_tensors(stored / f"{FOLDER}.safetensors").items():
            put(getattr(vectors, name), tensor.read())
        return
    texts = [each.initial for each in new.tokens if each.initial is not None]
    tokenizer = load_tokenizers(model_files.tokenizers) if texts else None
    for number, (name, component) in enumerate(VECTORS.items()):
        table = _vocabulary(model_files, component)
        rows = []
        for token in new.tokens:
            if token.file is not None:
                rows.append(_vectors_of_file(token, name, table.shape[1]))
            elif token.initial is not None and tokenizer is not None:
                ids = torch.from_numpy(tokenizer([token.initial])[0, number, 0])
                length = min(tokenizer.count_tokens([token.initial])[0], tokenizer.max_tokens)
                rows.append(_of_text(token, table, ids[1 : 1 + length]))
            else:
                rows.append(_drawn(token, table, draw_seed(new.seed, FOLDER, token.token.casefold(), name)))
        put(getattr(vectors, name), torch.cat(rows))


def _vocabulary(model_files: RunModel, component: str) -> Tensor:
    tensors = model_files.part(component).tensors
    (name,) = (each for each in tensors if each.endswith("token_embedding.weight"))
    return tensors[name].read().float()


def _of_text(token: NewTokenConfig, table: Tensor, ids: Tensor) -> Tensor:
    if not len(ids):
        raise UserError(f"new_tokens.tokens: `{token.token}`: initial = {token.initial!r} has no tokens")
    return table[ids[torch.arange(token.vectors) % len(ids)]]


def _drawn(token: NewTokenConfig, table: Tensor, seed: int) -> Tensor:
    """As spread as the vocabulary's vectors, the same for any number of workers."""
    noise = torch.randn(token.vectors, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + noise * table.std(0)


def _vectors_of_file(token: NewTokenConfig, name: str, width: int) -> Tensor:
    said = f"new_tokens.tokens: `{token.token}`: {token.file}"
    assert token.file is not None
    tensors = open_tensors(token.file)
    if name not in tensors:
        raise UserError(f"{said}: holds no `{name}`; an embedding for SDXL has clip_l and clip_g")
    shape = tuple(tensors[name].meta.shape)
    if shape != (token.vectors, width):
        rule = f"its {name} has shape {list(shape)}, and {token.vectors} vectors of {width} numbers are asked for"
        raise UserError(f"{said}: {rule}")
    values = tensors[name].read().float()
    if not values.isfinite().all():
        raise UserError(f"{said}: {name} holds NaN or infinite values")
    return values


def words_text(words: TokenWords) -> str:
    """What a checkpoint says of its vectors."""
    return json.dumps({"words": [list(pair) for pair in words.words]}, indent=1, ensure_ascii=False) + "\n"


def read_words(folder: Path) -> TokenWords:
    """The words in a checkpoint's folder.

    Raises:
        UserError: they are missing, or not what was written.
    """
    file = folder / WORDS_FILE
    try:
        told = read_json(file, most_bytes=DEFAULT_LIMITS.config_bytes)
        return TokenWords(tuple((str(word), int(vectors)) for word, vectors in told["words"]))  # pyright: ignore
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not the words of new tokens ({type(error).__name__})") from None


def require_same_words(folder: Path, words: TokenWords) -> None:
    """Refuse to go on with other new tokens than a checkpoint's.

    Raises:
        UserError: with both.
    """
    before = read_words(folder)
    if before.words != words.words:
        listed = [", ".join(f"{word} ({vectors})" for word, vectors in each.words) for each in (words, before)]
        raise UserError(
            f"new_tokens.tokens = {listed[0]}: {folder.parent} was trained with {listed[1]}; give those, or a run.dir "
            "of its own and `file`"
        )
