import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from trainer.model.conditioning import condition_text
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.model.text import CaptionTokenizer, ChunkJoin, load_tokenizers, text_positions
from trainer.model_files.run_model import open_model

ODD_CAPTIONS = [
    "a cat",
    "",
    "   ",
    "the cat, the Cat, THE CAT",
    "the cat " * 100,
    "x" * 74,
    "x" * 75,
    "x" * 76,
    "what a cat!!! ! wow!",
    "two\nlines\tand a tab",
    "naïve café, cafe\u0301, Straße, İstanbul",
    "猫 と 犬",
    "cat 🐈‍⬛ heart ❤️",
    "it's 2024, they're 3.5 m (tall) <b>&amp;</b>",
    "<|endoftext|> inside <|startoftext|>",
    "nul \x00 and \u200b zero width",
]


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> StableDiffusionXLPipeline:
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    return StableDiffusionXLPipeline(
        vae=load_vae(open_model(model_folder), torch.float32, "cpu"),
        text_encoder=encoders.one,
        text_encoder_2=encoders.two,
        tokenizer=CLIPTokenizer.from_pretrained(model_folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(model_folder / "tokenizer_2"),
        unet=load_unet(open_model(model_folder), torch.float32, "cpu"),
        scheduler=None,  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def tokenize(model_folder: Path) -> CaptionTokenizer:
    return load_tokenizers(open_model(model_folder).tokenizers)


def _pipeline_ids(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> np.ndarray:
    settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "np"}
    one, two = (tokenizer(captions, **settings).input_ids for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2))
    return np.stack([one, two], axis=1)


def test_token_ids_equal_the_pipelines(tokenize: CaptionTokenizer, pipeline: StableDiffusionXLPipeline) -> None:
    ids = tokenize(ODD_CAPTIONS)
    assert ids.shape == (len(ODD_CAPTIONS), 2, 1, 77)
    assert ids.dtype == np.int64
    for caption, row, expected in zip(ODD_CAPTIONS, ids[:, :, 0], _pipeline_ids(pipeline, ODD_CAPTIONS), strict=True):
        np.testing.assert_array_equal(row, expected, err_msg=repr(caption))


def test_tokenizers_hold_one_vocabulary_if_it_is_one(
    model_folder: Path, tmp_path: Path, tokenize: CaptionTokenizer
) -> None:
    assert tokenize.one_vocabulary and pickle.loads(pickle.dumps(tokenize)).one_vocabulary
    other = shutil.copytree(model_folder / "tokenizer_2", tmp_path / "other")
    merges = (other / "merges.txt").read_text().splitlines()
    (other / "merges.txt").write_text("\n".join(merges[:-1]) + "\n")
    two = load_tokenizers((model_folder / "tokenizer", other))
    assert not two.one_vocabulary
    word = merges[-1].replace(" ", "").removesuffix("</w>")
    assert not np.array_equal(two.two.encode(word).ids, tokenize.two.encode(word).ids)
    assert two.one.encode(word).ids == tokenize.one.encode(word).ids


def test_padding_and_truncation(tokenize: CaptionTokenizer) -> None:
    start, end = 516, 517
    empty, long = tokenize(["", "the cat " * 100])[:, :, 0]
    np.testing.assert_array_equal(empty[0], [start] + [end] * 76)
    np.testing.assert_array_equal(empty[1], [start, end] + [0] * 75)
    for row in long:
        assert row[0] == start
        assert row[-1] == end
        assert end not in row[:-1]


def test_a_row_does_not_depend_on_its_neighbours(tokenize: CaptionTokenizer) -> None:
    together = tokenize(ODD_CAPTIONS)
    apart = np.concatenate([tokenize([caption]) for caption in ODD_CAPTIONS])
    np.testing.assert_array_equal(together, apart)


def test_a_data_worker_needs_neither_torch_nor_transformers(tokenize: CaptionTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenize))
    program = f"""
import pickle, sys
tokenize = pickle.load(open({str(tmp_path / "tokenizer.pickle")!r}, "rb"))
print(tokenize(["the cat!"]).tolist())
heavy = sorted({{"torch", "transformers", "diffusers"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tokenize(["the cat!"]).tolist())


def test_text_conditioning_equals_encode_prompt(
    tokenize: CaptionTokenizer, pipeline: StableDiffusionXLPipeline, model_folder: Path
) -> None:
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    text = encoders.encode(torch.from_numpy(tokenize(ODD_CAPTIONS)))
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(ODD_CAPTIONS, do_classifier_free_guidance=False)
    assert text.hidden.shape == (len(ODD_CAPTIONS), 77, 40)
    assert text.pooled.shape == (len(ODD_CAPTIONS), 24)
    assert not text.hidden.requires_grad
    torch.testing.assert_close(text.hidden, hidden, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-6)


def test_hidden_is_the_layer_before_the_last_without_the_final_norm(
    tokenize: CaptionTokenizer, model_folder: Path
) -> None:
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    ids = torch.from_numpy(tokenize(["the cat"]))
    expected = encoders.encode(ids)
    for model in (encoders.one, getattr(encoders.two, "text_model", encoders.two)):
        text_model = getattr(model, "text_model", model)
        text_model.encoder.layers[-1].mlp.fc2.weight.data.mul_(3)
        text_model.final_layer_norm.weight.data.mul_(3)
    changed = encoders.encode(ids)
    torch.testing.assert_close(changed.hidden, expected.hidden, rtol=0, atol=0)
    assert (changed.pooled - expected.pooled).abs().max() > 0.1


def test_frozen_encoders_keep_their_precision_under_autocast(tokenize: CaptionTokenizer, model_folder: Path) -> None:
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    ids = torch.from_numpy(tokenize(["the cat", "a cat"]))
    plain = condition_text(encoders, torch.device("cpu"), ids, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = condition_text(encoders, torch.device("cpu"), ids, None, None)
    torch.testing.assert_close(inside.hidden, plain.hidden, rtol=0, atol=0)
    torch.testing.assert_close(inside.pooled, plain.pooled, rtol=0, atol=0)


LONG = ["the cat", "", " ".join(["the cat sat on the mat!"] * 20), "a " * 75, "a " * 76]


def _kohya_ids(tokenizer: CLIPTokenizer, caption: str, max_tokens: int) -> np.ndarray:
    """One sequence of max_tokens + 2, cut as kohya's scripts do (for SDXL: `get_input_ids`): [chunks, 77]."""
    settings = {"padding": "max_length", "max_length": max_tokens + 2, "truncation": True}
    tokenizer.model_max_length, usual = max_tokens + 2, tokenizer.model_max_length
    ids = tokenizer(caption, **settings).input_ids
    tokenizer.model_max_length = usual
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks = []
    for begin in range(1, max_tokens, 75):
        chunk = [ids[0], *ids[begin : begin + 75], ids[-1]]
        if pad != end:
            if chunk[-2] not in (end, pad):
                chunk[-1] = end
            if chunk[1] == pad:
                chunk[1] = end
        chunks.append(chunk)
    return np.array(chunks)


@pytest.mark.parametrize("chunks", [2, 3])
def test_long_captions_are_cut_as_kohyas_scripts_do(
    tokenize: CaptionTokenizer, pipeline: StableDiffusionXLPipeline, chunks: int
) -> None:
    ids = replace(tokenize, chunks=chunks)(LONG)
    assert ids.shape == (len(LONG), 2, chunks, 77) and replace(tokenize, chunks=chunks).max_tokens == 75 * chunks
    for number, caption in enumerate(LONG):
        for which, tokenizer in enumerate((pipeline.tokenizer, pipeline.tokenizer_2)):
            if which == 1 and "!" in caption:  # the padding token in a text confuses kohya's rules
                continue
            np.testing.assert_array_equal(ids[number, which], _kohya_ids(tokenizer, caption, 75 * chunks))


@pytest.mark.parametrize(("join", "positions"), [("a1111", 231), ("kohya", 227)])
def test_long_captions_are_encoded_chunk_by_chunk(
    tokenize: CaptionTokenizer, pipeline: StableDiffusionXLPipeline, model_folder: Path, join: ChunkJoin, positions: int
) -> None:
    """Each chunk's text, encoded by the pipeline on its own, is found in its place."""
    words = ["a b c " * 25, "c a t " * 25, "the cat"]  # a letter is a token
    encoders = replace(load_text_encoders(open_model(model_folder), torch.float32, "cpu"), join=join)
    text = encoders.encode(torch.from_numpy(replace(tokenize, chunks=3)([" ".join(words)])))
    assert text.hidden.shape[1] == positions == text_positions(3, join)
    with torch.no_grad():
        apart, _, pooled, _ = pipeline.encode_prompt(words, do_classifier_free_guidance=False)
    expected = apart.flatten(0, 1)
    if join == "kohya":
        inner_ends = [76, 77, 153, 154]
        expected = expected[[row for row in range(len(expected)) if row not in inner_ends]]
    torch.testing.assert_close(text.hidden[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.pooled, pooled[:1], rtol=0, atol=1e-6)


def test_tokens_are_counted_beyond_what_is_used(
    tokenize: CaptionTokenizer, pipeline: StableDiffusionXLPipeline
) -> None:
    expected = [len(pipeline.tokenizer(caption).input_ids) - 2 for caption in ODD_CAPTIONS]
    assert tokenize.count_tokens(ODD_CAPTIONS) == expected and max(expected) > 150
    words = [[word for chunk in tokenize.words_of(caption) for word in chunk] for caption in ODD_CAPTIONS]
    assert [*map(len, words)] == expected and words[3][:4] == ["the</w>", "cat</w>", ",</w>", "the</w>"]
