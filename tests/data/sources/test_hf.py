"""Data sets of `datasets`, which writes them itself: images by offset in its Arrow files, columns, splits."""

import io
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from skimage import data

from trainer.config.sections.data.sources import HfSource
from trainer.data.sources.hf import list_hf
from trainer.data.sources.source import WHOLE, SourceItem, read_bytes
from trainer.errors import UserError

PHOTO = Image.fromarray(data.coffee())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def _crops(count: int) -> list[Image.Image]:
    return [PHOTO.crop((0, 0, 60 + 3 * i, 50 + 2 * i)) for i in range(count)]


def _list(source: HfSource) -> list[SourceItem]:
    items = list(list_hf(source, "hf", Counter()))
    assert len({item.key for item in items}) == len(items)
    return items


def _image(item: SourceItem) -> Image.Image:
    return Image.open(io.BytesIO(read_bytes(item.file, item.offset, item.length)))


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    rows = {
        "image": _crops(11),
        "text": [f"crop {i}" for i in range(11)],
        "tags": [["a", "b"]] * 11,
        "id": [*range(11)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set", num_shards=3)
    items = _list(HfSource(type="hf", path=str(tmp_path / "set"), tags_column="tags", key_column="id", repeats=2))
    assert [item.key for item in items] == [f"hf/{i:09d}:{i}" for i in range(11)]
    assert len({item.file for item in items}) == 3
    for item, crop in zip(items, rows["image"], strict=True):
        assert np.array_equal(np.asarray(_image(item)), np.asarray(crop))  # `datasets` stores these as PNG
        assert item.file_bytes == item.length and item.repeats == 2
    assert json.loads(items[4].caption or "") == {"caption": "crop 4", "tags": "a, b"}


def test_a_part_of_a_set_and_a_split(tmp_path: Path) -> None:
    """Rows that were selected before saving; the record batches of the file are then other ones."""
    whole = datasets.Dataset.from_dict({"image": _crops(40), "text": ["x"] * 40})
    part = datasets.DatasetDict({"test": whole.select([7, 3, 39]), "train": whole.select([1])})
    part.save_to_disk(tmp_path / "set")
    items = _list(HfSource(type="hf", path=str(tmp_path / "set"), split="test"))
    assert [_image(item).size for item in items] == [(60 + 3 * i, 50 + 2 * i) for i in (7, 3, 39)]
    with pytest.raises(UserError, match="no such split; it has test, train"):
        _list(HfSource(type="hf", path=str(tmp_path / "set"), split="validation"))


def test_loaded_by_name(tmp_path: Path) -> None:
    """A folder of parquet files takes the way that a name on the hub takes: loaded, and converted into the cache."""
    (tmp_path / "repository/data").mkdir(parents=True)
    rows = {"image": _crops(5), "caption": ["x", None, "y", "z", " w "]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    target = tmp_path / "repository/data/train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(target)
    source = HfSource(type="hf", path=str(tmp_path / "repository"), caption_column="caption")
    items = _list(source)
    assert [_image(item).size for item in items] == [crop.size for crop in rows["image"]]
    assert [json.loads(item.caption or "").get("caption", "") for item in items] == ["x", "", "y", "z", "w"]
    with pytest.raises(UserError, match="only whole splits"):
        _list(HfSource(type="hf", path=source.path, split="train[:2]", caption_column="caption"))
    with pytest.raises(UserError, match=r"caption_column = text: .* it has image, caption"):
        _list(HfSource(type="hf", path=source.path))
    with pytest.raises(UserError, match="cannot be loaded"):
        _list(HfSource(type="hf", path=str(tmp_path / "none")))


def test_images_as_paths_and_holes(tmp_path: Path) -> None:
    """A set that names files, as `datasets` makes it from a folder of images, and rows without an image."""
    PHOTO.save(tmp_path / "a.jpg")
    rows = {"image": [str(tmp_path / "a.jpg"), None, "https://example.org/a.jpg"], "text": ["x", "y", "z"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    some = {name: values[:2] for name, values in rows.items()}
    datasets.Dataset.from_dict(some, features=features).save_to_disk(tmp_path / "embedded")
    items = _list(HfSource(type="hf", path=str(tmp_path / "embedded")))
    assert _image(items[0]).size == PHOTO.size and items[1].problem == "row 1 holds no image"
    plain = datasets.Dataset.from_dict(rows)
    plain.save_to_disk(tmp_path / "plain")
    items = _list(HfSource(type="hf", path=str(tmp_path / "plain")))
    assert (items[0].file, items[0].length) == (str(tmp_path / "a.jpg"), WHOLE)
    assert [item.problem[:15] for item in items] == ["", "row 1 holds no ", "row 2 names htt"]
    numbers = datasets.Dataset.from_dict({"image": [1, 2], "text": ["x", "y"]})
    numbers.save_to_disk(tmp_path / "numbers")
    with pytest.raises(UserError, match=r"image_column = image: holds no images \(int64\)"):
        _list(HfSource(type="hf", path=str(tmp_path / "numbers")))


def test_a_file_that_datasets_cannot_convert_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "a"}\n{"text":')
    with pytest.raises(UserError) as caught:
        _list(HfSource(type="hf", path=str(tmp_path / "set")))
    assert len(caught.value.lines) == 1 and "cannot be loaded" in caught.value.lines[0]
