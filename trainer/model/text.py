"""Captions to token ids, and token ids to what SDXL's UNet is conditioned on.

Tokenizing runs in the data workers, so importing this module brings in neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """Both of SDXL's tokenizers, set to give rows of one length; can be pickled.

    They differ in the padding id alone (the end token, and 0 or "!"), but for "!" inside a caption: the
    second tokenizer's configuration makes it a special token, and diffusers follows it, so do we.
    """

    one: Tokenizer
    two: Tokenizer
    two_differs_at: str | None
    """Where a caption lacks this text, `two` gives what `one` gives, but for the padding; None: not known."""
    pad_id_two: int

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids [B, 2, 77] int64: start, at most 75 tokens of the caption, end, padding."""
        # Caption by caption: `encode_batch` starts a thread per core in every data worker.
        rows = [self._both(caption) for caption in captions]
        return np.array(rows, dtype=np.int64).reshape(len(captions), 2, -1)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, those beyond the 75 that are used included."""
        specials = 2  # start and end, of each piece
        return [
            sum(sum(piece.attention_mask) - specials for piece in (first, *first.overflowing))
            for first in map(self.one.encode, captions)
        ]

    def _both(self, caption: str) -> tuple[list[int], list[int]]:
        first = self.one.encode(caption)
        if self.two_differs_at is None or self.two_differs_at in caption:
            return first.ids, self.two.encode(caption).ids
        # Tokenizing is most of a data worker's time: 0.3 ms for a long caption.
        length = sum(first.attention_mask)
        return first.ids, first.ids[:length] + [self.pad_id_two] * (len(first.ids) - length)


def load_tokenizers(model_path: Path) -> CaptionTokenizer:
    """The tokenizers of a model folder that `check_model_folder` accepts."""
    from transformers import CLIPTokenizer

    one = CLIPTokenizer.from_pretrained(model_path / "tokenizer", local_files_only=True)
    two = CLIPTokenizer.from_pretrained(model_path / "tokenizer_2", local_files_only=True)
    alike = one.get_vocab() == two.get_vocab() and one.model_max_length == two.model_max_length
    # Special tokens are found in the raw text; all but the padding token are the same in both.
    specials = set(two.all_special_tokens) ^ set(one.all_special_tokens)
    return CaptionTokenizer(
        _fixed_length(one),
        _fixed_length(two),
        two_differs_at=two.pad_token if alike and specials <= {two.pad_token} else None,
        pad_id_two=two.pad_token_id,
    )


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


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """SDXL's two text encoders, CLIP ViT-L and OpenCLIP ViT-bigG."""

    one: CLIPTextModel
    two: CLIPTextModelWithProjection

    def encode(self, input_ids: Tensor) -> TextConditioning:
        """Both encoders' layer before the last side by side, without the final norm, and the second's pooled output.

        Equal to `StableDiffusionXLPipeline.encode_prompt`; like it, padding is not masked.

        Args:
            input_ids: [B, 2, 77] int64 from `CaptionTokenizer`, on any device.
        """
        import torch

        device = self.one.device
        ids_one, ids_two = input_ids.to(device).unbind(dim=1)
        # The encoders' own precision holds, whatever the training step's autocast says.
        with torch.autocast(device.type, enabled=False):
            out_one = self.one(ids_one, output_hidden_states=True)
            out_two = self.two(ids_two, output_hidden_states=True)
        hidden = torch.cat([out_one.hidden_states[-2], out_two.hidden_states[-2]], dim=-1)
        return TextConditioning(hidden=hidden, pooled=out_two.text_embeds)
