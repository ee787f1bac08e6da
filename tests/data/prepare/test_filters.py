"""Images that filters leave out: judged anew at each prepare, listed, and back without encoding."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.kohya_files import entry, kohya_npz, settings_of, write_files, write_metadata
from tests.data.photographs import astronaut, settings_for, write_crops
from tests.data.prepare.test_changes import caption, held, name, prepare, remove, rename
from tests.data.records import caption_text
from trainer.cli.prepare_messages import describe_plan
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.config.sections.data.sources import FolderSource, KohyaJsonSource, ParquetSource
from trainer.data.captions import PLAIN, compose
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.images import image_hw
from trainer.data.prepare.stages import is_current
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError


def filtered(settings: PrepareSettings, **filters: Any) -> PrepareSettings:
    return replace(settings, filters=FiltersConfig(**filters))


def left_out(prepared: Path) -> dict[str, str]:
    if not (prepared / "left-out.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (prepared / "left-out.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"path", "key", "reason"} and Path(line["path"]).exists() for line in lines)
    return {line["key"]: line["reason"] for line in lines}


def texts_of(prepared: Path) -> dict[str, str]:
    opened = PreparedSet.open(prepared)
    read = [opened.read("train", b, np.arange(n)) for b, n in enumerate(opened.rows_per_bucket("train"))]
    return {
        key: compose(text, PLAIN, 0, 0) for rows in read for key, text in zip(rows.keys, rows.captions, strict=True)
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_crops(tmp_path / "photos", 60)
    return tmp_path / "photos"


def sides(photos: Path) -> dict[str, tuple[int, int]]:
    return {f"photos/{path.stem}": image_hw(path) for path in photos.glob("*.jpg")}


def test_filters_go_on_change_and_off_without_encoding(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    _, first, _ = prepare(plain)
    whole, sizes = held(plain.prepared), sides(photos)
    small = {key for key, size in sizes.items() if min(size) < 120}
    wide = {key for key, (height, width) in sizes.items() if width / height > 1.2}
    assert 5 < len(small) < 55 and wide - small and small - wide
    by_side = filtered(plain, min_side_px=120)
    assert is_current(plain) and not is_current(by_side)
    counts, done, encoded = prepare(by_side)
    assert not encoded and done.images == 60 - len(small) and counts.scan.filtered == {"shorter side": len(small)}
    assert (counts.scan.known, counts.scan.new, counts.scan.removed) == (60 - len(small), 0, 0)
    assert held(plain.prepared) == {key: row for key, row in whole.items() if key not in small}
    reasons = left_out(plain.prepared)
    assert reasons.keys() == small
    key = min(small)
    assert reasons[key] == f"its shorter side is {min(sizes[key])} px; data.filters.min_side_px = 120"
    line = f"filters leave out {len(small)}: {len(small)} shorter side; all in {plain.prepared}/left-out.jsonl"
    assert line in describe_plan(counts, plain.prepared)
    # Again: nothing changes.
    counts, again, encoded = prepare(by_side)
    assert is_current(by_side) and again == done and not encoded and left_out(plain.prepared) == reasons
    # Another filter, which lets some in and leaves others out.
    by_shape = filtered(plain, max_aspect=1.2)
    counts, done, encoded = prepare(by_shape)
    assert not encoded and counts.scan.back == len(small - wide) and left_out(plain.prepared).keys() == wide
    assert held(plain.prepared) == {key: row for key, row in whole.items() if key not in wide}
    counts, done, encoded = prepare(plain)
    assert not encoded and counts.scan.back == len(wide) and not (plain.prepared / "left-out.jsonl").exists()
    assert held(plain.prepared) == whole
    assert held(plain.prepared, first.snapshot) == whole


def test_what_was_never_encoded_is_so_when_it_is_let_in(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    small = {key for key, size in sides(photos).items() if min(size) < 120}
    counts, done, encoded = prepare(filtered(plain, min_side_px=120))
    assert len(encoded) == done.images == 60 - len(small) == counts.scan.new
    _, done, encoded = prepare(filtered(plain, min_side_px=121))
    assert not encoded
    counts, done, encoded = prepare(plain)
    assert len(encoded) >= len(small) == counts.scan.new and done.images == 60
    prepare(settings_for(tmp_path / "anew", photos))
    assert held(plain.prepared) == held(tmp_path / "anew")


def test_captions_and_tags_decide_and_may_be_edited(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 12)
    texts = ["cat, sofa", "dog, sofa", "cat, blurry", "tree", "", "cat,dog, long tail", *["sky, cat"] * 6]
    for i, text in enumerate(texts):
        caption(photos, name(i), text)
    source = FolderSource(path=photos, caption_files_hold="tags")
    plain = settings_for(tmp_path / "prepared", sources=(source,))
    prepare(plain)
    wanted = filtered(plain, tags_include=["cat", "dog"], tags_exclude=["blurry"], max_caption_chars=15)
    counts, done, encoded = prepare(wanted)
    assert counts.scan.filtered == {"tags": 3, "caption length": 1} and done.images == 8 and not encoded
    reasons = left_out(plain.prepared)
    assert reasons[f"photos/{name(2)}"] == "has the tag blurry, which data.filters.tags_exclude names"
    assert reasons[f"photos/{name(3)}"] == "has none of the tags of data.filters.tags_include"
    assert reasons[f"photos/{name(5)}"] == "its caption has 18 characters; data.filters.max_caption_chars = 15"
    caption(photos, name(3), "tree, dog")
    caption(photos, name(0), "sofa")
    counts, done, encoded = prepare(wanted)
    assert left_out(plain.prepared).keys() == reasons.keys() - {f"photos/{name(3)}"} | {f"photos/{name(0)}"}
    assert not encoded and counts.scan.back == 1
    assert texts_of(plain.prepared)[f"photos/{name(3)}"] == "tree, dog"
    caption(photos, name(0), "sofa, cat")
    prepare(wanted)
    _, done, encoded = prepare(plain)
    assert not encoded and done.images == 12 and texts_of(plain.prepared)[f"photos/{name(0)}"] == "sofa, cat"


def test_what_is_filtered_has_not_vanished(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    prepare(plain)
    whole, sizes = held(plain.prepared), sides(photos)
    most = sorted(sizes, key=lambda key: min(sizes[key]))[:50]
    limit = min(sizes[most[-1]]) + 1
    by_side = filtered(plain, min_side_px=limit)
    gone = {key for key, size in sizes.items() if min(size) < limit}
    # Renamed and filtered at once, and one is deleted.
    moved = [key.partition("/")[2] for key in sorted(gone)[:20]]
    for one in moved:
        rename(photos, one, f"renamed {one}")
    deleted = max(sizes.keys() - gone)
    remove(photos, deleted.partition("/")[2])
    _, done, encoded = prepare(by_side)
    assert not encoded and done.images == 60 - len(gone) - 1
    assert {f"photos/renamed {one}" for one in moved} < left_out(plain.prepared).keys()
    # Of those that are left out some go for good, which nobody is asked about.
    for one in moved[:5]:
        remove(photos, f"renamed {one}")
    prepare(by_side)
    assert len(left_out(plain.prepared)) == len(gone) - 5
    _, done, encoded = prepare(plain)
    assert not encoded and done.images == 54
    kept = {f"photos/renamed {one}": whole[f"photos/{one}"] for one in moved[5:]}
    assert kept.items() < held(plain.prepared).items()


def test_filters_that_leave_nothing_are_told(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    prepare(plain)
    whole = held(plain.prepared)
    with pytest.raises(UserError, match=r"data.filters leaves none of 60 images, see .*/left-out.jsonl"):
        prepare(filtered(plain, min_side_px=1000))
    _, done, encoded = prepare(plain)
    assert not encoded and done.images == 60 and held(plain.prepared) == whole


def test_a_changed_picture_is_judged_by_what_it_is_now(photos: Path, tmp_path: Path) -> None:
    by_side = filtered(settings_for(tmp_path / "prepared", photos), min_side_px=60)
    prepare(by_side)
    astronaut().resize((50, 80)).save(photos / f"{name(3)}.jpg")
    _, done, encoded = prepare(by_side)
    assert not encoded and done.images == 59 and left_out(by_side.prepared).keys() == {f"photos/{name(3)}"}
    astronaut().resize((80, 80)).save(photos / f"{name(3)}.jpg")
    counts, done, encoded = prepare(by_side)
    assert len(encoded) == 1 and done.images == 60 and not left_out(by_side.prepared)
    (photos / f"{name(3)}.jpg").write_bytes(b"no picture")
    counts, done, _ = prepare(by_side)
    assert (counts.scan.bad, done.images) == (1, 59)


def test_references_to_latents_come_back_as_references(tmp_path: Path) -> None:
    write_files(tmp_path / "npz", {f"{i}.npz": kohya_npz(i) for i in range(12)})
    scores = {str(i): entry(i) | {"score": None if i == 11 else i / 2} for i in range(12)}
    write_metadata(tmp_path / "meta.json", scores)
    source = KohyaJsonSource(
        type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "npz", score_field="score"
    )
    plain = settings_of(tmp_path / "prepared", source)
    prepare(plain)

    def rows() -> dict[str, bytes]:
        opened = PreparedSet.open(plain.prepared)
        read = [opened.read("train", b, np.arange(n)) for b, n in enumerate(opened.rows_per_bucket("train"))]
        assert all(rows.ok.all() for rows in read), [rows.problems[:2] for rows in read]
        return {key: r.latents[i].tobytes() for r in read for i, key in enumerate(r.keys)}  # type: ignore[index]

    whole = rows()
    for _ in range(3):
        counts, done, encoded = prepare(filtered(plain, min_score=2.0, max_score=4.5))
        assert counts.scan.filtered == {"score": 6} and done.images == 6 and not encoded
        assert left_out(plain.prepared)["meta/0"] == "its score is 0; data.filters.min_score = 2.0"
        assert left_out(plain.prepared)["meta/11"] == "has no score; data.filters.min_score = 2.0"
        counts, done, encoded = prepare(plain)
        assert done.images == 12 and not encoded and rows() == whole


def test_cells_of_a_table_come_back_without_encoding(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 10)
    files = sorted((tmp_path / "photos").glob("*.jpg"))
    table = pa.table({"image": [file.read_bytes() for file in files], "caption": [str(i) for i in range(10)]})
    pq.write_table(table, tmp_path / "t.parquet")
    plain = settings_for(tmp_path / "prepared", sources=(ParquetSource(type="parquet", files=tmp_path / "t.parquet"),))
    prepare(plain)
    whole = held(plain.prepared)
    counts, done, encoded = prepare(filtered(plain, min_side_px=120))
    assert 0 < counts.scan.filtered["shorter side"] < 10 and not encoded
    counts, done, encoded = prepare(plain)
    assert not encoded and done.images == 10 and held(plain.prepared) == whole


def test_a_set_without_filters_is_as_it_was(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    prepare(plain)
    assert "data.filters" not in (plain.prepared / "settings.json").read_text()
    names = Counter(path.name for path in plain.prepared.iterdir())
    assert "left-out.jsonl" not in names
    shutil.copytree(plain.prepared, tmp_path / "copy")
    both = filtered(plain, min_side_px=120, tags_exclude=["x"])
    prepare(both)
    stored = json.loads((plain.prepared / "settings.json").read_text())
    assert stored["data.filters"] == {"min_side_px": 120, "tags_exclude": ["x"], "tag_separators": [","]}
    prepare(plain)
    settings = (plain.prepared / "settings.json").read_text()
    assert settings == (tmp_path / "copy/settings.json").read_text()
    assert caption_text('{"caption":"","score":1.0}') == ""
