"""What is refused of `model.frozen_weights`, in one line each."""

from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.errors import UserError

RIGHT = Path(__file__).parent / "right.yaml"
TOKENS = ["new_tokens.tokens=[{token: sks}]", "trainable.unet.train=false", "train.precision=bf16"]
LORA = ["adapter.kind=lora", "train.precision=bf16"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.frozen_weights=nf4"], "model.frozen_weights = nf4 with adapter.kind = none (the default): must be"),
        (["model.frozen_weights=int4"], "model.frozen_weights = int4: must be one of compute, int8, nf4"),
        (["model.frozen_weights=int8", TOKENS[0]], "weights that train are not held in fewer bits"),
        (["model.frozen_weights=int8", *TOKENS, "train.compile=blocks"], "train.compile = blocks with model.frozen_w"),
        (["model.frozen_weights=int8", *LORA, "memory.strategy=zero2"], "memory.strategy = zero2 with model.frozen"),
        (["model.frozen_weights=int8", *LORA, "train.compile=blocks"], "train.compile = blocks with model.frozen_we"),
    ],
)
def test_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RIGHT, overrides, check_paths=False)
    assert said in "\n".join(caught.value.lines)


@pytest.mark.parametrize("held", ["compute", "int8", "nf4"])
@pytest.mark.parametrize("more", [TOKENS, LORA], ids=["new tokens alone", "an adapter"])
def test_accepted(held: str, more: list[str]) -> None:
    config = load_config(RIGHT, [f"model.frozen_weights={held}", *more], check_paths=False)
    assert config.model.frozen_weights == held
