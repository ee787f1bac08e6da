"""A run from a single file is the run from the folder that it was made of."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.model_files.single_files import write_single_file
from tests.train.real_run import model_of, run_config, watched_run
from trainer.cli.prepare_set import prepare
from trainer.config.load import load_config, to_yaml
from trainer.model_files.examine.check import check_model


def _photos(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("the cat")
    return folder


@pytest.mark.e2e
def test_the_same_losses_from_a_file_as_from_the_folder(tmp_path: Path, model_folder: Path) -> None:
    file = write_single_file(model_folder, tmp_path / "small.safetensors")
    data = {"sources": [{"path": str(_photos(tmp_path / "photos"))}], "buckets": {"resolution": 64, "min_px": 64}}
    losses = {}
    for model in (model_folder, file):
        config = run_config(model, tmp_path / f"of-{model.name}", tmp_path / f"run-{model.name}", data, steps=2)
        config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": model_folder})})
        check_model(config.model.path, None, config.model.tokenizer)
        written = tmp_path / "config.yaml"
        written.write_text(to_yaml(config))
        assert load_config(written) == config
        assert prepare(config, model_of(config)) == 0
        losses[model] = [result.loss for result in watched_run(config).results]
    assert len(losses[file]) == 2
    # Last bits hang on where the system puts memory; tests/model_files/test_model_source.py compares the weights.
    assert losses[file] == pytest.approx(losses[model_folder], rel=1e-5)
