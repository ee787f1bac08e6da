"""Parquet: columns of every form, row groups read forwards, damaged files. pyarrow and `datasets` write them."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from trainer.config.sections.data.sources import ParquetSource
from trainer.data.images import BadImage
from trainer.data.sources.parquet import CellReader, list_parquet
from trainer.data.sources.source import ROW, WHOLE, SourceItem
from trainer.errors import UserError

PHOTO = Image.fromarray(data.coffee())


def _crops(count: int) -> list[bytes]:
    """JPEG crops of a photograph, each of another size."""
    crops = []
    for i in range(count):
        file = io.BytesIO()
        PHOTO.crop((0, 0, 60 + 3 * i, 50 + 2 * i)).save(file, "JPEG")
        crops.append(file.getvalue())
    return crops


def _list(source: ParquetSource) -> list[SourceItem]:
    items = list(list_parquet(source, "pq", Counter()))
    assert len({item.key for item in items}) == len(items)
    return items


@pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
def test_embedded_images(tmp_path: Path, form: str) -> None:
    crops = _crops(50)
    images = (
        pa.array(
            [{"bytes": crop, "path": None} for crop in crops], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
        if form == "struct"
        else pa.array(crops, pa.binary() if form == "binary" else pa.large_binary())
    )
    columns = {
        "id": pa.array(range(100, 150)),
        "image": images,
        "text": pa.array([None if i == 8 else f"crop {i}" for i in range(50)]),
        "labels": pa.array([["a", "b"]] * 50),
    }
    path = tmp_path / "sub/a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(columns), path, row_group_size=20)
    source = ParquetSource(
        type="parquet", files=tmp_path, caption_column="text", tags_column="labels", key_column="id", repeats=2
    )
    items = _list(source)
    assert [item.key for item in items] == [f"pq/sub/a/{i:09d}:{100 + i}" for i in range(50)]
    assert json.loads(items[3].caption or "") == {"caption": "crop 3", "tags": "a, b"}
    assert json.loads(items[8].caption or "")["tags"] == "a, b"
    reader = CellReader()
    rng = np.random.default_rng(0)
    for order in (range(50), range(0, 50, 7), [19, 20, 39, 40, 49], rng.permutation(50).tolist()):
        for row in order:
            item = items[row]
            assert (item.offset, item.length, item.repeats, item.problem) == (row, ROW, 2, "")
            assert item.original_hw == (50 + 2 * row, 60 + 3 * row) and item.file_bytes == len(crops[row])
            assert reader.read(item.file, row) == crops[row]


def test_paths_and_holes(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "on disk.jpg")
    form = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [
        {"bytes": None, "path": "on disk.jpg"},
        {"bytes": None, "path": str(tmp_path / "on disk.jpg")},
        {"bytes": None, "path": "https://example.org/a.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"no image", "path": "x.jpg"},
    ]
    pq.write_table(pa.table({"image": pa.array(rows, form), "caption": ["c"] * 6}), tmp_path / "a.parquet")
    items = _list(ParquetSource(type="parquet", files=tmp_path / "a.parquet"))
    assert [(item.file, item.length) for item in items[:2]] == [(str(tmp_path / "on disk.jpg"), WHOLE)] * 2
    problems = ["", "", "row 2 names https", "row 3 holds no image", "row 4 holds no image", "is not an image"]
    for item, problem in zip(items, problems, strict=True):
        assert item.problem.startswith(problem) and bool(item.problem) == bool(problem)
    paths = pa.table({"path": ["on disk.jpg"], "caption": ["c"]})
    (tmp_path / "elsewhere").mkdir()
    pq.write_table(paths, tmp_path / "elsewhere/b.parquet")
    (item,) = _list(ParquetSource(type="parquet", files=tmp_path / "elsewhere", image_column="path", images=tmp_path))
    assert item.file == str(tmp_path / "on disk.jpg")


def test_what_datasets_writes(tmp_path: Path) -> None:
    import datasets

    crops = [Image.open(io.BytesIO(crop)) for crop in _crops(3)]
    datasets.Dataset.from_dict({"image": crops, "caption": ["x", "y", "z"]}).to_parquet(tmp_path / "hf.parquet")
    items = _list(ParquetSource(type="parquet", files=tmp_path))
    assert [item.original_hw for item in items] == [(50, 60), (52, 63), (54, 66)]
    assert Image.open(io.BytesIO(CellReader().read(items[2].file, 2))).size == (66, 54)


def test_missing_columns_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.parquet file"):
        _list(ParquetSource(type="parquet", files=tmp_path))
    pq.write_table(pa.table({"image": _crops(1), "text": ["c"]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"caption_column = caption: .*a.parquet has no such column; it has image, text"
    ):
        _list(ParquetSource(type="parquet", files=tmp_path))


def test_damage_is_told(tmp_path: Path) -> None:
    crops = _crops(40)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": crops, "caption": ["c"] * 40}), path, row_group_size=20, compression="zstd")
    (place, *_) = {item.file for item in _list(ParquetSource(type="parquet", files=tmp_path))}
    whole = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    whole[start : start + 2000] = bytes(2000)
    path.write_bytes(whole)
    items = _list(ParquetSource(type="parquet", files=tmp_path))
    assert not any(item.problem for item in items[:20])
    assert len(items) == 21 and items[20].problem.startswith("row group 1, from row 20 on: ")
    reader = CellReader()
    with pytest.raises(BadImage, match="cannot be read"):
        reader.read(place, 30)
    assert reader.read(place, 5) == crops[5]
    path.write_bytes(b"PAR1 cut")
    (item,) = _list(ParquetSource(type="parquet", files=tmp_path))
    assert "Parquet" in item.problem
    with pytest.raises(BadImage, match="cannot be read"):
        CellReader().read(place, 5)
    pq.write_table(pa.table({"image": crops[:3]}), path)
    with pytest.raises(BadImage, match="fewer rows"):
        CellReader().read(place, 5)
