"""First configurations: what is found, what comes out for which cards, and that `plan` takes it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trainer.cli.first.first_config import Aim, Wanted, first_config
from trainer.cli.first.found_images import look_at
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "photos"
    folder.mkdir()
    for number in range(7):
        Image.new("RGB", (64, 64), (number, 90, 40)).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("a photograph")
    return folder


@pytest.mark.parametrize("aim", ["full", "lora", "word"])
@pytest.mark.parametrize(
    ("cards", "gib"), [(0, 24), (1, 6), (1, 8), (1, 12), (1, 16), (1, 24), (2, 24), (4, 24), (8, 48)]
)
def test_every_machine_gets_a_right_configuration(photos: Path, aim: Aim, cards: int, gib: float) -> None:
    wanted = Wanted(aim, "sdxl.safetensors", look_at(photos), Path("runs/mine"), cards, gib, word="<my-cat>")
    config = Config.model_validate(first_config(wanted))
    assert broken_rules(config) == []
    assert (config.adapter.kind == "lora") == (aim == "lora") and bool(config.new_tokens.tokens) == (aim == "word")
    batch = config.train.global_batch_size or config.train.batch_size_per_gpu * max(cards, 1)
    steps = config.train.epochs * -(-7 // batch)  # as many as there are at least, whatever the buckets
    assert config.lr_schedule.warmup_steps <= steps / 10 and config.samples.every_steps <= steps / 10
    many = first_config(replace(wanted, images=replace(wanted.images, images=10**6)))
    assert many["lr_schedule"]["warmup_steps"] >= config.lr_schedule.warmup_steps > 0
    assert many["samples"]["every_steps"] in (0, 500, 2000)
    if aim == "full" and cards == 4:
        assert config.trainable.text_encoder_1.train and config.train.precision == "bf16"
    if aim == "full" and (cards, gib) == (1, 16):
        assert config.memory.release_gradients and config.memory.budget == "15.5GiB"
    if aim == "lora" and cards:
        assert config.model.frozen_weights == {6: "nf4", 8: "int8"}.get(int(gib), "compute")


def test_what_is_found(photos: Path, tmp_path: Path) -> None:
    found = look_at(photos)
    assert found.images == 7 and found.told == "7 images, 7 .txt files beside them"
    for folder, source in (("10_cat", {"kohya_repeats": True}), ("plain", {})):
        shutil.copytree(photos, tmp_path / folder / folder)
        assert look_at(tmp_path / folder).source == {"path": str(tmp_path / folder), **source}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    assert look_at(tmp_path / "tars").source["type"] == "webdataset"
    (tmp_path / "meta.json").write_text("{}")
    assert look_at(tmp_path / "meta.json").source["type"] == "kohya_json"
    (tmp_path / "empty").mkdir()
    for place, said in (("empty", "holds no images"), ("plane", r"no such folder of .*; did you mean `.*/plain`\?")):
        with pytest.raises(UserError, match=said):
            look_at(tmp_path / place)


def test_the_command(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["init", str(photos), "--model", "sdxl.safetensors"]
    assert main([*words, "--train", "lora", "--resolution", "512"]) == 0
    told = capsys.readouterr().out
    assert "cards:  none" in told and "wrote photos.yaml; next: sdxl-train plan photos.yaml" in told
    config = load_config(tmp_path / "photos.yaml", check_paths=False)
    assert config.data.buckets.resolution == 512 and config.train.epochs == 100
    assert "# a small addition that trains in place of the model" in (tmp_path / "photos.yaml").read_text()
    for arguments, said in (
        ([*words, "--train", "lora"], "photos.yaml: exists; give another name with -o, or --overwrite"),
        ([*words, "--overwrite"], "--train: missing, and there is nobody to ask for what is to be trained"),
        ([*words, "--train", "word", "--overwrite"], "--word: missing"),
        ([*words, "--train", "lora", "--word", "x", "--overwrite"], "--word: belongs to --train word"),
        ([*words, "--train", "lora", "--resolution", "500", "--overwrite"], "data.buckets.resolution = 500"),
        (["init", str(photos), "--train", "lora", "--overwrite"], "--model: missing"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert load_config(tmp_path / "photos.yaml", check_paths=False) == config, "a mistake leaves the file as it was"
    answers = iter(["nonsense", "word", "sdxl.safetensors", "<my-cat>"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda asked: next(answers))
    assert main(["init", str(photos), "-o", "asked.yaml", "--cards", "1", "--card-gib", "12"]) == 0
    asked = load_config(tmp_path / "asked.yaml", check_paths=False)
    assert asked.new_tokens.tokens[0].token == "<my-cat>" and not asked.trainable.unet.train
