"""The tiny SDXL, its VAE and the photographs that come with it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cli.commands.make_tiny import main
from trainer.errors import UserError
from trainer.model_files.clip_tokenizer import write_clip_tokenizer
from trainer.model_files.examine.check import check_model
from trainer.tiny import photos
from trainer.tiny.tiny_model import write_tiny_model
from trainer.tiny.tiny_vae import SCALING_FACTOR, make_tiny_vae, reconstruction_psnr, train_tiny_vae


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos.write_photos(folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def images(photo_folder: Path) -> list[np.ndarray]:
    names = ("flower-landscape", "astronaut-square", "coffee-portrait")
    return [_pixels(photo_folder / f"{name}.jpg") for name in names]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
def test_diffusers_draws_with_the_tiny_model(tiny_folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder, local_files_only=True)
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 256
    assert pipeline.unet.config["transformer_layers_per_block"] == [1, 2, 10]
    assert pipeline.vae.config["scaling_factor"] == SCALING_FACTOR
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a cat", num_inference_steps=1, height=64, width=64).images[0]
    assert image.size == (64, 64)


@pytest.mark.e2e
def test_the_tiny_model_passes_our_own_check(tiny_folder: Path) -> None:
    check_model(tiny_folder)


def test_the_tokenizers_give_clips_ids(tiny_folder: Path) -> None:
    from transformers import CLIPTokenizer

    for name, pad_id in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / name, local_files_only=True)
        ids = tokenizer("a photo of a cat", padding="max_length", max_length=77)["input_ids"]
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad_id] * 70
        assert len(tokenizer) == 49408


def test_what_captions_have_in_common_is_taken_off(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    captions = [f"a square photograph of {photo.subject}" for photo in photos.PHOTOS]
    write_tiny_model(tmp_path / "plain")
    write_tiny_model(tmp_path / "centred", captions=captions)
    shares = {}
    for name in ("plain", "centred"):
        folder = tmp_path / name
        one = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True)
        outputs = []
        for encoder, tokenizer_name in ((one, "tokenizer"), (two, "tokenizer_2")):
            tokenizer = CLIPTokenizer.from_pretrained(folder / tokenizer_name, local_files_only=True)
            ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                output = encoder(ids, output_hidden_states=True)
            outputs.append(output.hidden_states[-2][:, 1:].mean(dim=1))
        outputs.append(output.text_embeds)
        shares[name] = [(x.mean(dim=0).square().sum() / x.square().sum(dim=1).mean()).item() for x in outputs]
    assert min(shares["plain"]) > 0.5
    assert max(shares["centred"]) < 1e-3


def test_a_missing_vocabulary_is_one_line_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError) as error:
        write_clip_tokenizer(tmp_path / "tokenizer", "!")
    assert error.value.lines == (
        "package open_clip_torch is not installed; run: pip install --no-deps open_clip_torch",
    )


def test_all_missing_photographs_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("skimage", "sklearn", "matplotlib"):  # other tests may have imported them
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(UserError) as error:
        photos.write_photos(tmp_path, show_progress=False)
    assert [line.split()[1] for line in error.value.lines] == ["scikit-image", "scikit-learn", "matplotlib"]


def test_photographs_are_many_varied_and_captioned(photo_folder: Path) -> None:
    paths = sorted(photo_folder.glob("*.jpg"))
    assert len(paths) == 3 * len(photos.PHOTOS) >= 18
    captions = {path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths}
    assert len(captions) == len(paths)
    sizes = [_pixels(path).shape[1::-1] for path in paths]
    assert set(sizes) == {(256, 256), (320, 192), (192, 320)}  # twice the buckets of configs/tiny.yaml
    for photo in photos.PHOTOS:
        assert f"`{photo.name}-*.jpg`" in (photo_folder / "ORIGIN.md").read_text(encoding="utf-8")
        assert list(photo_folder.glob(f"{photo.name}-*.jpg"))


@pytest.mark.e2e
def test_a_few_steps_improve_the_vae_and_repeat_exactly(images: list[np.ndarray]) -> None:
    one = images[:1]
    before = reconstruction_psnr(make_tiny_vae(0), one)
    assert before > 18  # the linear start: blurred, in the right colours
    assert reconstruction_psnr(train_tiny_vae(one, 40, seed=0, show_progress=False), one) > before + 0.3
    vae = train_tiny_vae(images, 2, seed=0, show_progress=False)
    again = train_tiny_vae(images, 2, seed=0, show_progress=False).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in vae.state_dict().items())


@pytest.mark.e2e
def test_scaled_latents_have_unit_variance_and_decode_as_before(images: list[np.ndarray]) -> None:
    vae = train_tiny_vae(images, 0, seed=0, show_progress=False)
    assert abs(reconstruction_psnr(vae, images) - reconstruction_psnr(make_tiny_vae(0), images)) < 1e-3
    with torch.no_grad():
        pixels = [torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in images[:1]]
        posteriors = [vae.encode(p[..., : p.shape[2] // 8 * 8, : p.shape[3] // 8 * 8]).latent_dist for p in pixels]
    latents = torch.cat([posterior.mean[0].flatten(1) for posterior in posteriors], dim=1) * SCALING_FACTOR
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(4), atol=1e-3, rtol=0)
    variances = torch.cov(latents).diag()
    torch.testing.assert_close(torch.cov(latents), variances.diag(), atol=1e-3, rtol=0)
    torch.testing.assert_close(variances.mean(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.e2e
def test_the_command_makes_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(photo for photo in photos.PHOTOS if photo.name in ("coffee", "flower"))
    monkeypatch.setattr(photos, "PHOTOS", few)
    arguments = ["--out", str(tmp_path / "tiny"), "--vae-steps", "0"]
    assert main(arguments) == 0
    check_model(tmp_path / "tiny" / "model")
    made = json.loads((tmp_path / "tiny" / "made.json").read_text())
    assert made["model"]["vae_steps"] == 0
    weights = tmp_path / "tiny" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights.stat()
    assert main(arguments) == 0
    assert weights.stat().st_mtime_ns == first.st_mtime_ns
    assert main([*arguments, "--seed", "1"]) == 0
    assert weights.stat().st_ino != first.st_ino
    assert "made anew" in capsys.readouterr().out


def test_the_command_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="was not made by make-tiny"):
        main(["--out", str(tmp_path)])
