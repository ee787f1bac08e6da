"""What is refused of `new_tokens`, in one line each."""

from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.errors import UserError

RIGHT = Path(__file__).parent / "right.yaml"
ONE = "new_tokens.tokens=[{token: <my-cat>, vectors: 2, initial: cat}]"


def lines(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(RIGHT, list(overrides), check_paths=False)
    return "\n".join(caught.value.lines)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["new_tokens.lr=0.01"], "new_tokens.lr = 0.01 with new_tokens.tokens = [] (the default): has no effect"),
        (
            ["new_tokens.tokens=[{token: my cat}]"],
            "new_tokens.tokens.0.token = my cat: must be one word, without spaces",
        ),
        (["new_tokens.tokens=[{token: 'a,b'}]"], "must be one word, without spaces, commas and invisible characters"),
        (["new_tokens.tokens=[{token: Sks}, {token: sKS}]"], "the same word twice; upper and lower case are one"),
        (["new_tokens.tokens=[{token: a, vectors: 0}]"], "new_tokens.tokens.0.vectors"),
        (["new_tokens.tokens=[{token: a, vectors: 76}]"], "new_tokens.tokens.0.vectors"),
        (["new_tokens.tokens=[{tokn: a}]"], "did you mean `token`?"),
        (["new_tokens.tokens=[{token: a, initial: cat, file: a.safetensors}]"], "give only one of them"),
        ([ONE, "data.cache_text=true"], "must not go together; the text encoders' outputs change"),
        ([ONE, "model.text_encoder_precision=bf16"], "has no effect; with new tokens, both are held"),
        ([ONE, "trainable.unet.train=false", "train.precision=bf16_stochastic"], "must be bf16, fp16 or fp32"),
        ([ONE, "trainable.unet.train=false", "memory.strategy=zero2"], "must be auto or ddp"),
        ([ONE, "new_tokens.lr=0.01", "optimizer.kind=prodigy", "optimizer.lr=1"], "one learning rate is found for all"),
        (["trainable.unet.train=false"], "nothing trains"),
    ],
)
def test_refused(overrides: list[str], said: str) -> None:
    assert said in lines(*overrides)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RIGHT, [f"new_tokens.tokens=[{{token: a, file: {tmp_path / 'none.safetensors'}}}]"])
    assert any("new_tokens.tokens.0.file" in line and "no such file" in line for line in caught.value.lines)


@pytest.mark.parametrize("more", [[], ["trainable.unet.train=false", "train.precision=bf16"], ["adapter.kind=lora"]])
def test_accepted(more: list[str]) -> None:
    precision = [] if any("precision" in each for each in more) else ["train.precision=bf16"]
    config = load_config(RIGHT, [ONE, "data.cache_text=false", *precision, *more], check_paths=False)
    assert config.new_tokens.tokens[0].token == "<my-cat>"
