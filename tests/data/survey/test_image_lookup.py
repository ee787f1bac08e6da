"""One image by its key, and its visits: the same as the readers of a run give. `data show` from end to end."""

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.data.photographs import settings_for, write_crops
from tests.data.small_set import write_small_set
from tests.data.survey.browsed_set import BrowsedSet, write_browsed_set
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.data.augment import Augmentation, view_sizes
from trainer.data.buckets import Bucket
from trainer.data.captions import PLAIN
from trainer.data.catalog.catalog import open_catalog
from trainer.data.loader import BatchReader, Request
from trainer.data.mixture import Mixture
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.gallery import find_image
from trainer.data.survey.image_lookup import find_stored
from trainer.data.survey.image_visits import visits
from trainer.errors import UserError
from trainer.train.caption_rules import caption_rules


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> BrowsedSet:
    return write_browsed_set(tmp_path_factory.mktemp("browsed"), weight=1.5)


def _texts_of_epoch(prepared: PreparedSet, browsed: BrowsedSet, epoch: int) -> Counter[tuple[str, str]]:
    """(key, text) of all that a run's readers give in an epoch."""
    config = load_config(browsed.config, check_paths=False)
    texts: list[str] = []

    def tokenize(captions: Sequence[str]) -> np.ndarray:
        texts.extend(captions)
        return np.zeros((len(captions), 2, 1, 77), dtype=np.int64)

    mixture = Mixture.of(prepared, config.run.seed)
    reader = BatchReader(prepared, "train", config.run.seed, tokenize, captions=caption_rules(config), mixture=mixture)
    keys: list[str] = []
    for bucket, rows in enumerate(mixture.rows(epoch)):
        ids = np.arange(rows, dtype=np.int64)
        keys += reader.read(Request(epoch, bucket, ids, np.ones(rows, dtype=np.float32))).keys
    return Counter(zip(keys, texts, strict=True))


@pytest.mark.e2e
def test_visits_are_what_the_readers_give(browsed: BrowsedSet) -> None:
    prepared = PreparedSet.open(browsed.prepared)
    rules = caption_rules(load_config(browsed.config, check_paths=False))
    with open_catalog(browsed.prepared, read_only=True) as catalog:
        keys = [key for (key,) in catalog.execute("SELECT key FROM rows ORDER BY key")]
        images = [find_stored(prepared, catalog, key) for key in keys]
    assert len(images) == 41 and {image.repeats for image in images} == {1, 2}
    seen = set()
    for epoch in (0, 3):
        told = [
            (image.key, visit.text)
            for image in images
            for visit in visits(prepared, image, epoch, 7, rules, Augmentation(), None)
        ]
        assert Counter(told) == _texts_of_epoch(prepared, browsed, epoch)
        seen.add(len(told))
        counts = Counter(key for key, _ in told)
        assert {counts[image.key] for image in images if image.key.startswith("photos/")} == {1, 2}  # weight 1.5
    assert seen == {67}  # 30 * 1.5 + 22


def test_keys_are_found_with_and_without_source_and_catalogue(browsed: BrowsedSet) -> None:
    prepared = PreparedSet.open(browsed.prepared)
    with open_catalog(browsed.prepared, read_only=True) as catalog:
        for given, key in (
            ("tagged/twin", "tagged/twin"),
            ("twin", "tagged/twin"),
            ("crop-0-020", "photos/crop-0-020"),
        ):
            image, again = find_stored(prepared, catalog, given), find_stored(prepared, None, given)
            assert image.key == again.key == key and image.first_row == again.first_row
            assert prepared.read("train", image.shard.bucket_index, np.array([image.first_row])).keys == [key]
        for wrong, said in (
            ("photos/crop-0-02", "did you mean `photos/crop-0-02"),
            ("photo/crop-0-020", "did you mean `photos/crop-0-020`?"),
            ("tagged/crop-0-020", "did you mean `"),
            ("crop-1-03", "did you mean `tagged/crop-1-0"),
            ("page", "photos/page: was left out: is not an image of a known kind"),
            ("nothing like it", "has this key"),
            ("", "has this key"),
            ("'; DROP TABLE rows; --", "has this key"),
        ):
            with pytest.raises(UserError, match=r"^[^\n]*$") as error:
                find_stored(prepared, catalog, wrong)
            assert said in str(error.value)
    with pytest.raises(UserError, match="did you mean `photos/crop-0-020`"):
        find_stored(prepared, None, "photo/crop-0-020")


def test_an_image_that_is_not_committed_yet(browsed: BrowsedSet, tmp_path: Path) -> None:
    small = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 12}, repeats=3)
    prepared = PreparedSet.open(small)
    image = find_stored(prepared, None, "64x64/7")
    assert (image.first_row, image.repeats, image.place) == (21, 3, 2)
    assert json.loads(image.record.caption) == {"caption": "photo 7"}
    with open_catalog(browsed.prepared, read_only=True) as catalog, pytest.raises(UserError, match="is planned, but"):
        find_stored(prepared, catalog, "tagged/twin")


def test_a_catalogue_of_an_older_format_is_read_as_it_is(browsed: BrowsedSet, tmp_path: Path) -> None:
    shutil.copytree(browsed.prepared, tmp_path / "prepared")
    with closing(sqlite3.connect(tmp_path / "prepared" / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.executescript(
            "DROP TABLE removed; DROP INDEX renamed_by_shard; ALTER TABLE rows DROP COLUMN stored_key; "
            "PRAGMA user_version = 3"
        )
    prepared = PreparedSet.open(tmp_path / "prepared")
    with open_catalog(prepared.path, read_only=True) as catalog:
        assert find_stored(prepared, catalog, "twin").key == "tagged/twin"
        with pytest.raises(UserError, match="did you mean `tagged/twin`"):
            find_stored(prepared, catalog, "twim")


def test_show_tells_all_of_it(browsed: BrowsedSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(browsed.config), "crop-1-009", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    lines = {line[:12].strip(): line[12:] for line in out.partition("\n\n")[0].splitlines()}
    assert lines["key"] == "tagged/crop-1-009" and lines["split"] == "train" and lines["repeats"] == "2"
    file = browsed.root / "tagged" / "crop-1-009.jpg"
    assert lines["file"] == f"{file} ({file.stat().st_size:,} bytes)"
    assert "fp16, sound, times 0.13025" in lines["latents"] and "of the image" in lines["crop"]
    assert lines["tags"].startswith("photograph, tag 0, tag 1") and '<u onclick="alert(4)">' in lines["tags"]
    assert "epoch 1: seen 2 times" in out and "epoch 2: seen 2 times" in out and "epoch 3" not in out
    assert "tokens are not told: " in out  # its model is not there
    file.rename(file.with_suffix(".gone"))
    assert main(["data", "show", str(browsed.config), "crop-1-009", "--epochs", "0"]) == 0
    file.with_suffix(".gone").rename(file)
    out = capsys.readouterr().out
    assert "cannot be read: No such file or directory" in out and "epoch" not in out
    assert main(["data", "show", str(browsed.config), "crop-0-004"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["twim"], "did you mean `tagged/twin`?"),
        (["twin", "--epochs", "-1"], "--epochs -1: must be from 0 to 1000"),
        (["twin", "captions.usee=tags"], "use"),
    ],
)
def test_mistakes_are_one_line(
    browsed: BrowsedSet, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", str(browsed.config), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1


@pytest.mark.e2e
def test_images_that_are_decoded_anew_tell_each_visits_crop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_crops(tmp_path / "photos", 6)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos", mode="images")
    plan_prepare(settings, show_progress=False)
    encode_shards(tmp_path / "prepared", 0, 1, None)
    commit(tmp_path / "prepared")
    prepared, augmentation = PreparedSet.open(tmp_path / "prepared"), Augmentation(0.5, True)
    reader = BatchReader(prepared, "train", 3, lambda texts: np.zeros((len(texts), 2, 1, 77), np.int64), augmentation)
    mirrored = set()
    for bucket_index, rows in enumerate(prepared.rows_per_bucket("train")):
        batch = reader.read(Request(1, bucket_index, np.arange(rows), np.ones(rows, dtype=np.float32)))
        for key, sizes in zip(batch.keys, batch.time_ids.tolist(), strict=True):
            image = find_stored(prepared, None, key)
            place, path, problem = find_image(image.record, image.bucket, None)
            assert place is not None and Path(path).is_file() and not problem
            (visit,) = visits(prepared, image, 1, 3, PLAIN, augmentation, place.placement)
            assert visit.view is not None and list(view_sizes(place.original_hw, visit.view)) == sizes
            mirrored.add(visit.view.flipped)
    assert mirrored == {True, False}
    config = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "model": {"path": str(tmp_path / "no-model")},
        "data": {
            "sources": [{"path": str(tmp_path / "photos")}],
            "prepared": str(tmp_path / "prepared"),
            "mode": "images",
            "augment": {"flip_probability": 0.5, "random_crop": True},
        },
        "train": {"steps": 1},
        "optimizer": {"lr": 1e-6},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["data", "show", str(tmp_path / "config.yaml"), "crop-0-003", "--epochs", "20"]) == 0
    out = capsys.readouterr().out
    assert "decoded anew at each visit" in out and ", mirrored\n" in out and out.count("    crop from left") == 20
    assert main(["data", "browse", str(tmp_path / "prepared")]) == 0
    html = (tmp_path / "prepared" / "browse.html").read_text(encoding="utf-8")
    assert html.count('<svg class="whole"') == 6 and "made of the latents" not in html
