"""Captions to token ids, and token ids to what SDXL's UNet is conditioned on.

Tokenizing runs in the data workers, so importing this module brings in neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from trainer.errors import UserError, printable
from trainer.model.token_words import NO_WORDS, TokenWords, as_negative
from trainer.model_files.tokenizer_files import require_whole_captions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer


TOKENS_PER_CHUNK = 75  # of a caption; each chunk has a start and an end besides
_CHUNK_LENGTH = TOKENS_PER_CHUNK + 2


@dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """Both of SDXL's tokenizers, set to give chunks of one length; can be pickled.

    A caption longer than a chunk's 75 tokens goes on in the next chunk, each with its own start, end and padding, as
    in A1111 and ComfyUI (which besides try not to cut a word's or phrase's tokens apart) and in kohya's scripts.

    They differ in the padding id alone (the end token, and 0 or "!"), but for "!" inside a caption: the
    second tokenizer's configuration makes it a special token, and diffusers follows it, so do we.
    """

    one: Tokenizer
    two: Tokenizer
    two_differs_at: str | None
    """Where a caption lacks this text, `two` gives what `one` gives, but for the padding; None: not known."""
    pad_id_two: int
    chunks: int = 1
    """How many each caption gets. Padding is not masked, so that their number must not hang on a batch's others."""
    words: TokenWords = NO_WORDS
    """Of the user's own, which both know."""
    first_new: tuple[int, int] = (0, 0)
    """What each of both calls the first token of these."""
    one_vocabulary: bool = False
    """Both hold the same tokens and merges, 10 MB: in memory once."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_vocabulary()

    def __post_init__(self) -> None:
        self._share_vocabulary()

    def _share_vocabulary(self) -> None:
        if self.one_vocabulary:
            self.two.model = self.one.model

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids [B, 2, chunks, 77] int64; a chunk: start, at most 75 tokens of the caption, end, padding.

        Those of `words` are -1, -2, ...
        """
        # Caption by caption: `encode_batch` starts a thread per core in every data worker.
        rows = [self._both(self.words.spelled(caption)) for caption in captions]
        ids = np.array(rows, dtype=np.int64).reshape(len(captions), 2, self.chunks, -1)
        if not self.words.count:
            return ids
        return np.stack([as_negative(ids[:, i], first) for i, first in enumerate(self.first_new)], axis=1)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that are used, start and end of each chunk not counted."""
        specials, truncation = 2, self.one.truncation
        assert truncation is not None
        return self.chunks * (truncation["max_length"] - specials)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, those beyond `max_tokens` included."""
        specials = 2  # start and end, of each piece
        return [
            sum(sum(piece.attention_mask) - specials for piece in (first, *first.overflowing))
            for first in map(self.one.encode, map(self.words.spelled, captions))
        ]

    def words_of(self, caption: str) -> list[list[str]]:
        """The tokens of a caption as text, by chunk, start and end left out; chunks beyond `chunks` are not used."""
        first = self.one.encode(self.words.spelled(caption))
        pieces = [piece.tokens[1 : sum(piece.attention_mask) - 1] for piece in (first, *first.overflowing)]
        return [[self.words.shown(token) for token in piece] for piece in pieces]

    def _both(self, caption: str) -> tuple[list[list[int]], list[list[int]]]:
        pieces = self._pieces(self.one, caption)
        ids = [piece.ids for piece in pieces]
        if self.two_differs_at is None or self.two_differs_at in caption:
            return ids, [piece.ids for piece in self._pieces(self.two, caption)]
        # Tokenizing is most of a data worker's time: 0.3 ms for a long caption.
        lengths = [sum(piece.attention_mask) for piece in pieces]
        return ids, [
            row[:length] + [self.pad_id_two] * (len(row) - length) for row, length in zip(ids, lengths, strict=True)
        ]

    def _pieces(self, tokenizer: Tokenizer, caption: str) -> list[Encoding]:
        first = tokenizer.encode(caption)
        pieces = [first, *first.overflowing][: self.chunks]
        missing = self.chunks - len(pieces)
        return pieces + [tokenizer.encode("")] * missing if missing else pieces


def load_tokenizers(
    folders: tuple[Path, Path | None], chunks: int = 1, words: TokenWords = NO_WORDS
) -> CaptionTokenizer:
    """A model's two tokenizers.

    Args:
        folders: `RunModel.tokenizers`.
        chunks: how many each caption gets.
        words: of the user's own.
    Raises:
        UserError: transformers is too old, see `require_whole_captions`; or a tokenizer cannot be read.
    """
    require_whole_captions()
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder_one, folder_two = folders
    one = _read_tokenizer(CLIPTokenizer, folder_one)
    # SDXL's second tokenizer pads with OpenCLIP's id 0, which is "!", and has all else in common with the first.
    own: dict[str, Any] = {} if folder_two else {"pad_token": "!"}
    two = _read_tokenizer(CLIPTokenizer, folder_two or folder_one, **own)
    alike = one.get_vocab() == two.get_vocab() and one.model_max_length == two.model_max_length
    # Special tokens are found in the raw text; all but the padding token are the same in both.
    specials = set(two.all_special_tokens) ^ set(one.all_special_tokens)
    both = _fixed_length(one), _fixed_length(two)
    return CaptionTokenizer(
        *both,
        two_differs_at=two.pad_token if alike and specials <= {two.pad_token} else None,
        pad_id_two=two.pad_token_id,
        chunks=chunks,
        words=words,
        first_new=(words.added_to(both[0]), words.added_to(both[1])),
        one_vocabulary=both[0].model.__getstate__() == both[1].model.__getstate__(),
    )


def _read_tokenizer(kind: type[CLIPTokenizer], folder: Path, **own: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, model_max_length=_CHUNK_LENGTH, **own)
    except Exception as error:  # the library in Rust knows no finer kinds
        said = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{folder}: cannot be read as CLIP's tokenizer: {said}") from None


def _fixed_length(tokenizer: CLIPTokenizer) -> Tokenizer:
    # A copy: transformers hangs a function on its own, which cannot be pickled.
    rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    length = tokenizer.model_max_length
    rust.enable_truncation(length)
    rust.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return rust


@dataclass(frozen=True, eq=False)
class TextConditioning:
    """What the UNet gets of a batch's captions, in the text encoders' dtype unless it was cached in another."""

    hidden: Tensor  # [B, positions, D1 + D2]
    pooled: Tensor  # [B, P]


ChunkJoin = Literal["a1111", "kohya"]
"""How the chunks of a long text become one sequence: all positions of each, or without the inner ends and starts."""


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """SDXL's two text encoders, CLIP ViT-L and OpenCLIP ViT-bigG."""

    one: CLIPTextModel
    two: CLIPTextModelWithProjection
    join: ChunkJoin = "a1111"

    def encode(self, input_ids: Tensor) -> TextConditioning:
        """Both encoders' layer before the last side by side, without the final norm, and the second's pooled output.

        Equal to `StableDiffusionXLPipeline.encode_prompt` for one chunk; like it, padding is not masked. Chunks are
        encoded apart and joined; the pooled output is the first chunk's.

        Args:
            input_ids: [B, 2, chunks, 77] int64 from `CaptionTokenizer`, on any device.
        """
        import torch

        num_chunks = input_ids.shape[2]
        ids_one, ids_two = input_ids.to(self.one.device).unbind(1)
        out_one = self.one(ids_one.flatten(0, 1), output_hidden_states=True)
        out_two = self.two(ids_two.flatten(0, 1), output_hidden_states=True)
        hidden = torch.cat([out_one.hidden_states[-2], out_two.hidden_states[-2]], dim=-1)
        return TextConditioning(
            hidden=_joined(hidden.unflatten(0, (-1, num_chunks)), self.join), pooled=out_two.text_embeds[::num_chunks]
        )


def text_positions(num_chunks: int, join: ChunkJoin) -> int:
    """Length of the sequence that the UNet attends to: 77, or 154 and 231, or 152 and 227."""
    return 77 * num_chunks if join == "a1111" else 75 * num_chunks + 2


def _joined(hidden: Tensor, join: ChunkJoin) -> Tensor:
    """[B, chunks, 77, D] -> [B, positions, D]."""
    if join == "a1111" or hidden.shape[1] == 1:
        return hidden.flatten(1, 2)
    import torch

    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)
