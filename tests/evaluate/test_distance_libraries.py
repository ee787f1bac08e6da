"""What torch-fidelity, clean-fid and torchmetrics make of the same images; skipped where they are not installed.

pip install --no-deps torch-fidelity clean-fid torchmetrics lightning-utilities
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.photographs import write_crops
from tests.evaluate.random_inception import write_random_inception
from trainer.evaluate.quality.feature_model import read_feature_model
from trainer.evaluate.quality.image_features import ImageFeatures, square_levels
from trainer.evaluate.quality.set_distances import frechet_distance, kid

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("photos")
    write_crops(folder, 12)
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def without_its_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """So that single modules of a package can be imported whose start wants torchvision for others."""
    found = find_spec(name)
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"{name} is not installed")
    package = ModuleType(name)
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, name, package)


def test_features_are_those_of_torch_fidelity_of_images_resized_as_clean_fid_does(
    tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_its_start(monkeypatch, "torch_fidelity")
    without_its_start(monkeypatch, "cleanfid")
    from cleanfid.resize import make_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = write_random_inception(tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    resize = make_resizer("PIL", False, "bicubic", (299, 299))
    resized = torch.stack([torch.from_numpy(resize(np.asarray(image))).permute(2, 0, 1) for image in images])
    ours = torch.stack([square_levels(image, 299) for image in images])
    torch.testing.assert_close(ours, resized, rtol=0, atol=1e-4)
    # Theirs takes whole levels, and leaves images of its own size as they are.
    whole = [Image.fromarray(np.asarray(each.permute(1, 2, 0).round().byte())) for each in ours]
    with torch.inference_mode():
        (expected,) = theirs(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in whole]))
    found = torch.from_numpy(ImageFeatures(read_feature_model(file), "cpu").of_images(whole))
    assert expected.std(dim=0).mean() > 0.01  # images differ
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_distances_are_those_of_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(4)
    mix = rng.standard_normal((24, 24)) / 5
    x, y = rng.standard_normal((300, 24)) @ mix, rng.standard_normal((300, 24)) @ mix * 1.2 + 0.1
    one, other = torch.from_numpy(x), torch.from_numpy(y)
    theirs = _compute_fid(one.mean(0), torch.cov(one.T), other.mean(0), torch.cov(other.T))
    assert frechet_distance(x, y) == pytest.approx(float(theirs), rel=1e-9)
    # Theirs counts the pair of one caption, which ours leaves out.
    kernel = (x @ y.T / 24 + 1) ** 3
    between = 2 * (kernel.mean() - (kernel.sum() - np.trace(kernel)) / (300 * 299))
    assert kid(x, y).mean == pytest.approx(float(poly_mmd(one, other)) + between, rel=1e-9)
