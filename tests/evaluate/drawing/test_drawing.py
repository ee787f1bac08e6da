"""Drawings of real runs: what lies on the disk, by whom it was drawn, and that none mixes with another."""

import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.small_set import write_small_set
from tests.evaluate.drawing.drawn_run import IMAGES, drawn_config
from tests.train.real_run import ALONE, model_of
from tests.worker_group import run_group
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.evaluate.drawing.infotext import read_infotext
from trainer.evaluate.drawing.places import drawings_of, fresh_folder
from trainer.evaluate.drawing.wanted_pictures import dealt_out
from trainer.evaluate.scoring import Scorer
from trainer.parallel.comm import FailedBeside
from trainer.train.build import load_denoiser, make_scorer

SCRIPT = Path(__file__).parent / "shared_drawing_script.py"
STRATEGIES = ("ddp", "zero2", "zero3")
Scoring = Callable[..., Scorer]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("drawing") / "prepared", {Bucket(64, 64): 12})


@pytest.fixture
def scoring(model_folder: Path, prepared: Path, tmp_path: Path) -> Scoring:
    """A scorer of the model as it is; sections are changed by keyword."""

    def make(**sections: dict[str, Any]) -> Scorer:
        config: Config = drawn_config(model_folder, prepared, tmp_path / "run", **sections)
        model, data = model_of(config), PreparedSet.open(prepared)
        denoiser = load_denoiser(config, model, model_folder, "live", data, ALONE.device)
        return make_scorer(config, model, ALONE, denoiser, data)

    return make


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_image_says_how_it_was_drawn(scoring: Scoring, tmp_path: Path) -> None:
    sheet = scoring().draw(tmp_path / "run/samples/step-00000120-ema", "step-00000120-ema")
    assert names(tmp_path / "run") == [
        "samples/step-00000120-ema.png",
        *(f"samples/step-00000120-ema/0{i}.png" for i in range(5)),
    ]
    told = []
    for i in range(5):
        with Image.open(sheet.with_suffix("") / f"0{i}.png") as image:
            told.append(read_infotext(image.info["parameters"]))
            assert told[-1].settings["Size"] == "{}x{}".format(*image.size)
    assert [each.prompt for each in told] == [image["prompt"] for image in IMAGES]
    assert [each.settings["Seed"] for each in told] == ["1", "2", "3", "4", "24"]
    assert [each.settings["Steps"] for each in told] == ["2", "4", "2", "2", "2"]
    assert [each.settings["Sampler"] for each in told] == ["Euler", "Euler a", "Euler", "DPM++ 2M Karras", "DDIM"]
    assert [each.settings["CFG scale"] for each in told] == ["6.0"] * 4 + ["1.0"]
    assert [each.negative_prompt for each in told] == ["", "", "the cat", "", ""]
    assert told[2].settings["Size"] == "96x64" and {each.settings["Model"] for each in told} == {
        "run-step-00000120-ema"
    }
    with Image.open(sheet) as image:
        assert read_infotext(image.info["parameters"]) == told[0]  # as A1111's grids


def test_an_image_hangs_on_its_settings_alone(scoring: Scoring, tmp_path: Path) -> None:
    scorer = scoring()
    scorer.draw(tmp_path / "all", "step-00000000")
    for i in (1, 3):
        alone = replace(scorer, samples=scorer.samples.model_copy(update={"images": [scorer.samples.images[i]]}))
        alone.draw(tmp_path / f"only-{i}", "step-00000000")
        np.testing.assert_array_equal(pixels(tmp_path / f"only-{i}/00.png"), pixels(tmp_path / f"all/0{i}.png"))
    images = [scorer.samples.images[1].model_copy(update={"seed": 5})]
    replace(scorer, samples=scorer.samples.model_copy(update={"images": images})).draw(tmp_path / "seed", "x")
    assert (pixels(tmp_path / "seed/00.png") != pixels(tmp_path / "all/01.png")).any()


def test_a_drawing_takes_the_place_of_an_older_one_as_a_whole(scoring: Scoring, tmp_path: Path) -> None:
    folder, scorer = tmp_path / "samples" / "step-00000120", scoring()
    scorer.draw(folder, "step-00000120")
    partial = folder.with_name(".step-00000120.partial")
    partial.mkdir()
    (partial / "09.png").write_bytes(b"of a drawing that was interrupted")
    fewer = replace(scorer, samples=scorer.samples.model_copy(update={"images": scorer.samples.images[1:3]}))
    fewer.draw(folder, "step-00000120")
    assert names(tmp_path / "samples") == ["step-00000120.png", "step-00000120/00.png", "step-00000120/01.png"]
    assert not partial.exists()


def test_a_drawing_that_fails_leaves_the_older_one(scoring: Scoring, tmp_path: Path) -> None:
    folder, scorer = tmp_path / "samples" / "step-00000120", scoring()
    scorer.draw(folder, "step-00000120")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name.startswith("samples/")}
    images = [*scorer.samples.images[1:3], scorer.samples.images[0].model_copy(update={"width_px": 100})]
    wrong = replace(scorer, samples=scorer.samples.model_copy(update={"images": images}))
    with pytest.raises(FailedBeside, match="samples of 100 x 64 px"):
        wrong.draw(folder, "step-00000120")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_drawings_by_hand_never_mix(scoring: Scoring, tmp_path: Path) -> None:
    scorer = scoring(samples={"images": IMAGES[:1]})
    sheets = [scorer.draw(tmp_path / "drawn/step-1.5", "x", keep_older=True) for _ in range(3)]
    assert [sheet.name for sheet in sheets] == ["step-1.5.png", "step-1.5-2.png", "step-1.5-3.png"]
    assert all(names(sheet.with_name(sheet.name.removesuffix(".png"))) == ["00.png"] for sheet in sheets)
    assert fresh_folder(tmp_path / "drawn/other") == tmp_path / "drawn/other"


def test_both_ways_are_two_files(scoring: Scoring, tmp_path: Path) -> None:
    scoring(samples={"images": IMAGES[:2], "unconditional": "both"}).draw(tmp_path / "both", "x")
    found = names(tmp_path / "both")
    assert found == ["00-empty_text.png", "00-zeros.png", "01-empty_text.png", "01-zeros.png"]
    told = []
    for name in found[:2]:
        with Image.open(tmp_path / "both" / name) as image:
            told.append(read_infotext(image.info["parameters"]).settings.get("Unconditional"))
    assert told == [None, "zeros"]


@pytest.mark.parametrize("join", ["a1111", "kohya"])
def test_long_prompts_are_cut_as_in_training(
    scoring: Scoring, tmp_path: Path, caplog: pytest.LogCaptureFixture, join: str
) -> None:
    """75 words of one letter fill a chunk of the tiny tokenizer."""
    long, other = "x " * 80 + "a cat", "x " * 80 + "the hat"
    shown: dict[str, np.ndarray] = {}
    for chunks in (1, 2):
        samples = {"images": [], "prompts": [long, other], "seed": 0}
        scorer = scoring(captions={"max_tokens": 75 * chunks, "chunks": join}, samples=samples)
        scorer.draw(tmp_path / str(chunks), "x")
        for i in range(2):
            shown[f"{chunks}{i}"] = pixels(tmp_path / f"{chunks}/0{i}.png").astype(int)
        assert scorer._text_encoders.join == join  # as the captions' chunks are joined
    told = [record.getMessage() for record in caplog.records if "max_tokens" in record.getMessage()]
    assert told == ["samples: prompts are cut to captions.max_tokens = 75; prompt 1 has 82, 2 has 83 tokens"]
    # What stands beyond the first chunk is seen with two chunks alone; the seeds differ.
    one = scoring(captions={"max_tokens": 75}, samples={"images": [{"prompt": other, "seed": 0}], "prompts": []})
    one.draw(tmp_path / "one", "x")
    np.testing.assert_array_equal(pixels(tmp_path / "one/00.png"), shown["10"])
    two = scoring(
        captions={"max_tokens": 150, "chunks": join}, samples={"images": [{"prompt": other, "seed": 0}], "prompts": []}
    )
    two.draw(tmp_path / "two", "x")
    assert (pixels(tmp_path / "two/00.png") != shown["20"]).any()


def test_work_is_dealt_out_evenly() -> None:
    assert dealt_out([1] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert dealt_out([1, 1], 4) == [0, 1]
    assert dealt_out([], 4) == []
    costs = [9, 1, 1, 1, 5, 4, 3]
    ranks = dealt_out(costs, 3)
    load = [sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == worker) for worker in range(3)]
    assert max(load) == 9 and min(load) >= 7


def test_drawings_are_found_by_step_and_weights(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-00000009", "step-00000010-ema", "step-00000010-2.5", "step-x", "drawn"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").touch()
    assert [each.step for each in drawings_of(tmp_path)] == [9, 10]
    assert [each.folder.name for each in drawings_of(tmp_path, "ema")] == ["step-00000010-ema"]


@pytest.mark.e2e
def test_workers_that_share_the_model_draw_what_one_draws(
    scoring: Scoring, model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    """Three workers: five images of different cost, then two, so that one of them has none."""
    scoring().draw(tmp_path / "alone", "step-00000000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SDXL_TRAIN_DEVICE": "cpu"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(model_folder), str(prepared), *STRATEGIES]
    run_group([command] * 3, [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)], tmp_path)
    for strategy in STRATEGIES:
        for folder, count in (("drawn", 5), ("fewer", 2)):
            assert names(tmp_path / strategy / folder) == [f"0{i}.png" for i in range(count)]
            for i in range(count):
                ours, theirs = (pixels(tmp_path / place / f"0{i}.png") for place in ("alone", f"{strategy}/{folder}"))
                difference = np.abs(ours.astype(int) - theirs)
                assert difference.max() <= 1 and (difference > 0).mean() < 3e-3, (strategy, folder, i)
        drew = [json.loads((tmp_path / strategy / f"rank-{rank}.json").read_text()) for rank in range(3)]
        assert [len(own) for own in drew] == [2, 3, 2]
