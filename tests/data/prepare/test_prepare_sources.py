"""One data set of every kind of image source: what is stored, and what is read anew, are those sources' images."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.photographs import RULES, astronaut, coffee, pooled, settings_for, write_crops
from tests.data.records import caption_text
from tests.data.sources.test_webdataset import write_tar
from trainer.config.sections.data.sources import FolderSource, HfSource, ParquetSource, WebdatasetSource
from trainer.data.buckets import make_buckets, place
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.images import image_hw, load_pixels
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.keyed import draw_seed

BUCKETS = make_buckets(RULES.resolution, RULES.min_px, RULES.max_px, RULES.step_px)
Image = tuple[bytes, str]
"""An image file's bytes and its caption."""


def _images(count: int, seed: int) -> list[Image]:
    """JPEG crops of two photographs in varied shapes."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        width, height = rng.integers(70, 250, 2)
        left, top = rng.integers(0, 500 - width), rng.integers(0, 400 - height)
        file = io.BytesIO()
        (astronaut(), coffee())[i % 2].crop((left, top, left + width, top + height)).save(file, "JPEG")
        images.append((file.getvalue(), f"image {i} of {seed}"))
    return images


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Image], tuple]:
    """By key all good images of four sources, and the sources; each holds one bad image beside them."""
    root = tmp_path_factory.mktemp("sources")
    import datasets  # takes a second, and only this test needs it

    datasets.disable_progress_bars()
    write_crops(root / "photos", 9)
    (root / "photos/bad.jpg").write_bytes(b"no image")
    expected = {
        f"photos/{path.stem}": (path.read_bytes(), path.with_suffix(".txt").read_text())
        for path in sorted((root / "photos").glob("crop*.jpg"))
    }
    for shard in range(2):
        images = _images(7, 10 + shard)
        members: dict[str, bytes] = {"bad.jpg": b"no image"}
        for i, (image, caption) in enumerate(images):
            members |= {f"{i:04d}.jpg": image, f"{i:04d}.json": json.dumps({"caption": caption}).encode()}
            expected[f"tars/{shard}/{i:04d}"] = image, caption
        write_tar(root / f"tars/{shard}.tar", members)
    images = _images(23, 20)
    rows = [{"bytes": image, "path": None} for image, _ in images] + [{"bytes": b"no image", "path": None}]
    table = pa.table({"image": rows, "caption": [caption for _, caption in images] + ["bad"]})
    pq.write_table(table, root / "table.parquet", row_group_size=5)
    expected |= {f"table.parquet/table/{i:09d}": image for i, image in enumerate(images)}
    images = _images(8, 30)
    rows = [{"bytes": image, "path": None} for image, _ in images] + [None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": rows, "text": [caption for _, caption in images] + ["bad"]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / "set", num_shards=2)
    expected |= {f"set/{i:09d}": image for i, image in enumerate(images)}
    return expected, (
        FolderSource(path=root / "photos"),
        WebdatasetSource(type="webdataset", tars=root / "tars"),
        ParquetSource(type="parquet", files=root / "table.parquet"),
        HfSource(type="hf", path=str(root / "set")),
    )


def _prepared(tmp_path: Path, sources: tuple, mode: str) -> PreparedSet:
    settings: PrepareSettings = settings_for(tmp_path, sources=sources, mode=mode)
    counts = plan_prepare(settings, show_progress=False)
    assert counts.scan.bad == 5
    encode_shards(tmp_path, 0, 1, pooled if mode == "latents" else None, vae_batch_size=2)
    assert commit(tmp_path).left_out == 5
    again = plan_prepare(settings, show_progress=False).scan
    assert (again.new, again.changed, again.removed, again.bad) == (0, 0, 0, 5)
    return PreparedSet.open(tmp_path)


@pytest.mark.parametrize("mode", ["latents", "images"])
def test_every_image_of_every_source(tmp_path: Path, sources: tuple[dict[str, Image], tuple], mode: str) -> None:
    expected, listed = sources
    prepared = _prepared(tmp_path, listed, mode)
    seen: Counter[str] = Counter()
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        rows = prepared.read("train", bucket, np.arange(count))
        assert rows.ok.all(), rows.problems
        for i, key in enumerate(rows.keys):
            image, caption = expected[key]
            seen[key] += 1
            assert caption_text(rows.captions[i]) == caption
            original_hw = image_hw(image)
            placement = place(original_hw, BUCKETS, RULES)
            pixels = load_pixels(image, original_hw, placement)
            sizes = (*original_hw, *placement.crop_top_left, placement.bucket.height_px, placement.bucket.width_px)
            assert rows.sizes[i].tolist() == list(sizes)
            if rows.pixels is not None:
                assert np.array_equal(rows.pixels[i], pixels.transpose(2, 0, 1))
            else:
                assert rows.latents is not None
                latents = pooled(pixels.transpose(2, 0, 1)[None], np.array([draw_seed("vae", key)]))[0]
                np.testing.assert_allclose(rows.latents[i], latents, atol=2e-3)
    assert seen == Counter(dict.fromkeys(expected, 1))
