"""TF32 by `train.precision`, and PyTorch's fused attention in everything that is trained or encodes text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.model.load import load_text_encoders, load_unet
from trainer.train.precision import set_fp32_arithmetic


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True), ("bf16_kahan", True)])
def test_tf32_is_for_what_is_not_asked_to_be_fp32(precision: str, allowed: bool) -> None:
    set_fp32_arithmetic(precision)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed


def test_attention_is_pytorchs_own(model_folder: Path) -> None:
    unet = load_unet(model_folder, torch.float32, "cpu")
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    encoders = load_text_encoders(model_folder, torch.float32, "cpu")
    assert {e.config._attn_implementation for e in (encoders.one, encoders.two)} == {"sdpa"}
