"""Quality scores: formulas beside independent derivations in float64, CLIP's features beside transformers' own."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.data.photographs import write_crops
from tests.evaluate.tiny_clip import write_tiny_clip
from tests.evaluate.two_sources import two_sources
from tests.train.real_run import ALONE, model_of
from trainer.cli.main import main
from trainer.errors import UserError
from trainer.evaluate.quality.clip_features import ClipFeatures, model_pixels
from trainer.evaluate.quality.clip_folder import read_clip_folder
from trainer.evaluate.quality.drawn_quality import QualityWish
from trainer.evaluate.quality.quality_scores import clip_scores, scores_by_clip
from trainer.evaluate.quality.set_distances import cmmd
from trainer.train.workers.eval_worker import evaluate_weights


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny", model_folder / "tokenizer")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("photos")
    write_crops(folder, 20)
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def features(count: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(count)
    return (rng.standard_normal((count, 12)) + shift).astype(np.float32)


def test_cmmd_is_the_mean_over_pairs_written_out() -> None:
    one, other = features(7), features(9, 0.4)

    def unit(row: np.ndarray) -> list[float]:
        length = math.sqrt(math.fsum(float(x) ** 2 for x in row))
        return [float(x) / length for x in row]

    def kernel(a: list[float], b: list[float]) -> float:
        return math.exp(-math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10.0**2))

    x, y = [unit(row) for row in one], [unit(row) for row in other]
    within = [math.fsum(kernel(a, b) for a, b in itertools.product(z, z)) / len(z) ** 2 for z in (x, y)]
    between = math.fsum(kernel(a, b) for a, b in itertools.product(x, y)) / 63
    assert cmmd(one, other) == pytest.approx(1000 * (within[0] + within[1] - 2 * between), abs=1e-9)
    assert cmmd(one, other) == pytest.approx(cmmd(other, one), rel=1e-9) and cmmd(one, other) > 0
    assert cmmd(one, one) == pytest.approx(0.0, abs=1e-12) and cmmd(one, 3 * one) == pytest.approx(0.0, abs=1e-9)


def test_clip_score_is_a_cosine_of_at_least_nothing() -> None:
    one = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]], dtype=np.float32)
    texts = np.array([[4.0, 3.0], [-1.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    assert clip_scores(one, texts) == pytest.approx([96.0, 0.0, 100 / math.sqrt(2)], rel=1e-12)
    scores = scores_by_clip(one, texts, texts)
    assert scores.clip_score_of_data.images == 3 and scores.clip_score_of_data.mean == pytest.approx(100.0)


def test_pixels_and_features_are_transformers_own(clip_folder: Path, images: list[Image.Image]) -> None:
    folder = read_clip_folder(clip_folder)
    sizes = {"shortest_edge": 32}, {"height": 32, "width": 32}
    theirs = CLIPImageProcessorPil(size=sizes[0], crop_size=sizes[1])
    pixels = torch.as_tensor(np.stack(theirs(images, return_tensors="np")["pixel_values"]))
    ours = torch.stack([model_pixels(image, folder) for image in images])
    torch.testing.assert_close(ours, pixels.float(), rtol=1e-5, atol=1e-5)
    model = CLIPModel.from_pretrained(clip_folder, local_files_only=True).eval()
    clip = ClipFeatures(folder, "cpu")
    texts = ["a cat", "", "the cat and the other one, " * 30]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=ours).pooler_output
        ids = torch.from_numpy(clip._tokenizer(texts)[:, 0, 0])
        of_texts = [model.get_text_features(input_ids=row[None, : list(row).index(517) + 1]) for row in ids]
    assert len(images) > 16  # more than one batch
    torch.testing.assert_close(torch.from_numpy(clip.of_images(images)), expected, rtol=1e-5, atol=1e-6)
    expected = torch.cat([output.pooler_output for output in of_texts])  # without any padding
    torch.testing.assert_close(torch.from_numpy(clip.of_texts(texts)), expected, rtol=1e-4, atol=1e-6)


def spoilt(folder: Path, place: Path, change: dict, without: str = "") -> Path:
    place.mkdir()
    for file in folder.iterdir():
        if file.name != without:
            (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **change}))
    return place


def test_what_is_no_clip_model_is_refused_in_one_line(clip_folder: Path, tmp_path: Path) -> None:
    text = json.loads((clip_folder / "config.json").read_text())["text_config"]
    cases = {
        "kind": ({"model_type": "siglip"}, "", "model_type is not `clip`"),
        "part": ({"vision_config": None}, "", "has no vision_config"),
        "size": ({"text_config": {**text, "num_hidden_layers": 10**6}}, "", "num_hidden_layers = 1000000: wanted 1 to"),
        "projection": ({"projection_dim": 2.5}, "", "projection_dim: wanted a whole number"),
        "weights": ({}, "model.safetensors", "holds no weights as safetensors"),
        "tokenizer": ({}, "vocab.json", "holds no tokenizer"),
        "short": ({"text_config": {**text, "max_position_embeddings": 20}}, "", "wanted texts of 77 tokens"),
    }
    for name, (change, without, said) in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            read_clip_folder(spoilt(clip_folder, tmp_path / name, change, without))
        assert len(caught.value.lines) == 1
    other = spoilt(clip_folder, tmp_path / "other", {"text_config": {**text, "num_hidden_layers": 1}})
    with pytest.raises(UserError, match="the CLIP model's weights hold"):
        ClipFeatures(read_clip_folder(other), "cpu")
    heads = spoilt(clip_folder, tmp_path / "heads", {"text_config": {**text, "num_attention_heads": 3}})
    with pytest.raises(UserError, match="no CLIP model can be built by it"):
        ClipFeatures(read_clip_folder(heads), "cpu")


@pytest.mark.e2e
def test_eval_scores_drawn_images(clip_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    config = two_sources(model_folder, tmp_path)
    wish = QualityWish.from_json({"clip_folder": str(clip_folder), "num_images": 6})
    older = tmp_path / "quality/64x64-2"  # of a measurement with more images
    older.mkdir(parents=True)
    (older / "000.png").touch()
    older.with_name("64x64-2.png").touch()
    evaluate_weights(config, model_of(config), ALONE, Path(str(config.model.path)), tmp_path, quality=wish)
    record = json.loads((tmp_path / "quality.json").read_text())
    assert record["images"] == 6 and record["captions_of"] == "held-out images" and record["cmmd"] > 0
    assert 0 <= record["clip_score"]["mean"] <= 100 and record["clip_score"]["plus_minus"] is not None
    drawn = sorted((tmp_path / "quality").glob("*/*.png"))
    assert len(drawn) == 6 and not older.with_name("64x64-2.png").exists()
    for path in drawn:
        with Image.open(path) as image:
            assert "{}x{}".format(*image.size) == path.parent.name
    # The same again by hand, of the files.
    clip = ClipFeatures(read_clip_folder(clip_folder), "cpu")
    assert len({row.tobytes() for row in clip.of_images([Image.open(path) for path in drawn])}) == 6


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--quality", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
