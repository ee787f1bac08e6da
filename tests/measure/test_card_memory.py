"""What `plan` counts with as the card's memory."""

from pathlib import Path

import pytest

from trainer.measure.card_memory import KEPT_BY_DRIVER, card_bytes
from trainer.parallel.environment import detect_gpus

GIB = 2**30


@pytest.mark.parametrize(
    ("visible", "printed_gib"),
    [(None, 12), ("0", 24), ("1,0", 12), ("GPU-aaaa", 24), ("0,7,1", 24), ("0,2", 24), ("2", None), ("", None)],
)
def test_smallest_of_the_visible_cards(nvidia_smi: Path, visible: str | None, printed_gib: int | None) -> None:
    gpus = detect_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    expected = None if printed_gib is None else printed_gib * GIB - KEPT_BY_DRIVER
    assert card_bytes(gpus) == expected


def test_no_more_than_cuda_has(nvidia_smi: Path) -> None:
    """PyTorch's total_memory of RTX 3090s is 23.68 GiB and more."""
    found = card_bytes(detect_gpus({"CUDA_VISIBLE_DEVICES": "0"}))
    assert found is not None and 23.6 < found / GIB < 23.68


def test_not_known_where_the_tool_fails_or_is_missing(nvidia_smi: Path) -> None:
    gpus = detect_gpus({})
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n", encoding="utf-8")
    assert card_bytes(gpus) is None
    nvidia_smi.unlink()
    assert card_bytes(["0", "1"]) is None
