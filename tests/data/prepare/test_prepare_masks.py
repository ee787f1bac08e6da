"""Masks of every kind of source, in both modes: images that are pictures of their own masks show whether they agree."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.data.photographs import pooled, settings_for, write_crops
from tests.data.sources.test_webdataset import write_tar
from trainer.cli.prepare_messages import describe_plan
from trainer.config.sections.data.sources import (
    FolderSource,
    HfSource,
    KohyaJsonSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from trainer.data.augment import Augmentation, View, draw_view
from trainer.data.buckets import Placement
from trainer.data.catalog.catalog import open_catalog
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import PrepareCounts, is_current, plan_prepare
from trainer.data.prepare.verification import verify
from trainer.data.store.rows import Rows
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.stats import mask_counts
from trainer.errors import UserError
from trainer.keyed import draw_seed

SIZES = [(200, 120), (150, 150), (90, 210), (333, 201), (128, 128)]
TOLERANCE = 6  # of 255: LANCZOS for the image, plain means for the mask


def pattern(number: int) -> Image.Image:
    """Soft shapes in grey; no two alike, none symmetric."""
    width, height = SIZES[number % len(SIZES)]
    draw = np.random.default_rng(number)
    image = Image.new("L", (width, height), 20)
    painter = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        painter.ellipse(
            (x - width / 5, y - height / 5, x + width / 5, y + height / 5), fill=int(draw.integers(60, 256))
        )
    return image.filter(ImageFilter.GaussianBlur(5))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def beside(root: Path) -> Source:
    for i in range(5):
        (root / "photos/sub").mkdir(parents=True, exist_ok=True)
        pattern(i).convert("RGB").save(root / f"photos/sub/{i}.png")
        pattern(i).save(root / f"photos/sub/{i}-masklabel.png")
    return FolderSource(path=root / "photos", masks="files")


def in_folder(root: Path) -> Source:
    for i in range(5):
        (root / "photos/sub").mkdir(parents=True, exist_ok=True)
        (root / "masks/sub").mkdir(parents=True, exist_ok=True)
        pattern(i).convert("RGB").save(root / f"photos/sub/{i}.jpg", quality=98)
        # Half the size, and another kind of file.
        half = pattern(i).resize((SIZES[i][0] // 2, SIZES[i][1] // 2), Image.Resampling.BOX)
        half.convert("RGB").save(root / f"masks/sub/{i}.{'JPG' if i % 2 else 'webp'}", quality=98)
    return FolderSource(path=root / "photos", masks="files", mask_folder=root / "masks")


def see_through(number: int) -> Image.Image:
    """Black, and where it is transparent white shows: the image is its mask's negative."""
    image = Image.new("RGBA", pattern(number).size)
    image.putalpha(pattern(number))
    return image


def as_alpha(root: Path) -> Source:
    (root / "photos").mkdir()
    for i in range(5):
        see_through(i).save(root / f"photos/{i}.{'webp' if i % 2 else 'png'}", lossless=True)
    return FolderSource(path=root / "photos", masks="alpha")


def as_alpha_by_metadata(root: Path) -> Source:
    as_alpha(root)
    (root / "meta.json").write_text(json.dumps({str(i): {"caption": "soft shapes"} for i in range(5)}))
    return KohyaJsonSource(type="kohya_json", path=root / "meta.json", images=root / "photos", masks="alpha")


def as_alpha_in_tars(root: Path) -> Source:
    write_tar(root / "0.tar", {f"{i}.png": png(see_through(i)) for i in range(5)})
    return WebdatasetSource(type="webdataset", tars=root / "0.tar", masks="alpha")


def as_alpha_in_table(root: Path) -> Source:
    rows = {"image": [png(see_through(i)) for i in range(5)], "caption": ["soft shapes"] * 5}
    pq.write_table(pa.table(rows), root / "table.parquet", row_group_size=2)
    return ParquetSource(type="parquet", files=root / "table.parquet", masks="alpha")


def in_tars(root: Path) -> Source:
    members = {}
    for i in range(5):
        image, mask = png(pattern(i).convert("RGB")), png(pattern(i))
        members |= {f"{i:04d}.mask.png": mask, f"{i:04d}.png": image, f"{i:04d}.txt": b"soft shapes"}
    write_tar(root / "0.tar", members)
    return WebdatasetSource(type="webdataset", tars=root / "0.tar", masks="files")


def in_table(root: Path) -> Source:
    rows = {
        "image": [{"bytes": png(pattern(i).convert("RGB")), "path": None} for i in range(5)],
        "seg": [png(pattern(i)) for i in range(5)],
        "caption": ["soft shapes"] * 5,
    }
    pq.write_table(pa.table(rows), root / "table.parquet", row_group_size=2)
    return ParquetSource(type="parquet", files=root / "table.parquet", masks="column", mask_column="seg")


def paths_in_table(root: Path) -> Source:
    for i in range(5):
        (root / f"{i}.mask.png").write_bytes(png(pattern(i)))
    rows = {
        "image": [png(pattern(i).convert("RGB")) for i in range(5)],
        "mask": [f"{i}.mask.png" for i in range(5)],
        "caption": ["soft shapes"] * 5,
    }
    pq.write_table(pa.table(rows), root / "table.parquet")
    return ParquetSource(type="parquet", files=root / "table.parquet", masks="column")


def in_dataset(root: Path) -> Source:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "text": datasets.Value("string")}
    )
    columns = {
        "image": [{"bytes": png(pattern(i).convert("RGB")), "path": None} for i in range(5)],
        "mask": [{"bytes": png(pattern(i)), "path": None} for i in range(5)],
        "text": ["soft shapes"] * 5,
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root / "set")
    return HfSource(type="hf", path=str(root / "set"), masks="column")


def prepare(settings: PrepareSettings) -> tuple[PrepareCounts, Committed]:
    counts = plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, pooled if settings.mode == "latents" else None, vae_batch_size=2)
    return counts, commit(settings.prepared)


def all_rows(prepared: PreparedSet, choose_view: Callable[..., View] | None = None) -> list[Rows]:
    views = {} if choose_view is None else {"choose_view": choose_view}
    found = []
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        rows = prepared.read("train", bucket, np.arange(count), with_masks=True, **views)
        assert rows.ok.all(), rows.problems
        found.append(rows)
    return found


def shown(rows: Rows) -> np.ndarray:
    """What the images show at each latent, 0..255."""
    if rows.pixels is None:
        assert rows.latents is not None
        return (rows.latents[:, :3].astype(np.float32).mean(axis=1) + 1) * 127.5
    m, _, height, width = rows.pixels.shape
    return rows.pixels.reshape(m, 3, height // 8, 8, width // 8, 8).mean(axis=(1, 3, 5))


def moved(visit: int, key: str, repeat: int, centred: Placement) -> View:
    return draw_view(centred, Augmentation(0.5, random_crop=True), draw_seed(key, visit))


SOURCES = [beside, in_folder, in_tars, in_table, paths_in_table, in_dataset]
ALPHA = [as_alpha, as_alpha_by_metadata, as_alpha_in_tars, as_alpha_in_table]


@pytest.mark.parametrize("mode", ["latents", "images"])
@pytest.mark.parametrize("make", SOURCES + ALPHA)
def test_masks_lie_on_their_images(tmp_path: Path, make: Callable[[Path], Source], mode: str) -> None:
    settings = settings_for(tmp_path / "prepared", sources=(make(tmp_path),), mode=mode)
    counts, done = prepare(settings)
    assert (counts.scan.listed, counts.scan.bad, counts.masks, done.images, done.left_out) == (5, 0, 5, 5, 0)
    prepared = PreparedSet.open(settings.prepared)
    assert prepared.has_masks and is_current(settings)

    masks = []
    for visit in range(1 if mode == "latents" else 5):
        for rows in all_rows(prepared, None if mode == "latents" else partial(moved, visit)):
            assert rows.masks is not None
            seen = 255 - shown(rows) if make in ALPHA else shown(rows)
            assert np.abs(rows.masks - seen).max() < TOLERANCE
            assert rows.masks.std() > 10
            masks += [mask / 255 for mask in rows.masks]
    if mode == "latents":
        assert done.masks is not None and done.masks[:2] == (5, 5)
        mean = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
        assert abs(done.masks.trained - mean) < 0.05  # weighed by images, or by area
    assert mask_counts(prepared) == done.masks
    # Nothing is read where it is not asked for.
    assert prepared.read("train", 0, np.array([0])).masks is None


def test_images_without_a_mask_are_trained_in_full(tmp_path: Path) -> None:
    source = beside(tmp_path)
    (tmp_path / "photos/sub/2-masklabel.png").unlink()
    write_crops(tmp_path / "others", 6)
    both = (source, FolderSource(path=tmp_path / "others", masks="alpha"))
    settings = settings_for(tmp_path / "prepared", sources=both)
    counts, done = prepare(settings)
    assert (counts.masks, counts.new_rows) == (4, 11)
    assert "4 of 11 new images have a mask, the others are trained in full" in describe_plan(counts, settings.prepared)
    assert done.masks is not None and (done.masks.images, done.masks.masked) == (11, 4)
    full = {key for rows in all_rows(PreparedSet.open(settings.prepared)) for key in _full(rows)}
    assert full == {"photos/sub/2", *(f"others/crop-0-{i:03d}" for i in range(6))}


def test_a_catalogue_from_before_there_were_masks_is_read(tmp_path: Path) -> None:
    write_crops(tmp_path / "plain", 4)
    settings = settings_for(tmp_path / "prepared", tmp_path / "plain")
    prepare(settings)
    with open_catalog(tmp_path / "prepared") as connection:
        connection.executescript(
            """DROP TABLE removed; DROP TABLE dirty; DROP INDEX shards_by_rows; DROP INDEX renamed_by_shard;
            ALTER TABLE rows DROP COLUMN content; ALTER TABLE rows DROP COLUMN stored_key;
            ALTER TABLE shards DROP COLUMN resolution; ALTER TABLE shards DROP COLUMN held_h;
            ALTER TABLE shards DROP COLUMN held_w; ALTER TABLE rows DROP COLUMN mask; PRAGMA user_version = 2;"""
        )
    assert is_current(settings)
    again, done = prepare(settings)
    assert (again.scan.known, again.scan.new, done.snapshot) == (4, 0, "000001.json")
    _, done = prepare(settings_for(tmp_path / "prepared", sources=(*settings.sources, beside(tmp_path))))
    assert done.images == 9 and done.masks is not None and done.masks.masked == 5


def _full(rows: Rows) -> list[str]:
    assert rows.masks is not None
    return [key for key, mask in zip(rows.keys, rows.masks, strict=True) if (mask == 255).all()]


@pytest.mark.parametrize("mode", ["latents", "images"])
def test_a_bad_mask_is_one_line_and_can_be_mended(tmp_path: Path, mode: str) -> None:
    settings = settings_for(tmp_path / "prepared", sources=(beside(tmp_path),), mode=mode)
    folder = tmp_path / "photos/sub"
    whole = (folder / "3-masklabel.png").read_bytes()
    (folder / "0-masklabel.png").write_bytes(b"")
    pattern(1).resize((150, 100)).save(folder / "1-masklabel.png")
    (folder / "2-masklabel.png").write_text("a web page")
    (folder / "3-masklabel.png").write_bytes(whole[:-300])  # which only decoding tells
    _, done = prepare(settings)
    lines = [json.loads(line) for line in (settings.prepared / "bad.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    expected = {
        "photos/sub/0": "its mask is empty",
        "photos/sub/1": "its mask is 150x100 px, no size of the image as displayed, 150x150 px",
        "photos/sub/2": "its mask is not an image of a known kind",
    }
    if mode == "latents":
        expected["photos/sub/3"] = "its mask cannot be decoded: image file is truncated"
    assert reasons.keys() == expected.keys() and all(reasons[key].startswith(expected[key]) for key in expected)
    assert done.images == 5 - len(expected)
    if mode == "images":
        prepared = PreparedSet.open(settings.prepared)
        problems = []
        for bucket, count in enumerate(prepared.rows_per_bucket("train")):
            rows = prepared.read("train", bucket, np.arange(count), with_masks=True)
            problems += rows.problems
            assert rows.masks is not None and not rows.masks[~rows.ok].any()
        (problem,) = problems
        assert problem.file == str(folder / "3-masklabel.png")
        assert problem.reason.startswith("its mask cannot be decoded")
    # Nothing is looked at again before the mask's file changes; then all are taken.
    again, done = prepare(settings)
    assert (again.scan.new, again.scan.changed, again.scan.bad) == (0, 0, len(expected))
    for i in range(4):
        pattern(i).save(folder / f"{i}-masklabel.png")
    again, done = prepare(settings)
    assert (again.scan.new, again.scan.bad, done.images, done.left_out) == (len(expected), 0, 5, 0)


def test_changed_masks_are_counted(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", sources=(beside(tmp_path),))
    prepare(settings)
    pattern(2).resize((45, 105)).save(tmp_path / "photos/sub/2-masklabel.png")
    (tmp_path / "photos/sub/4-masklabel.png").unlink()
    again, _ = prepare(settings)
    assert (again.scan.new, again.scan.changed, again.scan.known) == (0, 2, 3)


def test_switching_masks_on_asks_for_another_folder(tmp_path: Path) -> None:
    source = beside(tmp_path)
    without = FolderSource(path=tmp_path / "photos")
    settings = settings_for(tmp_path / "prepared", sources=(without,))
    counts, done = prepare(settings)
    # Masks are no images, whether they are used or not; a set without masks has none of their keys.
    assert (counts.scan.listed, counts.masks, done.masks) == (5, None, None)
    assert counts.scan.ignored["(mask that is not used)"] == 5
    stored = json.loads((settings.prepared / "settings.json").read_text())
    assert not [key for key in stored["data.sources"][0] if key.startswith("mask")]
    assert not PreparedSet.open(settings.prepared).has_masks
    for before, after, said in ((settings, source, ('"none"', '"files"')), (None, without, ('"files"', '"none"'))):
        if before is None:
            prepare(settings_for(tmp_path / "with", sources=(source,)))
        folder = tmp_path / ("prepared" if before else "with")
        with pytest.raises(UserError) as caught:
            is_current(settings_for(folder, sources=(after,)))
        first, mend = caught.value.lines
        assert f"was prepared with data.sources[0].masks = {said[0]}, the configuration has {said[1]}" in first
        assert "give another folder" in mend


def test_a_source_with_masks_is_appended_to_a_set_without(tmp_path: Path) -> None:
    write_crops(tmp_path / "plain", 4)
    plain = FolderSource(path=tmp_path / "plain")
    prepare(settings_for(tmp_path / "prepared", sources=(plain,)))
    before = {path: path.read_bytes() for path in (tmp_path / "prepared/shards").rglob("*.safetensors")}
    _, done = prepare(settings_for(tmp_path / "prepared", sources=(plain, beside(tmp_path))))
    assert done.images == 9 and all(path.read_bytes() == content for path, content in before.items())
    full = [key for rows in all_rows(PreparedSet.open(tmp_path / "prepared")) for key in _full(rows)]
    assert sorted(full) == [f"plain/crop-0-{i:03d}" for i in range(4)]


def test_interrupted_and_shared_work_gives_the_same_shards(tmp_path: Path) -> None:
    source = beside(tmp_path)
    for i in range(5, 25):
        pattern(i).convert("RGB").save(tmp_path / f"photos/{i}.png")
        pattern(i).save(tmp_path / f"photos/{i}-masklabel.png")
    contents = []
    for name, batch in (("one", 1), ("three", 3)):
        settings = settings_for(tmp_path / name, sources=(source,))
        plan_prepare(settings, show_progress=False)
        encode_shards(tmp_path / name, 0, 1, pooled, vae_batch_size=batch, decode_threads=batch)
        commit(tmp_path / name)
        shards = sorted((tmp_path / name / "shards").rglob("*.safetensors"))
        contents.append([shard.read_bytes() for shard in shards])
    assert contents[0] == contents[1] and len(contents[0]) >= 5


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["latents", "images"])
def test_a_flipped_bit_of_a_mask_is_found(tmp_path: Path, mode: str) -> None:
    settings = settings_for(tmp_path / "prepared", sources=(beside(tmp_path),), mode=mode)
    prepare(settings)
    prepared = PreparedSet.open(settings.prepared)
    assert verify(prepared, 1, lambda *_: None).damages == 0
    shard = next(iter((settings.prepared / "shards").rglob("*.safetensors")))
    content = shard.read_bytes()
    header = json.loads(content[8:4096])
    section = "masks" if mode == "latents" else "mask_references"
    damaged = bytearray(content)
    damaged[4096 + header[section]["data_offsets"][0] + 1] ^= 4
    shard.write_bytes(bytes(damaged))
    (damage,) = verify(PreparedSet.open(settings.prepared), 1, lambda *_: None).first
    reason = "checksum mismatch in the mask" if mode == "latents" else "checksum mismatch in the caption, key or sizes"
    assert damage.reason == reason and damage.row in (0, -1)
