"""Rows as a prepared set gives them, and what was wrong with those that it could not give."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowProblem:
    """A row that could not be read as it was written.

    `file` is the one at fault: a shard (relative to the prepared folder), or a file that a shard refers to. `row`
    counts in the shard, `offset` is the byte of the file where the row's payload begins; -1 where it is not known.
    """

    file: str
    row: int
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """Rows as read. Where `ok` is false (padding, or a row in `problems`), latents or pixels are 0 and texts are empty.

    latents f16 [m, 4, h, w] unscaled, or in a set of images pixels u8 [m, 3, 8h, 8w], the other None; captions are
    JSON texts {"caption": ...}; repeat int64 [m] counts from 0; sizes int64 [m, 6] in the order of SDXL's time ids;
    text_hidden f16 [m, positions, D] and text_pooled f16 [m, P] where they are cached; masks u8 [m, h, w] where they
    are asked for, 255 for an image without one.
    """

    latents: np.ndarray | None
    pixels: np.ndarray | None
    captions: list[str]
    keys: list[str]
    repeat: np.ndarray
    sizes: np.ndarray
    ok: np.ndarray
    text_hidden: np.ndarray | None
    text_pooled: np.ndarray | None
    problems: list[RowProblem]
    masks: np.ndarray | None = None
