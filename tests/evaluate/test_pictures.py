from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from trainer.evaluate.pictures import GridRow, image_grid, loss_curve_png

TIMESTEPS = (100, 300, 500, 700, 900)


def fake_metrics(num_steps: int) -> list[dict]:
    rng = np.random.default_rng(0)
    records: list[dict] = []
    for step in range(1, num_steps + 1):
        loss = 0.3 + 0.6 * np.exp(-step / 100) + 0.1 * rng.standard_normal()
        records.append({"kind": "train", "step": step, "loss": float(loss), "lr": 1e-4})
        if step == 1 or step % 100 == 0:
            by_timestep = {f"loss_t{t}": float((1 - t / 1000) * (0.5 + np.exp(-step / 100))) for t in TIMESTEPS}
            records.append({"kind": "validation", "step": step, "loss": 0.4, **by_timestep})
    return records


def photographs() -> list[Image.Image]:
    return [Image.fromarray(array()) for array in (data.astronaut, data.chelsea, data.coffee, data.camera)]


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param(fake_metrics(300), id="a run"),
        pytest.param(fake_metrics(1), id="one step"),
        pytest.param([], id="no step"),
        pytest.param([record for record in fake_metrics(50) if record["kind"] == "train"], id="no validation"),
        pytest.param([{"kind": "validation", "step": 0, "loss": 0.5}], id="validation alone"),
        pytest.param([{"kind": "train", "step": 1, "loss": None}, {"kind": "samples", "step": 1}], id="no number"),
    ],
)
def test_any_run_has_a_loss_curve(tmp_path: Path, metrics: list[dict]) -> None:
    loss_curve_png(metrics, tmp_path / "loss.png", "runs/tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    with Image.open(tmp_path / "loss.png") as picture:
        panels = 2 if any("loss_t100" in record for record in metrics) else 1
        assert picture.size == (1080, 864 if panels == 2 else 576)


def test_a_wild_step_leaves_the_curve_readable(tmp_path: Path) -> None:
    calm = [{**record, "loss": 0.5} for record in fake_metrics(400) if record["kind"] == "train"]
    wild = [*calm[:200], {**calm[200], "loss": 1e6}, *calm[201:]]
    for name, metrics in (("calm", calm), ("wild", wild)):
        loss_curve_png(metrics, tmp_path / f"{name}.png", "run")
    blue = {name: np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("calm", "wild")}
    rows = {name: np.where((pixels == (0x2F, 0x6F, 0xB5)).all(-1))[0] for name, pixels in blue.items()}
    assert np.median(rows["wild"]) < 500  # not pressed to the bottom axis


def test_rows_share_their_columns(tmp_path: Path) -> None:
    red, green = Image.new("RGB", (64, 32), "#ff0000"), Image.new("RGB", (640, 640), "#00ff00")
    rows = [GridRow("generated", [red, green], ["a", "b"]), GridRow("data", [green, red])]
    image_grid(rows, tmp_path / "grid.png", "a run", cell_px=100)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert pixels.shape[1] == 20 + 100 + 10 + 100 + 20
    boxes = []
    for colour in ((255, 0, 0), (0, 255, 0)):
        for columns in (slice(20, 120), slice(130, 230)):
            at_rows, at_columns = np.where((pixels[:, columns] == colour).all(-1))
            boxes.append((np.ptp(at_columns) + 1, np.ptp(at_rows) + 1))
    assert boxes == [(100, 50), (100, 50), (100, 100), (100, 100)]
    gaps = np.r_[0:20, 120:130, 230:250]
    below_the_title = slice(100, 200)
    assert (pixels[below_the_title, gaps] == 255).all()


def test_long_rows_go_on_below(tmp_path: Path) -> None:
    images = [image.resize((32, 32)) for image in photographs()] * 3
    rows = [GridRow("generated", images), GridRow("data", images[:3])]
    image_grid(rows, tmp_path / "wide.png", cell_px=64, max_columns=12)
    image_grid(rows, tmp_path / "narrow.png", cell_px=64, max_columns=4)
    with Image.open(tmp_path / "wide.png") as wide, Image.open(tmp_path / "narrow.png") as narrow:
        assert narrow.width == 2 * 20 + 4 * 74 - 10
        assert wide.height < narrow.height < 3 * wide.height


def test_captions_of_any_length_and_script(tmp_path: Path) -> None:
    captions = ["", "a tabby cat", "a cup of coffee, " * 40, "кот" * 100]
    image_grid([GridRow("data", photographs(), captions)], tmp_path / "grid.png", cell_px=96)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width == 2 * 20 + 4 * 106 - 10
        assert picture.height < 250  # three lines of caption at most


def test_an_empty_grid_is_still_a_picture(tmp_path: Path) -> None:
    image_grid([], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
