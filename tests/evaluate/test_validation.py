"""Validation image by image: beside an independent computation, by one worker and by three, and what it is told to
cost."""

import json
import logging
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from scipy import stats

from tests.evaluate.two_sources import TIMESTEPS, two_sources
from tests.train.real_run import ALONE, model_of, watched_run
from tests.worker_group import run_group, worker_environments
from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.data.store.rows import Rows
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.evaluate.scoring import Scorer
from trainer.evaluate.validating.paired import read_losses
from trainer.evaluate.validating.scored_images import by_bucket, by_source, by_timestep, images_of
from trainer.evaluate.validating.scored_rows import training_rows
from trainer.evaluate.validating.validation_clock import ValidationClock
from trainer.evaluate.validating.validation_result import ValidationResult, as_record, record_values, table, told_loss
from trainer.keyed import draw_seed
from trainer.measure.telemetry import read_metrics
from trainer.model.denoiser import text_arguments
from trainer.train.build import load_denoiser, make_scorer
from trainer.train.workers.eval_worker import evaluate_weights

SCRIPT = Path(__file__).parent / "validate_script.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-sources")


def scorer_of(config: Config) -> Scorer:
    prepared, model = PreparedSet.open(config.data.prepared), model_of(config)
    denoiser = load_denoiser(config, model, Path(str(config.model.path)), LIVE, prepared, ALONE.device)
    return make_scorer(config, model, ALONE, denoiser, prepared)


def losses_by_hand(scorer: Scorer, split: str) -> dict[str, tuple[str, str, list[float]]]:
    """Of every image of a split, one at a time: its source, bucket, and loss at each timestep, by diffusers."""
    prepared, found = scorer.prepared, {}
    for bucket_index, bucket in enumerate(prepared.buckets(split)):
        for row in range(prepared.rows_per_bucket(split)[bucket_index]):
            rows = prepared.read(split, bucket_index, np.array([row]))
            shape = f"{bucket.width_px}x{bucket.height_px}"
            found[rows.keys[0]] = (rows.keys[0].split("/")[0], shape, losses_of_row(scorer, rows))
    return found


def losses_of_row(scorer: Scorer, rows: Rows) -> list[float]:
    """Of the one image that was read."""
    prepared, denoiser = scorer.prepared, scorer.denoiser
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents = torch.from_numpy(rows.latents).float() * prepared.scaling_factor
    generator = torch.Generator().manual_seed(draw_seed("validation noise", rows.keys[0]))
    noise = torch.randn(latents.shape[1:], generator=generator)[None]
    ids = torch.from_numpy(scorer.load_tokenizer()([json.loads(rows.captions[0])["caption"]]))
    text = text_arguments(denoiser, ALONE.device, ids, None, None)
    losses = []
    for timestep in TIMESTEPS:
        at = torch.tensor([timestep])
        noisy = schedule.add_noise(latents, noise, at)
        with torch.no_grad():
            answer = denoiser.model(noisy, at, torch.from_numpy(rows.sizes).float(), **text)
        losses.append(((answer - noise).double() ** 2).mean().item())
    return losses


def close_to(values: list[float]) -> object:
    return pytest.approx(values, rel=2e-5)


@pytest.fixture(scope="module")
def scored(model_folder: Path, root: Path) -> tuple[Scorer, ValidationResult]:
    scorer = scorer_of(two_sources(model_folder, root))
    return scorer, scorer.validate_fully()


def test_every_number_is_that_of_an_independent_computation(scored: tuple[Scorer, ValidationResult]) -> None:
    scorer, result = scored
    by_hand = losses_by_hand(scorer, "validation")
    assert {image.key for image in result.held_out.images} == by_hand.keys() and len(by_hand) > 8
    for image in result.held_out.images:
        source, shape, losses = by_hand[image.key]
        assert (image.source, "{}x{}".format(*image.bucket)) == (source, shape)
        assert [*image.losses] == close_to(losses)
    record = as_record(result)
    groups: dict[str, dict[str, list[float]]] = {"source": defaultdict(list), "bucket": defaultdict(list)}
    for source, shape, losses in by_hand.values():
        groups["source"][source].append(float(np.mean(losses)))
        groups["bucket"][shape].append(float(np.mean(losses)))
    assert groups["source"].keys() == {"photos", "noise"} and len(groups["bucket"]) >= 2
    for kind, members in groups.items():
        assert record[f"by_{kind}"].keys() == members.keys()
        for name, values in members.items():
            check(record[f"by_{kind}"][name], values)
    for number, timestep in enumerate(TIMESTEPS):
        check(record["by_timestep"][str(timestep)], [losses[number] for _, _, losses in by_hand.values()])
        assert record["loss_at_timestep"][timestep] == pytest.approx(record["by_timestep"][str(timestep)]["loss"])
    check(record["overall"], [float(np.mean(losses)) for _, _, losses in by_hand.values()])
    assert record["loss"] == pytest.approx(record["overall"]["loss"], rel=1e-6)


def check(told: dict, values: list[float]) -> None:
    assert told["images"] == len(values) and told["loss"] == pytest.approx(np.mean(values), rel=2e-5)
    if len(values) < 2:
        assert told["plus_minus"] is None
    else:
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
        assert told["plus_minus"] == pytest.approx(half, rel=1e-3)


def test_each_resolution_has_its_own_number(scored: tuple[Scorer, ValidationResult], model_folder: Path) -> None:
    """Of the same images; that of the main one is to the bit what it is without others."""
    plain, root = scored[1], scored[0].prepared.path.parent
    scorer = scorer_of(two_sources(model_folder, root, "at", also_at=[{"resolution": 64}]))
    result = scorer.validate_fully()
    assert result.held_out == plain.held_out and result.training == plain.training and not plain.further
    assert [*result.further] == [64]
    prepared, by_hand = scorer.prepared, dict[str, list[float]]()
    for shard in prepared.shards("validation", at_all_resolutions=True):
        for row in range(shard.rows if shard.resolution else 0):
            rows = prepared.read_shard(shard, range(row, row + 1))
            by_hand[rows.keys[0]] = losses_of_row(scorer, rows)
    assert by_hand.keys() == {image.key for image in plain.held_out.images}
    for image in result.further[64].images:
        assert image.bucket == (64, 64) and [*image.losses] == close_to(by_hand[image.key])
    record, means = as_record(result), [float(np.mean(losses)) for losses in by_hand.values()]
    check(record["by_resolution"]["64"], means)
    check(record["by_resolution"]["64"]["by_bucket"]["64x64"], means)
    assert {name: value for name, value in record.items() if name != "by_resolution"} == as_record(plain)
    values = record_values(result)
    assert values["resolution/64"] == pytest.approx(np.mean(means), rel=2e-5) and values["ci95/resolution/64"] > 0
    assert {name: value for name, value in values.items() if "resolution" not in name} == record_values(plain)
    lines = [*table(result)]
    assert len(lines) == len([*table(plain)]) + 2 and any("all at 64 px" in line for line in lines)
    assert f", {np.mean(means):.4f} at 64 px" in told_loss(result) and "px" not in told_loss(plain)


def test_the_gap_is_of_as_many_training_images(scored: tuple[Scorer, ValidationResult]) -> None:
    scorer, result = scored
    assert result.training is not None and result.gap is not None
    by_hand = losses_by_hand(scorer, "train")
    keys = {image.key for image in result.training.images}
    assert len(keys) == len(result.held_out.images) and keys <= by_hand.keys()
    assert not keys & {image.key for image in result.held_out.images}
    for image in result.training.images:
        assert [*image.losses] == close_to(by_hand[image.key][2])
    ours = [np.mean(image.losses) for image in result.held_out.images]
    theirs = [np.mean(by_hand[key][2]) for key in keys]
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert result.gap.mean == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-5)
    assert result.gap.half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    values = record_values(result)
    assert values["gap"] == result.gap.mean and values["train_loss"] == result.training.loss
    assert sum(values[f"gap/t{t}"] for t in TIMESTEPS) / 3 == pytest.approx(values["gap"], abs=1e-6)


def test_training_images_are_picked_by_their_keys(scored: tuple[Scorer, ValidationResult]) -> None:
    prepared = scored[0].prepared
    total = prepared.images("train")
    every = {}
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        for row in range(count):
            record = prepared.read_record("train", bucket, row)
            assert record is not None
            every[record.key] = (bucket, row)
    least = sorted(every, key=lambda key: draw_seed("validation of training images", key))
    assert training_rows(prepared, 6) == sorted(every[key] for key in least[:6])  # all of so few are looked at
    assert training_rows(prepared, 6) == training_rows(prepared, 6)
    assert training_rows(prepared, 10 * total) == sorted(every.values()) and training_rows(prepared, 0) == []


def test_the_mean_is_to_the_bit_what_it_was(scored: tuple[Scorer, ValidationResult]) -> None:
    """The sum of each batch in fp32, those of the batches in float64, over the number of images."""
    scorer, result = scored
    rows = {image.key: image.losses for image in result.held_out.images}
    prepared, sums, count = scorer.prepared, [0.0] * 3, 0
    for bucket, total in enumerate(prepared.rows_per_bucket("validation")):
        for begin in range(0, total, scorer.images_per_pass):
            ids = np.arange(begin, min(begin + scorer.images_per_pass, total))
            losses = torch.tensor([rows[key] for key in prepared.read("validation", bucket, ids).keys])  # float32 again
            sums = [one + float(losses[:, i].contiguous().sum()) for i, one in enumerate(sums)]
            count += len(ids)
    assert [*result.held_out.at_timestep.values()] == [one / count for one in sums]
    assert result.held_out.loss == sum(one / count for one in sums) / 3


def run_workers(config: Config, folder: Path, world: int) -> list[dict]:
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, str(SCRIPT), str(folder / "config.json"), str(folder)]
    run_group([command] * world, worker_environments(world), folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.e2e
def test_three_workers_come_to_what_one_does(model_folder: Path, root: Path, tmp_path: Path) -> None:
    """To the bit, on each of them."""
    config = two_sources(model_folder, root)
    (alone,) = run_workers(config, tmp_path / "one", 1)
    three = run_workers(config, tmp_path / "three", 3)
    assert three == [alone] * 3 and len(alone["images"]) > 8 and "gap" in alone["values"]


def test_an_image_that_comes_several_times_is_one_image() -> None:
    rows = [["a/1", 64, 64, 1.0, 0.25, 0.5], ["b/1", 64, 128, 1.0, 1.0, 2.0], ["a/1", 64, 64, 1.0, 0.26, 0.51]]
    images = images_of(rows)
    assert [(image.key, image.copies, image.losses) for image in images] == [
        ("a/1", 2.0, (0.25, 0.5)),
        ("b/1", 1.0, (1.0, 2.0)),
    ]
    assert {name: found.images for name, found in by_source(images).items()} == {"a": 1, "b": 1}
    assert by_timestep(images, [100, 900])[100].mean == pytest.approx((2 * 0.25 + 1.0) / 3)
    assert [*by_bucket(images)] == ["64x128", "64x64"]


@pytest.mark.e2e
def test_eval_writes_a_table_a_record_and_a_picture(
    model_folder: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = two_sources(model_folder, root)
    with caplog.at_level(logging.INFO):
        evaluate_weights(config, model_of(config), ALONE, Path(str(config.model.path)), tmp_path)
    record = json.loads((tmp_path / "validation.json").read_text())
    assert record["level"] == 0.95 and set(record["by_source"]) == {"photos", "noise"}
    assert {"loss", "loss_at_timestep", "images", "weights", "average", "gap", "training"} <= record.keys()
    with Image.open(tmp_path / "validation.png") as picture:
        assert picture.width == 1680 and picture.height >= 500
    said = caplog.text
    for line in ("± 95 %  images", "source noise", "bucket 128 x 128", "timestep 850", "held out less training"):
        assert line in said
    half = record["by_source"]["noise"]["plus_minus"]
    assert f"{record['by_source']['noise']['loss']:7.4f}  {half:6.4f}" in said


@pytest.mark.e2e
def test_two_evaluations_are_compared_image_by_image(
    model_folder: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a checkpoint and of its base; the interval is that of SciPy's paired test."""
    config = two_sources(model_folder, root, "compared")
    watched_run(config)
    newest = sorted((config.run.dir / "checkpoints").iterdir())[-1]
    for name in ("base", "trained"):
        (tmp_path / name).mkdir()
    evaluate_weights(config, model_of(config), ALONE, Path(str(config.model.path)), tmp_path / "base")
    with caplog.at_level(logging.INFO):
        evaluate_weights(config, model_of(config), ALONE, newest, tmp_path / "trained", against=tmp_path / "base")
    then, now = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("base", "trained"))
    assert then["losses"].keys() == now["losses"].keys() and then["timesteps"] == TIMESTEPS
    means = [[float(np.mean(each["losses"][key])) for key in sorted(then["losses"])] for each in (now, then)]
    interval = stats.ttest_rel(*means).confidence_interval(0.95)
    record = json.loads((tmp_path / "trained/validation.json").read_text())
    told = record["paired"]
    assert told["difference"] == pytest.approx(np.mean(means[0]) - np.mean(means[1]), rel=1e-9)
    assert told["plus_minus"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)
    assert told["plus_minus"] < record["overall"]["plus_minus"] / 2
    assert f"all timesteps  {told['difference']:+.5f} ± {told['plus_minus']:.5f}" in caplog.text
    (tmp_path / "trained/losses.json").write_text('{"timesteps": [1], "losses": {"a": [0.5, 1.0]}}')
    with pytest.raises(UserError, match="losses of a: wanted a number for each timestep"):
        read_losses(tmp_path / "trained")
    with pytest.raises(UserError, match="give the folder of an earlier `eval`"):
        read_losses(tmp_path / "nothing")


def test_a_source_of_any_name_can_be_drawn(scored: tuple[Scorer, ValidationResult], tmp_path: Path) -> None:
    from trainer.evaluate.validating.validation_chart import validation_chart_png

    result = scored[1]
    first, *others = result.held_out.images
    strange = (replace(first, key="$\\frac{$_^ and a name that is longer than fits/1"), *others)
    odd = replace(result, held_out=replace(result.held_out, images=strange), training=None)
    validation_chart_png(odd, tmp_path / "odd.png", "a run")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.png"]
    assert any("longer than fits" in line and "     -" in line for line in table(odd))  # one image has no interval


@pytest.mark.e2e
def test_a_run_records_what_its_validations_say(
    model_folder: Path, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Live weights and averages alike; the run takes the way it takes without."""
    config = two_sources(model_folder, root, "watched", every_steps=2, train_images=5, max_time_share=1e-6)
    ema = config.ema.model_validate({"averages": [{"kind": "plain", "name": "long"}], "score": ["live", "long"]})
    with caplog.at_level(logging.INFO):
        watched = watched_run(config.model_copy(update={"ema": ema}))
    silent = watched_run(two_sources(model_folder, root, "silent").model_copy(update={"ema": ema}))
    assert [r.loss for r in watched.results] == [r.loss for r in silent.results]
    records = [record for record in read_metrics(config.run.dir) if record["kind"].startswith("validation")]
    assert {(record["kind"], record["step"]) for record in records} == {
        (kind, step) for kind in ("validation", "validation_long") for step in (0, 2, 4)
    }
    for record in records:
        assert record["ci95"] > 0 and record["ci95/t500"] > 0 and record["seconds"] > 0 and record["gap"] is not None
        assert {"source/noise", "ci95/source/photos", "bucket/128x128", "train_loss", "gap/t150"} <= record.keys()
        assert not [name for name in record if name.startswith("loss_t") and not name[6:].isdigit()]
    warnings = [r.getMessage() for r in caplog.records if "validation.max_time_share" in r.getMessage()]
    assert warnings and warnings[0].startswith("step 2: validation takes ") and "would keep to it" in warnings[0]
    assert "to images that are trained on" in caplog.text


@pytest.mark.e2e
def test_training_images_are_left_out_where_they_cost_too_much_and_that_is_told(
    model_folder: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = two_sources(model_folder, root, "dear", every_steps=2, max_time_share=1e-6)
    with caplog.at_level(logging.WARNING):
        watched_run(config)
    records = [record for record in read_metrics(config.run.dir) if record["kind"] == "validation"]
    assert ["gap" in record for record in records] == [True, False, False]
    told = [r.getMessage() for r in caplog.records if "images that are trained on are not scored" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("step 2: ")
    config = two_sources(model_folder, root, "cheap", every_steps=2, max_time_share=1.0)
    watched_run(config)
    records = [record for record in read_metrics(config.run.dir) if record["kind"] == "validation"]
    assert all("gap" in record for record in records)


def test_the_clock_says_which_interval_would_keep_to_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.evaluate.validating.validation_clock.time.monotonic", lambda: now[0])
    clock = ValidationClock()

    def steps(count: int, seconds: float) -> None:
        for number in range(count):
            clock.step_begins()
            now[0] += seconds
            clock.step_ends(validates=number == count - 1)

    def validate(seconds: float) -> None:
        with clock.validating() as spent:
            now[0] += seconds
        assert spent.seconds == pytest.approx(seconds)

    clock.step_ends(validates=True)  # before the first step nothing is known to compare with
    validate(30.0)
    assert clock.too_much(10, 0.02) == "" and clock.share(30.0, 10) is None
    steps(10, 2.0)
    validate(3.0)
    validate(2.0)
    assert clock.share(5.0, 10) == pytest.approx(5 / 25)
    told = clock.too_much(10, 0.02)
    # 5 s / (5 s + n 2 s) <= 2 %: n >= 122.5
    assert told.startswith("validation takes 5.0 s, 20.0 % of the time where 2 % are meant")
    assert told.endswith("validation.every_steps: 130 would keep to it")
    assert clock.too_much(10, 0.02) == ""  # once
    steps(10, 2.0)
    validate(0.2)
    assert clock.too_much(10, 0.02) == "" and clock.spent_s == pytest.approx(0.2)
    steps(10, 2.0)
    validate(20.0)
    assert "would keep to it" in clock.too_much(10, 0.02)  # far more than was told
    assert clock.left_out(0.05, 0.02) and not clock.left_out(0.05, 0.02)
