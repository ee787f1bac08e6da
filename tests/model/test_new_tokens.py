"""New tokens in captions and in both text encoders, against the libraries' own ways to a larger vocabulary."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPTokenizer

from trainer.config.sections.new_tokens_config import NewTokenConfig
from trainer.errors import UserError
from trainer.model.load_weights import load_text_encoders
from trainer.model.new_tokens import NewTokens, NewTokenVectors, add_new_tokens, fill_new_tokens
from trainer.model.text import CaptionTokenizer, TextEncoders, load_tokenizers
from trainer.model.token_words import TokenWords, words_of
from trainer.model_files.run_model import open_model
from trainer.parallel.sharding import copy_share, materialize

WORDS = TokenWords((("<my-cat>", 3), ("sks", 1)))


@pytest.fixture(scope="module")
def tokenize(model_folder: Path) -> CaptionTokenizer:
    return load_tokenizers(open_model(model_folder).tokenizers, words=WORDS)


def extended(model_folder: Path, *tokens: NewTokenConfig, seed: int = 7) -> tuple[TextEncoders, NewTokenVectors]:
    """Encoders with new tokens that have their first values."""
    model = open_model(model_folder)
    encoders = load_text_encoders(model, torch.float32, "cpu")
    vectors = add_new_tokens(encoders, NewTokens(tokens, seed), torch.float32)
    materialize(vectors, torch.device("cpu"))
    fill_new_tokens(model, None, vectors, copy_share)
    return encoders, vectors


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a photo of <my-cat> on a mat", ["a photo of", [-1, -2, -3], "on a mat"]),
        ("<My-Cat>", [[-1, -2, -3]]),
        ("the<my-cat>the", ["the", [-1, -2, -3], "the"]),
        ("sks and SKS, masks", [[-4], "and", [-4], ", masks"]),
        ("<my-cat><my-cat>!", [[-1, -2, -3], [-1, -2, -3], "!"]),
        ("nothing new", ["nothing new"]),
    ],
)
def test_words_become_negative_ids_in_their_places(
    tokenize: CaptionTokenizer, model_folder: Path, caption: str, parts: list[str | list[int]]
) -> None:
    ids = tokenize([caption])
    for number, folder in enumerate(("tokenizer", "tokenizer_2")):
        plain = CLIPTokenizer.from_pretrained(model_folder / folder)
        inner = [i for p in parts for i in (p if isinstance(p, list) else plain(p).input_ids[1:-1])]
        expected = [plain.bos_token_id, *inner, plain.eos_token_id]
        expected += [plain.pad_token_id] * (77 - len(expected))
        np.testing.assert_array_equal(ids[0, number, 0], expected)


def test_they_count_are_shown_and_go_over_chunks(tokenize: CaptionTokenizer, model_folder: Path) -> None:
    plain = load_tokenizers(open_model(model_folder).tokenizers)
    before = plain.count_tokens(["the mat"])[0]
    assert tokenize.count_tokens(["the <my-cat> mat"]) == [before + 3]
    shown = tokenize.words_of("the <my-cat> sks")[0]
    assert shown[-4:] == ["<my-cat>:1", "<my-cat>:2", "<my-cat>:3", "sks"]
    two = load_tokenizers(open_model(model_folder).tokenizers, 2, WORDS)
    ids = pickle.loads(pickle.dumps(two))(["<my-cat> " * 30])  # 90 tokens
    assert [int((ids[0, 0, chunk] < 0).sum()) for chunk in range(2)] == [75, 15]


def test_plain_captions_have_the_ids_that_they_had(tokenize: CaptionTokenizer, model_folder: Path) -> None:
    captions = ["a cat", "", "two masks!! and a <b>", "naïve café " * 40]
    plain = load_tokenizers(open_model(model_folder).tokenizers)
    np.testing.assert_array_equal(tokenize(captions), plain(captions))


def test_encoders_give_what_those_of_a_larger_vocabulary_give(model_folder: Path) -> None:
    tokens = NewTokenConfig(token="<my-cat>", vectors=3), NewTokenConfig(token="sks")
    encoders, vectors = extended(model_folder, *tokens)
    ids = load_tokenizers(open_model(model_folder).tokenizers, words=words_of(tokens))(["a <my-cat> by sks", "a cat"])
    found = encoders.encode(torch.from_numpy(ids))
    larger = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    outputs = []
    for number, (encoder, new) in enumerate(((larger.one, vectors.clip_l), (larger.two, vectors.clip_g))):
        size = encoder.get_input_embeddings().num_embeddings
        encoder.resize_token_embeddings(size + 4, mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[size:] = new
        getattr(encoder, "text_model", encoder).eos_token_id = 517  # and not its legacy of the largest id
        own = torch.from_numpy(ids[:, number, 0])
        outputs.append(encoder(torch.where(own < 0, size - 1 - own, own), output_hidden_states=True))
    hidden = torch.cat([each.hidden_states[-2] for each in outputs], dim=-1)
    torch.testing.assert_close(found.hidden, hidden, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, outputs[1].text_embeds, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_vectors_in_the_text(model_folder: Path) -> None:
    tokens = NewTokenConfig(token="<my-cat>", vectors=2), NewTokenConfig(token="sks")
    encoders, vectors = extended(model_folder, *tokens)
    ids = load_tokenizers(open_model(model_folder).tokenizers, words=words_of(tokens))(["a <my-cat>"])
    encoders.encode(torch.from_numpy(ids)).hidden.square().sum().backward()
    for gradient in (vectors.clip_l.grad, vectors.clip_g.grad):
        assert gradient is not None and bool((gradient[:2] != 0).any(1).all()) and not gradient[2].any()

    # By differences of the loss itself.
    def loss(step: float) -> float:
        with torch.no_grad():
            vectors.clip_g[1, 5] += step
            value = encoders.encode(torch.from_numpy(ids)).hidden.double().square().sum()
            vectors.clip_g[1, 5] -= step
        return float(value)

    assert vectors.clip_g.grad is not None
    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(float(vectors.clip_g.grad[1, 5]), rel=2e-2, abs=1e-3)


def test_initial_values(model_folder: Path, tmp_path: Path) -> None:
    model = open_model(model_folder)
    tables = {
        name: next(t.read() for n, t in model.part(part).tensors.items() if n.endswith("token_embedding.weight"))
        for name, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
    }
    own = {name: torch.randn(2, table.shape[1]) for name, table in tables.items()}
    save_file(own, tmp_path / "own.safetensors")
    tokens = (
        NewTokenConfig(token="first", vectors=5, initial="the cat"),
        NewTokenConfig(token="second", vectors=2, file=tmp_path / "own.safetensors"),
        NewTokenConfig(token="third", vectors=4),
    )
    ids = load_tokenizers(model.tokenizers)(["the cat"])
    count = load_tokenizers(model.tokenizers).count_tokens(["the cat"])[0]
    _, vectors = extended(model_folder, *tokens)
    _, again = extended(model_folder, *tokens)
    for number, name in enumerate(("clip_l", "clip_g")):
        values, table = getattr(vectors, name).detach(), tables[name].float()
        rows = table[ids[0, number, 0, 1 : 1 + count]]
        assert torch.equal(values[:5], rows.repeat(5, 1)[:5])
        assert torch.equal(values[5:7], own[name])
        assert torch.equal(values, getattr(again, name).detach())
        drawn = (values[7:] - table.mean(0)) / table.std(0)
        assert abs(float(drawn.mean())) < 0.5 and 0.5 < float(drawn.std()) < 1.5
        assert F.cosine_similarity(values[7], values[8], dim=0) < 0.99


def test_a_file_that_does_not_fit_is_refused(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    token = NewTokenConfig(token="word", vectors=2, file=file)
    for tensors, said in (
        ({"emb_params": torch.zeros(2, 16)}, r"`word`: .*own.safetensors: holds no `clip_l`"),
        ({"clip_l": torch.zeros(3, 16)}, r"its clip_l has shape \[3, 16\], and 2 vectors of \d+ numbers"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=said):
            extended(model_folder, token)
