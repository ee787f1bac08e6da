"""One sheet of what a run has drawn over its steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.cli.main import main
from trainer.evaluate.drawing import timeline
from trainer.evaluate.drawing.infotext import infotext, png_text
from trainer.evaluate.drawing.timeline import timeline_sheet
from trainer.evaluate.pictures import GridRow


def drawing(samples: Path, step: int, colours: dict[str, str], average: str = "") -> None:
    """An image of one colour for each prompt, as the training leaves it."""
    folder = samples / (f"step-{step:08d}" + (f"-{average}" if average else ""))
    folder.mkdir(parents=True)
    for place, (prompt, colour) in enumerate(colours.items()):
        settings: dict[str, object] = {"Steps": 2, "Sampler": "Euler", "Seed": 7, "Size": "64x64"}
        image = Image.new("RGB", (64, 64), colour)
        image.save(folder / f"{place:02d}.png", pnginfo=png_text(infotext(prompt, "", settings)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    samples = tmp_path / "foxes" / "samples"
    drawing(samples, 10, {"a fox": "#ff0000", "a cat": "#00ff00"})
    drawing(samples, 20, {"a cat": "#00ff00", "a fox": "#0000ff"})
    drawing(samples, 20, {"a fox": "#ffff00"}, "ema")
    drawing(samples / "drawn", 20, {"a dog": "#ff00ff"})
    (samples / "step-00000020" / "05.png").write_bytes(b"no image")
    return tmp_path / "foxes"


def colours_at(sheet: Path) -> list[tuple[tuple[int, int, int], int]]:
    """The pure colours of a sheet with their column, row by row."""
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = []
    for y in range(0, len(pixels), 40):
        for column in range(2):
            x = 20 + column * (timeline._CELL_PX + 10) + 96
            colour = tuple(map(int, pixels[y, min(x, pixels.shape[1] - 1)]))
            if set(colour) <= {0, 255} and 0 in colour and 255 in colour and (colour, column) not in found:
                found.append((colour, column))
    return found


def test_prompts_are_rows_and_steps_are_columns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the newest drawing's order; an image belongs to its prompt wherever it stood."""
    assert main(["sample", str(run), "--timeline"]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'samples/timeline.png'}\n"
    assert colours_at(run / "samples/timeline.png") == [
        ((0, 255, 0), 0),
        ((0, 255, 0), 1),
        ((255, 0, 0), 0),
        ((0, 0, 255), 1),
    ]
    (run / "checkpoints/step-00000020").mkdir(parents=True)
    assert main(["sample", str(run / "checkpoints/step-00000020"), "--timeline", "--weights", "ema"]) == 0
    assert colours_at(run / "samples/timeline-ema.png") == [((255, 255, 0), 0)]


def test_of_many_steps_some_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 31):
        drawing(tmp_path / "samples", step, {"a fox": "#ff0000"} | ({"late": "#00ff00"} if step == 30 else {}))
    rows: list[GridRow] = []
    drawn = timeline.image_grid
    monkeypatch.setattr(timeline, "image_grid", lambda given, *a, **k: (rows.extend(given), drawn(given, *a, **k)))
    out = tmp_path / "sheet.png"
    assert timeline_sheet(tmp_path / "samples", "foxes", out=out) == out and out.is_file()
    steps = [3, 6, 8, 11, 14, 16, 19, 22, 24, 27]
    assert rows[0].captions == [f"step {step}" for step in (1, *steps, 30)]
    assert rows[1].captions == [""] * 11 + ["step 30"] and rows[1].label == "late  ·  seed 7  ·  64x64"


def test_images_that_say_nothing_go_by_their_names(tmp_path: Path) -> None:
    for step, colour in ((1, "#ff0000"), (2, "#0000ff")):
        folder = tmp_path / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(folder / "00.png")
    sheet = timeline_sheet(tmp_path / "samples", "foxes")
    assert colours_at(sheet) == [((255, 0, 0), 0), ((0, 0, 255), 1)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeline", "--prompt", "a cat"], "--timeline with --prompt: has no effect; it shows what the training"),
        (["--timeline", "samples.steps=3"], "--timeline with overrides: has no effect"),
        (["--timeline", "--weights", "slow"], "holds nothing that was drawn while training by the average slow"),
        (["--timeline", "--out", "{}/none/sheet.png"], "none/sheet.png: could not be written: No such file"),
    ],
)
def test_what_cannot_be_shown_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["sample", str(run), *(argument.format(run) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path), "--timeline"]) == 2
    assert "no run directory with samples" in capsys.readouterr().err
