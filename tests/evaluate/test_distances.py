"""Fréchet's distance and KID beside closed forms, scipy's matrix root, and sums and leavings-out written out."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from transformers import Dinov2Config, Dinov2Model

from tests.data.photographs import write_crops
from tests.evaluate.random_inception import write_random_inception
from tests.test_end_to_end import config_file, photos
from tests.warm_processes import sdxl_train
from trainer.cli.main import main
from trainer.errors import UserError
from trainer.evaluate.quality import inception_file
from trainer.evaluate.quality.feature_model import read_feature_model
from trainer.evaluate.quality.image_features import ImageFeatures, square_levels
from trainer.evaluate.quality.set_distances import frechet_distance, kid

__all__ = ["config_file", "photos"]  # fixtures


def features(count: int, seed: int = 0, shift: float = 0.0, size: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000 * count)
    return rng.standard_normal((count, size)) * np.linspace(0.5, 2, size) + shift


@pytest.mark.parametrize(("counts", "size"), [((40, 50), 8), ((9, 7), 12), ((8, 40), 16), ((2, 2), 5)])
def test_frechet_is_the_formula_by_scipys_root(counts: tuple[int, int], size: int) -> None:
    """Also of fewer images than features, where both covariances are singular."""
    x, y = features(counts[0], 1, 0.2, size), features(counts[1], 2, size=size) @ np.triu(np.ones((size, size)))
    one, other = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(np.where(values > 1e-12 * values[-1], values, 0)) @ vectors.T
    squares = np.linalg.eigvalsh(root @ other @ root)  # Tr (C C')^½ = Tr (R C' R)^½, R R = C
    trace = np.sqrt(squares[squares > 1e-12 * squares[-1]]).sum()
    if min(counts) > size:
        assert trace == pytest.approx(np.trace(sqrtm(one @ other)).real, rel=1e-8)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(one) + np.trace(other) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10 * np.trace(one))


def test_frechet_of_given_means_and_covariances_is_the_closed_form() -> None:
    """Of commuting covariances: |m - m'|² + the sum of squared differences of standard deviations."""
    signs = np.array([*itertools.product((-1.0, 1.0), repeat=5)])  # mean 0, covariance 32/31 along the diagonal
    scale = math.sqrt(31 / 32)
    one, other = np.array([1, 2, 3, 4, 5.0]), np.array([2, 2, 0.5, 0, 7.0])
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))
    x, y = scale * signs * one @ turn + 3, scale * signs * other @ turn - 1
    assert frechet_distance(x, y) == pytest.approx(5 * 16 + ((one - other) ** 2).sum(), rel=1e-12)


def test_frechet_of_few_images_is_too_great_and_kid_is_not() -> None:
    def means(count: int) -> tuple[float, float]:
        draws = [(features(count, 2 * i + 1, size=6), features(count, 2 * i + 2, size=6)) for i in range(100)]
        kids = [kid(*pair).mean for pair in draws]
        assert abs(np.mean(kids)) < 4 * np.std(kids) / math.sqrt(100) and min(kids) < 0
        return float(np.mean([frechet_distance(*pair) for pair in draws])), float(np.std(kids))

    (few, _), (many, _) = means(15), means(120)
    assert few > 5 * many > 0  # both would be 0 of as many images as one likes


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return (math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3


def kid_written_out(one: np.ndarray, other: np.ndarray) -> float:
    pairs = [*itertools.permutations(range(len(one)), 2)]
    values = [kernel(one[i], one[j]) + kernel(other[i], other[j]) - kernel(one[i], other[j]) - kernel(one[j], other[i])
              for i, j in pairs]  # fmt: skip
    return math.fsum(values) / len(pairs)


def test_kid_is_the_sum_over_pairs_and_its_error_that_of_leaving_out_each() -> None:
    one, other = features(7), features(7, 3, 0.3)
    found = kid(one.astype(np.float32), other.astype(np.float32))
    one, other = one.astype(np.float32), other.astype(np.float32)
    assert found.mean == pytest.approx(kid_written_out(one, other), rel=1e-10) and found.images == 7
    left = [kid_written_out(np.delete(one, i, 0), np.delete(other, i, 0)) for i in range(7)]
    assert found.standard_error == pytest.approx(math.sqrt(6 / 7 * np.sum((left - np.mean(left)) ** 2)), rel=1e-9)
    assert kid(one[:2], other[:2]).half_width is None
    many = features(1100), features(1100, 1, 0.1)  # more than a block of the kernel's matrix
    x, y = many
    whole = [(a @ b.T / 12 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    sums = [values.sum() - np.trace(values) for values in whole]
    assert kid(*many).mean == pytest.approx((sums[0] + sums[1] - 2 * sums[2]) / (1100 * 1099), rel=1e-9)


def test_kids_interval_holds_the_value_of_all_images_and_pairs_that_are_alike_do_not_lower_it() -> None:
    rng = np.random.default_rng(8)
    size, shift, count, draws = 4, 0.6, 60, 300

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        shared = rng.standard_normal((count, size))  # what a caption says, in both of its images
        x, y = (0.8 * shared + 0.6 * rng.standard_normal((count, size)) for _ in range(2))
        return x, y + shift

    large = 40_000  # of independent images, by the moments of the two normal distributions
    x, y = rng.standard_normal((large, size)), rng.standard_normal((large, size)) + shift
    x2, y2 = rng.standard_normal((large, size)), rng.standard_normal((large, size)) + shift

    def among(a: np.ndarray, b: np.ndarray) -> float:
        # E (x y / d + 1)³ of independent x, y, by the mean tensors of degree 0 to 3.
        total = 1.0
        for degree, factor in ((1, 3), (2, 3), (3, 1)):
            letters = "abc"[:degree]
            spec = ",".join(f"i{letter}" for letter in letters) + f"->{letters}"
            means = [np.einsum(spec, *[z] * degree) / len(z) for z in (a, b)]
            total += factor * float((means[0] * means[1]).sum()) / size**degree
        return total

    truth = among(x, x2) + among(y, y2) - among(x, y2) - among(x2, y)
    held, values = 0, []
    for _ in range(draws):
        found = kid(*drawn())
        assert found.half_width is not None
        values.append(found.mean)
        held += abs(found.mean - truth) <= found.half_width
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(draws) + 0.01 * truth
    assert 0.90 * draws <= held <= draws  # 95 % are promised


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one, whose positions are stored for another size of images, as those of the published are."""
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=56, patch_size=14,
        initializer_range=0.3, layerscale_value=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dinov2") / "tiny"
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("crops")
    write_crops(folder, 18)
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def test_features_of_dinov2_are_transformers_own(dinov2: Path, images: list[Image.Image]) -> None:
    model = Dinov2Model.from_pretrained(dinov2, local_files_only=True).eval()
    levels = torch.stack([square_levels(image, 224) for image in images])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = (levels / 255 - mean[:, None, None]) / std[:, None, None]
        expected = model(pixels).last_hidden_state[:, 0]
    read = read_feature_model(dinov2)
    assert (read.kind, read.score, read.features, len(images)) == ("dinov2", "FD-DINOv2", 24, 18)  # two batches
    found = torch.from_numpy(ImageFeatures(read, "cpu").of_images(images))
    assert expected.std(dim=0).mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_are_squeezed_and_shrunk_without_aliases() -> None:
    stripes = np.zeros((598, 1196, 3), dtype=np.uint8)
    stripes[:, ::2] = (200, 100, 40)  # a pixel wide: shrunk to a quarter, an even surface
    levels = square_levels(Image.fromarray(stripes), 299)
    assert levels.shape == (3, 299, 299)
    inner = levels[:, 5:-5, 5:-5]
    torch.testing.assert_close(inner, torch.tensor([100.0, 50, 20])[:, None, None].expand_as(inner), rtol=0, atol=1.0)


@pytest.mark.e2e
def test_inception_is_read_from_every_form_of_its_file(
    inception: Path, tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(inception, weights_only=True)
    old, plain, counted = tmp_path / "old.pth", tmp_path / "plain.safetensors", tmp_path / "counted.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    save_file(state, plain)
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in state if "_mean" in name
    }
    torch.save(state | counters, counted)
    found = [ImageFeatures(read_feature_model(file), "cpu").of_images(images[:3])
             for file in (inception, old, plain, counted)]  # fmt: skip
    assert found[0].shape == (3, 2048) and found[0].std(axis=0).mean() > 0.01
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert read_feature_model(old).score == "FID of other Inception weights"
    # The checksum of this test's file in place of the published one's.
    monkeypatch.setattr(inception_file, "PUBLISHED_SHA256", hashlib.sha256(old.read_bytes()).hexdigest()[:8])
    assert read_feature_model(old).score == "FID" and not read_feature_model(plain).published


@pytest.mark.e2e
def test_what_is_no_such_model_is_one_line(inception: Path, dinov2: Path, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as told:
            ImageFeatures(read_feature_model(path), "cpu")
        assert len(told.value.lines) == 1
        return told.value.lines[0]

    assert "no such file or folder; wanted FID's Inception weights (pt_inception-" in said(tmp_path / "none.pth")
    state = torch.load(inception, weights_only=True)
    file = tmp_path / "wrong.pth"

    def wrong(change: dict[str, torch.Tensor | None]) -> str:
        torch.save({name: tensor for name, tensor in (state | change).items() if tensor is not None}, file)
        return said(file)

    assert "fc.weight has shape [1000, 2048], and FID's network [1008, 2048]" in wrong(
        {"fc.weight": torch.zeros(1000, 2048)}
    )
    assert "holds no Mixed_7c.branch_pool.bn.running_var" in wrong({"Mixed_7c.branch_pool.bn.running_var": None})
    assert "weights lack 1 tensors" in wrong({"Mixed_6d.branch1x1.conv.weight": None})
    assert "weights hold 1 tensors" in wrong({"AuxLogits.conv0.conv.weight": torch.zeros(2)})
    assert "Mixed_5d.branch_pool.conv.weight has shape [64]" in wrong(
        {"Mixed_5d.branch_pool.conv.weight": torch.zeros(64)}
    )
    assert "NaN or infinite" in wrong({"Mixed_5c.branch1x1.bn.bias": torch.full((64,), math.nan)})
    torch.save({"weight": torch.zeros(3)}, file)
    assert "no Inception weights: holds no Conv2d_1a_3x3.conv.weight" in said(file)
    file.write_bytes(b"hello")
    assert "is no checkpoint" in said(file)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((dinov2 / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": "vit"}, "model_type is `vit`, not `dinov2`"),
        ({"patch_size": 13}, "a patch_size that divides 224"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: wanted 1 to"),
        ({"hidden_act": "none"}, "no DINOv2 model can be built by it"),
        ({"num_hidden_layers": 1}, "the DINOv2 model's weights hold"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert words in said(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    assert "holds no weights as safetensors" in said(folder)


@pytest.mark.e2e
def test_eval_tells_fid_and_kid_of_drawn_images(
    inception: Path, dinov2: Path, tmp_path: Path, config_file: Path
) -> None:
    """By the command, on two workers and on one: the same images, the same values."""
    run_dir = tmp_path / "run"
    sdxl_train(config_file, f"run.dir={run_dir}", "train.steps=2")
    records = []
    for workers, out in ((2, tmp_path / "two"), (1, tmp_path / "one")):
        done = sdxl_train("eval", run_dir, "--fid", dinov2, "--quality-images", 5, "--out", out, "samples.steps=2",
                          "samples.count=1", f"launch.workers={workers}")  # fmt: skip
        records.append(record := json.loads((out / "quality.json").read_text()))
        kid_of = record["kid_of_dinov2_features"]
        count, kid_told = record["images"], f"{kid_of['mean']:.5f} ± {kid_of['plus_minus']:.5f}"
        told = f"FD-DINOv2 {record['fd_dinov2']:.3f} of {count} and {count} images; KID of DINOv2 features {kid_told}"
        assert told in done.stderr
        assert "no more than its 24 features, is far too great" in done.stderr
        drawn = [Image.open(path).convert("RGB") for path in sorted((out / "quality").glob("*/*.png"))]
        assert len(drawn) == record["images"] > 2 and "clip_score" not in record
    assert records[0]["fd_dinov2"] == pytest.approx(records[1]["fd_dinov2"], rel=1e-4)
    assert records[0]["fd_dinov2"] > 0
    done = sdxl_train("eval", run_dir, "--fid", inception, "--quality-images", 3, "samples.steps=1", "samples.count=1")
    record = json.loads((run_dir / "eval/step-00000002/quality.json").read_text())
    assert record["feature_model"] == str(inception) and record["features"] == 2048
    assert record["fid_of_other_inception"] > 0 and "is not the file that FID is defined by" in done.stderr


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--fid", "nowhere.pth"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
