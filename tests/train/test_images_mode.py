"""`data.mode: images`: the same run as with stored latents where nothing is augmented; exact resume where it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.photographs import write_crops
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from trainer.config.schema import Config
from trainer.data.augment import NOT_AUGMENTED, Augmentation
from trainer.data.loader import Batch, BatchReader, Request, open_loader
from trainer.data.prepare.commit import commit
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.data.sampler import Position
from trainer.data.store.snapshot import PreparedSet
from trainer.model.latents import encoded_batches
from trainer.model.load_weights import load_vae
from trainer.model.text import load_tokenizers
from trainer.model.vae import ImageEncoder
from trainer.model_files.run_model import open_model
from trainer.train.workers.eval_worker import evaluate_weights
from trainer.train.workers.prepare_worker import encode_share, needs_workers, note_references, prepare_settings

BUCKETS = {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64}
AUGMENTED = {"mode": "images", "augment": {"flip_probability": 0.5, "random_crop": True}}
Configured = Callable[..., Config]


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Configured:
    """Makes configurations of one folder of photographs, and the data sets of latents and images that they name."""
    root = tmp_path_factory.mktemp("images")
    write_crops(root / "photos", 24)

    def make(run: str, data: dict, **train: int) -> Config:
        prepared = root / data.get("mode", "latents")
        settings = {"sources": [{"path": str(root / "photos")}], "buckets": BUCKETS, "validation_fraction": 0.15}
        config = run_config(model_folder, prepared, root / run, {**settings, **data}, **train)
        if not is_current(prepare_settings(config, model_of(config))):
            plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
            assert needs_workers(config) == (config.data.mode == "latents")
            encode_share(config, model_of(config)) if config.data.mode == "latents" else note_references(config)
            commit(prepared)
        return config

    return make


def _reader(config: Config, split: str = "train", augmentation: Augmentation = NOT_AUGMENTED) -> BatchReader:
    prepared = PreparedSet.open(config.data.prepared)
    return BatchReader(
        prepared, split, config.run.seed, load_tokenizers(open_model(config.model.path).tokenizers), augmentation
    )


def _all_batches(reader: BatchReader, epoch: int = 0) -> list[Batch]:
    rows = reader.prepared.rows_per_bucket(reader.split)
    return [
        reader.read(Request(epoch, bucket, np.arange(count), np.ones(count, dtype=np.float32)))
        for bucket, count in enumerate(rows)
    ]


def test_without_augmentation_the_latents_are_the_stored_ones(configured: Configured) -> None:
    latents, images = configured("a", {}), configured("b", {"mode": "images"})
    vae = load_vae(open_model(images.model.path), torch.float32, "cpu")
    for split in ("train", "validation"):
        stored = _all_batches(_reader(latents, split))
        encoded = [*encoded_batches(ImageEncoder(vae, 4), _all_batches(_reader(images, split)))]
        assert len(stored) == len(encoded) > 0
        for theirs, ours in zip(stored, encoded, strict=True):
            assert theirs.keys == ours.keys and torch.equal(theirs.time_ids, ours.time_ids)
            assert torch.equal(theirs.draw_seeds, ours.draw_seeds) and torch.equal(theirs.weights, ours.weights)
            assert theirs.latents is not None and ours.latents is not None
            # Half a unit in the last place of fp16, and what batches of another size change in fp32.
            torch.testing.assert_close(ours.latents, theirs.latents.float(), rtol=5e-4, atol=1e-5)


@pytest.mark.e2e
def test_the_run_is_the_same_run(configured: Configured) -> None:
    by_latents = watched_run(configured("c", {}, steps=12))
    by_images = watched_run(configured("d", {"mode": "images"}, steps=12))
    assert by_images.keys == by_latents.keys
    losses = [result.loss for result in by_images.results]
    assert losses == pytest.approx([result.loss for result in by_latents.results], rel=2e-3)


@pytest.mark.e2e
def test_augmented_visits_differ_and_a_resumed_run_repeats_them(configured: Configured) -> None:
    straight = watched_run(configured("e", AUGMENTED, steps=10))
    stopped = configured("f", AUGMENTED, steps=10)
    first = watched_run(stopped, stop_after=4)
    second = watched_run(stopped)
    assert [r.loss for r in first.results + second.results] == [r.loss for r in straight.results]
    plain = watched_run(configured("g", {"mode": "images"}, steps=10))
    assert [r.loss for r in plain.results] != [r.loss for r in straight.results]


def test_sizes_and_pixels_of_augmented_visits(configured: Configured) -> None:
    """Of each image over epochs: mirrored or not, and the crop that the time ids name."""
    config = configured("h", AUGMENTED)
    centred = _all_batches(_reader(config))
    places: dict[str, set[tuple[float, float]]] = {}
    flips = 0
    for epoch in range(12):
        flipping = _all_batches(_reader(config, augmentation=Augmentation(flip_probability=0.5)), epoch)
        for batch, usual in zip(flipping, centred, strict=True):
            assert batch.pixels is not None and usual.pixels is not None
            for row in range(len(batch.keys)):
                mirrored = torch.equal(batch.pixels[row], usual.pixels[row].flip(-1))
                assert mirrored != torch.equal(batch.pixels[row], usual.pixels[row])
                flips += mirrored
        moved = _all_batches(_reader(config, augmentation=Augmentation(random_crop=True)), epoch)
        for key, ids in ((key, ids) for batch in moved for key, ids in zip(batch.keys, batch.time_ids, strict=True)):
            places.setdefault(key, set()).add((float(ids[2]), float(ids[3])))
    count = 12 * sum(len(batch.keys) for batch in centred)
    assert abs(flips / count - 0.5) < 0.15
    assert max(len(seen) for seen in places.values()) >= 6


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_read_the_same_batches(configured: Configured, workers: int) -> None:
    config = configured("i", AUGMENTED)
    reader = _reader(config, augmentation=Augmentation(0.5, True))
    start = Position.start(len(reader.prepared.rows_per_bucket("train")), 3)
    options = {"rank": 0, "world": 1, "micro_batch": 3, "accumulation": 1, "prefetch_batches": 2, "pin_memory": False}
    with (
        open_loader(reader, start, workers=workers, **options) as by_processes,
        open_loader(reader, start, workers=0, **options) as by_threads,
    ):
        for _, one, other in zip(range(6), by_processes, by_threads, strict=False):
            (ours,), (theirs,) = list(one.batches), list(other.batches)
            assert ours.pixels is not None and theirs.pixels is not None and ours.vae_seeds is not None
            assert ours.keys == theirs.keys and torch.equal(ours.time_ids, theirs.time_ids)
            assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.vae_seeds, theirs.vae_seeds)


@pytest.mark.e2e
def test_damaged_images_cost_their_rows(configured: Configured, tmp_path: Path, model_folder: Path) -> None:
    write_crops(tmp_path / "photos", 12)
    data = {"mode": "images", "sources": [{"path": str(tmp_path / "photos")}], "buckets": BUCKETS}
    config = run_config(model_folder, tmp_path / "prepared", tmp_path / "run", data, steps=6)
    plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
    note_references(config)
    assert commit(config.data.prepared).images == 12
    cut, gone, other = (tmp_path / f"photos/crop-0-{i:03d}.jpg" for i in (1, 5, 7))
    cut.write_bytes(cut.read_bytes()[:700])
    gone.unlink()
    other.write_bytes((tmp_path / "photos/crop-0-002.jpg").read_bytes())
    batches = _all_batches(_reader(config))
    problems = {problem.file: problem.reason for batch in batches for problem in batch.problems}
    assert set(problems) == {str(cut), str(gone), str(other)}
    assert "truncated" in problems[str(cut)] and "No such file" in problems[str(gone)]
    assert "px when it was listed" in problems[str(other)]
    for batch in batches:
        assert batch.pixels is not None
        assert [bool(pixels.any()) for pixels in batch.pixels] == batch.weights.bool().tolist()
    assert sum(float(batch.weights.sum()) for batch in batches) == 9
    watched = watched_run(config)
    assert all(np.isfinite(result.loss) for result in watched.results)
    assert sum(result.bad_rows for result in watched.results) >= 3


@pytest.mark.e2e
def test_validation_and_samples(configured: Configured, tmp_path: Path) -> None:
    latents, images = configured("j", {}), configured("k", {"mode": "images"})
    for config, name in ((latents, "latents"), (images, "images")):
        (tmp_path / name).mkdir()
        settings = config.samples.model_copy(update={"count": 2, "steps": 1})
        judged = config.model_copy(update={"samples": settings})
        evaluate_weights(judged, model_of(judged), ALONE, config.model.path, tmp_path / name)
    ours, theirs = ((tmp_path / name / "validation.json").read_text() for name in ("images", "latents"))
    assert _loss(ours) == pytest.approx(_loss(theirs), rel=2e-3)
    assert (tmp_path / "images/samples.png").is_file()


def _loss(record: str) -> float:

    return json.loads(record)["loss"]
