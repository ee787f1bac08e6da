"""One image by its key, and its visits: the same as the readers of a run give. `data show` from end to end."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.small_set import write_small_set
from tests.data.survey.browsed_set import BrowsedSet, write_browsed_set
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.data.augment import Augmentation
from trainer.data.buckets import Bucket
from trainer.data.catalog.catalog import open_catalog
from trainer.data.loader import BatchReader, Request
from trainer.data.mixture import Mixture
from trainer.data.store.snapshot import PreparedSet
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
