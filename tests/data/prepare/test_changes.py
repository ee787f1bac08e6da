"""A set that changes: what the next snapshot holds is what lies in the sources, and only new pixels are encoded."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.photographs import coffee, pooled, settings_for, write_crops
from tests.data.records import caption_text
from trainer.config.sections.data.sources import FolderSource, ParquetSource
from trainer.data.catalog.catalog import open_catalog
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import PrepareCounts, is_current, plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError

ROOT = Path(__file__).parents[3]


def prepare(settings: PrepareSettings, **options: Any) -> tuple[PrepareCounts, Committed, list[str]]:
    """What was found, what came of it, and how many images were encoded for it, by a list of their seeds."""
    encoded: list[int] = []

    def encode(pixels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        encoded.extend(seeds.tolist())
        return pooled(pixels, seeds)

    counts = plan_prepare(settings, show_progress=False, **options)
    encode_shards(settings.prepared, 0, 1, encode, vae_batch_size=2)
    return counts, commit(settings.prepared), [str(seed) for seed in encoded]


def held(prepared: Path, snapshot: str | None = None) -> dict[str, tuple[str, int, bytes]]:
    """What an epoch sees: of each key the text, how often, and the latents without their noise."""
    opened, found = PreparedSet.open(prepared, snapshot), {}
    times: Counter[str] = Counter()
    for split in ("train", "validation"):
        for bucket, count in enumerate(opened.rows_per_bucket(split)):
            rows = opened.read(split, bucket, np.arange(count))
            assert rows.ok.all() and not rows.problems and rows.latents is not None
            for i, key in enumerate(rows.keys):
                assert rows.repeat[i] == times[key]
                times[key] += 1
                found[key] = (caption_text(rows.captions[i]), times[key], rows.latents[i, :3].tobytes())
    return found


def lying(folder: Path, scratch: Path, repeats: int = 1) -> dict[str, tuple[str, int, bytes]]:
    """The same of a set that is made anew of what lies in the folder."""
    shutil.rmtree(scratch, ignore_errors=True)
    prepare(settings_for(scratch, sources=(FolderSource(path=folder, name="photos", repeats=repeats),)))
    return held(scratch)


def caption(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def rename(folder: Path, before: str, after: str) -> None:
    for ending in (".jpg", ".txt"):
        (folder / f"{before}{ending}").rename(folder / f"{after}{ending}")


def change(folder: Path, name: str, tone: int) -> None:
    """Another picture of another size under the same name."""
    coffee().crop((tone, 0, tone + 90, 140)).save(folder / f"{name}.jpg")


def remove(folder: Path, name: str) -> None:
    for ending in (".jpg", ".txt"):
        (folder / f"{name}{ending}").unlink()


def name(number: int) -> str:
    return f"crop-0-{number:03d}"


def edit_all(folder: Path) -> None:
    """Ten captions, five removed, five changed, five renamed, ten added."""
    for i in range(10):
        caption(folder, name(i), f"another text {i} ☕")
    for i in range(10, 15):
        remove(folder, name(i))
    for i in range(15, 20):
        change(folder, name(i), i)
    rename(folder, name(20), "a-first")
    rename(folder, name(21), "zz-last")
    (folder / "sub").mkdir()
    rename(folder, name(22), "sub/deep")
    rename(folder, name(23), name(22))  # into the place that another one has left
    rename(folder, name(24), name(24) + " é")
    caption(folder, name(24) + " é", "renamed and captioned anew")
    write_crops(folder, 10, seed=7)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_crops(tmp_path / "photos", 200)
    return tmp_path / "photos"


def test_one_prepare_takes_up_all_changes_and_encodes_what_is_new(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    _, first, encoded = prepare(settings)
    assert first.images == len(encoded) == 200
    before, shards = held(settings.prepared), {p: p.read_bytes() for p in settings.prepared.glob("shards/*/*")}
    edit_all(photos)
    settings = settings_for(tmp_path / "prepared", sources=(FolderSource(path=photos, repeats=3),))
    assert not is_current(settings)
    counts, second, encoded = prepare(settings)
    scan = counts.scan
    assert (scan.new, scan.changed, scan.captions, scan.renamed, scan.removed) == (10, 5, 10, 5, 5)
    assert scan.repeats == 185 and (scan.bad, scan.back, scan.moved, scan.kept) == (0, 0, 0, 0)
    assert len(encoded) == 15
    assert second.images == 205 and second.virtual_rows == 615
    assert held(settings.prepared) == lying(photos, tmp_path / "anew", repeats=3)
    # A run in the middle of its epoch goes on with what it began with.
    assert held(settings.prepared, first.snapshot) == before
    assert all(path.read_bytes() == content for path, content in shards.items())
    # Nothing new: no further snapshot.
    again, third, encoded = prepare(settings)
    assert is_current(settings) and third == second and not encoded
    assert again.scan.known == 205 and again.scan.captions == again.scan.repeats == 0


def test_what_comes_back_is_not_encoded_again(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    whole, aside = held(settings.prepared), tmp_path / "aside"
    aside.mkdir()
    for i in range(8):
        for ending in (".jpg", ".txt"):
            shutil.copy2(photos / f"{name(i)}{ending}", aside)
        remove(photos, name(i))
    counts, done, _ = prepare(settings)
    assert counts.scan.removed == 8 and done.images == 192
    for i in range(8):  # as copies, which are of another time
        shutil.copy(aside / f"{name(i)}.jpg", photos)
        shutil.copy(aside / f"{name(i)}.txt", photos)
    counts, done, encoded = prepare(settings)
    assert (counts.scan.back, counts.scan.new, len(encoded)) == (8, 0, 0)
    assert done.images == 200 and held(settings.prepared) == whole
    change(photos, name(3), 5)  # and the first picture again, which is still stored
    assert len(prepare(settings)[2]) == 1
    shutil.copy(aside / f"{name(3)}.jpg", photos)
    assert not prepare(settings)[2] and held(settings.prepared) == whole


def test_names_that_change_in_a_circle(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    for _ in range(3):
        rename(photos, name(5), "free")
        for i in (6, 7, 8):
            rename(photos, name(i), name(i - 1))
        rename(photos, "free", name(8))
        counts, _, encoded = prepare(settings)
        assert not encoded and counts.scan.removed == 0
        assert held(settings.prepared) == lying(photos, tmp_path / "anew")


def test_a_touched_file_is_the_same_image(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    _, first, _ = prepare(settings)
    for path in photos.iterdir():
        os.utime(path)
    counts, second, encoded = prepare(settings)
    assert not encoded and counts.scan.known == 200 and counts.scan.captions == 0
    assert second.snapshot == first.snapshot


@pytest.mark.parametrize("how", ["all", "some", "one"])
def test_a_drive_that_is_not_mounted_is_no_removal(photos: Path, tmp_path: Path, how: str) -> None:
    write_crops(tmp_path / "more", 5, seed=3)
    settings = settings_for(tmp_path / "prepared", photos, tmp_path / "more")
    prepare(settings)
    whole = held(settings.prepared)
    gone = {"all": range(200), "some": range(11), "one": range(10)}[how]
    for i in gone:
        remove(photos, name(i))
    if how == "one":  # 5 % of 200
        assert prepare(settings)[0].scan.removed == 10
        return
    with pytest.raises(UserError, match=rf"{len(gone)} of its 200 prepared images are not there any more, such as .*/"):
        prepare(settings)
    counts, done, _ = prepare(settings, removed="keep")
    assert counts.scan.kept == len(gone) and done.images == 205 and held(settings.prepared) == whole
    counts, done, _ = prepare(settings, removed="drop")
    assert counts.scan.removed == len(gone) and done.images == 205 - len(gone)
    assert not any(key.startswith(f"photos/{name(3)}") for key in held(settings.prepared))


def test_sources_come_go_and_move(photos: Path, tmp_path: Path) -> None:
    write_crops(tmp_path / "more", 7, seed=3)
    prepared = tmp_path / "prepared"
    both = settings_for(prepared, photos, tmp_path / "more")
    prepare(both)
    whole = held(prepared)
    counts, done, _ = prepare(settings_for(prepared, tmp_path / "more"))  # by the configuration: no question
    assert counts.scan.removed == 200 and done.images == 7
    counts, done, encoded = prepare(settings_for(prepared, tmp_path / "more", photos))
    assert not encoded and counts.scan.back == 200 and held(prepared) == whole
    photos.rename(tmp_path / "elsewhere")
    moved = (FolderSource(path=tmp_path / "more"), FolderSource(path=tmp_path / "elsewhere", name="photos"))
    counts, done, encoded = prepare(settings_for(prepared, sources=moved))
    assert not encoded and (counts.scan.moved, counts.scan.removed) == (200, 0) and held(prepared) == whole
    # From one source into the other, which is not what the seven were found as.
    rename(tmp_path, f"more/crop-3-{2:03d}", "elsewhere/two")
    counts, done, encoded = prepare(settings_for(prepared, sources=moved))
    assert not encoded and counts.scan.renamed == 1
    (text, times, latents) = whole["more/crop-3-002"]
    assert held(prepared)["photos/two"] == (text, times, latents) and "more/crop-3-002" not in held(prepared)


def test_images_used_where_they_lie_may_move_with_their_set(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos, mode="images")
    prepare(settings)

    def pixels(prepared: Path) -> dict[str, bytes]:
        opened = PreparedSet.open(prepared)
        read = [opened.read("train", b, np.arange(n)) for b, n in enumerate(opened.rows_per_bucket("train"))]
        assert all(rows.ok.all() for rows in read), read[0].problems[:2]
        return {key: rows.pixels[i].tobytes() for rows in read for i, key in enumerate(rows.keys)}  # type: ignore[index]

    before = pixels(settings.prepared)
    new = tmp_path / "drive"
    new.mkdir()
    shutil.copytree(settings.prepared, new / "set")
    photos.rename(new / "pictures")
    sources = (FolderSource(path=new / "pictures", name="photos"),)
    moved = settings_for(new / "set", sources=sources, mode="images")
    counts, _, _ = prepare(moved)
    assert (counts.scan.moved, counts.scan.new, counts.scan.removed) == (200, 0, 0)
    assert len(list((new / "set" / "shards").iterdir())) == 1
    assert pixels(new / "set") == before
    caption(new / "pictures", name(4), "seen anew")
    change(new / "pictures", name(5), 5)
    counts, _, _ = prepare(moved)
    assert (counts.scan.captions, counts.scan.changed) == (1, 1)
    after = pixels(new / "set")
    assert {key for key in after if after[key] != before[key]} == {f"photos/{name(5)}"}


def test_with_cached_text_another_caption_is_another_row(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 12)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos", text_encoders="xxh3:00 fp32")

    def encode_text(records: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(caption_text(record)) for record in records], dtype=np.float32)
        return np.broadcast_to(lengths[:, None, None], (len(records), 3, 2)).copy(), np.stack([lengths] * 4, axis=1)

    def run() -> PreparedSet:
        plan_prepare(settings, show_progress=False)
        encode_shards(settings.prepared, 0, 1, pooled, encode_text)  # type: ignore[arg-type]
        commit(settings.prepared)
        return PreparedSet.open(settings.prepared)

    run()
    caption(tmp_path / "photos", name(3), "x" * 40)
    rename(tmp_path / "photos", name(5), "other")
    opened = run()
    assert opened.images("train") == 12
    for bucket, count in enumerate(opened.rows_per_bucket("train")):
        rows = opened.read("train", bucket, np.arange(count))
        assert rows.ok.all() and rows.text_pooled is not None
        assert rows.text_pooled[:, 0].tolist() == [len(caption_text(text)) for text in rows.captions]


def test_an_image_that_cannot_be_used_any_more_goes_and_is_mended(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    whole, intact = held(settings.prepared), (photos / f"{name(4)}.jpg").read_bytes()
    (photos / f"{name(4)}.jpg").write_bytes(b"no picture")
    counts, done, _ = prepare(settings)
    assert (counts.scan.bad, done.images, done.left_out) == (1, 199, 1)
    (photos / f"{name(4)}.jpg").write_bytes(intact)
    counts, done, encoded = prepare(settings)
    assert (counts.scan.back, len(encoded), done.left_out) == (1, 0, 0) and held(settings.prepared) == whole


def test_the_picture_of_a_mask_is_part_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(4):
        coffee().crop((i, 0, i + 150, 150)).save(tmp_path / "photos" / f"{i}.jpg")
        Image.new("L", (150, 150), 255).save(tmp_path / "photos" / f"{i}-masklabel.png")
    settings = settings_for(tmp_path / "prepared", sources=(FolderSource(path=tmp_path / "photos", masks="files"),))
    assert len(prepare(settings)[2]) == 4
    Image.new("L", (150, 150), 128).save(tmp_path / "photos" / "2-masklabel.png")
    counts, _, encoded = prepare(settings)
    assert counts.scan.changed == len(encoded) == 1


def test_a_source_that_is_gone_as_a_whole_may_be_kept_or_dropped(photos: Path, tmp_path: Path) -> None:
    write_crops(tmp_path / "more", 5, seed=3)
    settings = settings_for(tmp_path / "prepared", photos, tmp_path / "more")
    prepare(settings)
    whole = held(settings.prepared)
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(UserError, match=r"more\): there is no such folder"):
        prepare(settings)
    counts, _, _ = prepare(settings, removed="keep")
    assert counts.scan.kept == 5 and held(settings.prepared) == whole
    counts, done, _ = prepare(settings, removed="drop")
    assert counts.scan.removed == 5 and done.images == 200


def test_a_touched_and_moved_table_is_the_same_images(tmp_path: Path) -> None:
    """Copies have the time of the copying; cells have no file of their own to compare."""
    write_crops(tmp_path / "photos", 8)
    images = [(tmp_path / "photos" / f"{name(i)}.jpg").read_bytes() for i in range(8)]
    table = pa.table({"image": images, "caption": [f"cell {i}" for i in range(8)]})
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables" / "t.parquet", row_group_size=3)

    def settings(folder: str) -> PrepareSettings:
        source = ParquetSource(type="parquet", files=tmp_path / folder, caption_column="caption", name="cells")
        return settings_for(tmp_path / "prepared", sources=(source,))

    assert len(prepare(settings("tables"))[2]) == 8
    whole = held(tmp_path / "prepared")
    os.utime(tmp_path / "tables" / "t.parquet", (1, 1))
    counts, _, encoded = prepare(settings("tables"))
    assert not encoded and counts.scan.known == 8
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "tables" / "t.parquet", tmp_path / "copy")
    counts, _, encoded = prepare(settings("copy"))
    assert not encoded and counts.scan.moved == 8 and held(tmp_path / "prepared") == whole
    pq.write_table(table.slice(0, 7), tmp_path / "copy" / "t.parquet", row_group_size=3)
    assert len(prepare(settings("copy"))[2]) == 7, "another table is encoded anew"


def test_what_was_prepared_before_there_were_checksums_comes_back(photos: Path, tmp_path: Path) -> None:
    """By key and place, if the file has not changed; then it has a checksum, and is found under another name too."""
    write_crops(tmp_path / "more", 5, seed=3)
    both = settings_for(tmp_path / "prepared", photos, tmp_path / "more")
    prepare(both)
    whole = held(both.prepared)
    with open_catalog(both.prepared) as connection:
        connection.execute("UPDATE rows SET content = NULL")
    prepare(settings_for(tmp_path / "prepared", photos))
    counts, _, encoded = prepare(both)
    assert not encoded and counts.scan.back == 5 and held(both.prepared) == whole
    rename(tmp_path / "more", "crop-3-001", "renamed")
    counts, _, encoded = prepare(both)
    assert not encoded and counts.scan.renamed == 1


def test_a_set_without_its_catalogue_is_trained_on_but_not_changed(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    whole = held(settings.prepared)
    shutil.copytree(settings.prepared, tmp_path / "copy", ignore=shutil.ignore_patterns("catalog.sqlite*"))
    photos.rename(tmp_path / "elsewhere")
    copy = settings_for(tmp_path / "copy", tmp_path / "elsewhere")
    assert is_current(copy) and not (tmp_path / "copy" / "catalog.sqlite").exists()
    write_crops(tmp_path / "elsewhere", 3, seed=9)
    for _ in range(2):
        with pytest.raises(UserError, match=r"copy\): its catalog\.sqlite is missing"):
            prepare(copy)
    assert held(copy.prepared) == whole
