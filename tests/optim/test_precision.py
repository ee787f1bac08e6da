"""TF32 by `train.precision`, and PyTorch's fused attention in everything that is trained or encodes text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.errors import UserError
from trainer.model.load_weights import load_text_encoders, load_unet
from trainer.model_files.run_model import open_model
from trainer.optim.precision import require_arithmetic, require_bf16, set_fp32_arithmetic


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


@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic", "bf16_kahan"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_cards_without_bf16_are_sent_to_fp16(precision: str, capability: tuple[int, int]) -> None:
    told = rf"^train\.precision = {precision}: Tesla V100 \(compute .* Set train\.precision: fp16$"
    with pytest.raises(UserError, match=told) as caught:
        require_bf16(precision, "Tesla V100", capability)
    assert len(caught.value.lines) == 1


def test_what_a_card_computes_is_allowed() -> None:
    for precision in ("fp32", "fp16"):
        require_bf16(precision, "Tesla V100", (7, 0))
    for precision in ("bf16", "bf16_stochastic", "bf16_kahan"):
        require_bf16(precision, "RTX 3090", (8, 6))
        require_arithmetic(precision, torch.device("cpu"))


def test_attention_is_pytorchs_own(model_folder: Path) -> None:
    unet = load_unet(open_model(model_folder), torch.float32, "cpu")
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    assert {e.config._attn_implementation for e in (encoders.one, encoders.two)} == {"sdpa"}
