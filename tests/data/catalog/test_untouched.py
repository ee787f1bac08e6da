"""A look that would find nothing is not taken; whatever may have changed is looked at."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.kohya_files import entry, kohya_npz, settings_of, write_files, write_metadata
from tests.data.photographs import settings_for, write_crops
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.config.sections.data.sources import KohyaJsonSource
from trainer.data.catalog.catalog import open_catalog
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.catalog.untouched import found_before, stamp_of
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import forget_plan, plan_prepare


def _untouched(settings: PrepareSettings) -> bool:
    with open_catalog(settings.prepared) as connection:
        return found_before(connection, stamp_of(settings)) is not None


def _prepare(settings: PrepareSettings, **options: Any) -> tuple[int, int, int, int, int]:
    counts = plan_prepare(settings, show_progress=False, **options).scan
    encode_shards(settings.prepared, 0, 1, None)
    commit(settings.prepared)
    return counts.listed, counts.new, counts.known, counts.captions, counts.removed


@pytest.fixture
def settings(tmp_path: Path) -> PrepareSettings:
    """Forty entries, of which two have no latents, in three folders."""
    latents = tmp_path / "latents"
    for folder in range(3):
        numbers = range(folder, 40, 3)
        write_files(latents / f"{folder}", {f"{i}.npz": kohya_npz(i) for i in numbers if i not in (7, 8)})
    write_metadata(tmp_path / "meta.json", {f"{i % 3}/{i}": entry(i) for i in range(40)})
    source = KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=latents)
    return settings_of(tmp_path / "prepared", source)


def test_what_has_not_changed_is_not_listed_and_counts_as_it_did(settings: PrepareSettings) -> None:
    assert _prepare(settings) == (40, 38, 0, 0, 0)
    assert _untouched(settings)
    bad = (settings.prepared / "bad.jsonl").read_bytes()
    assert _prepare(settings) == _prepare(settings, look_again=True) == (40, 0, 38, 0, 0)
    assert (settings.prepared / "bad.jsonl").read_bytes() == bad


def test_whatever_may_have_changed_is_looked_at(settings: PrepareSettings, tmp_path: Path) -> None:
    _prepare(settings)
    latents, metadata = tmp_path / "latents", tmp_path / "meta.json"
    write_files(latents / "1", {"7.npz": kohya_npz(7)})  # latents that were missing
    assert _prepare(settings) == (40, 1, 38, 0, 0)
    fields = json.loads(metadata.read_text())
    fields["0/3"]["caption"] = "another"
    metadata.write_text(json.dumps(fields))
    assert _prepare(settings) == (40, 0, 39, 1, 0)
    (latents / "2" / "5.npz").unlink()
    assert _prepare(settings) == (40, 0, 38, 0, 0)  # listed, but of no use
    assert _untouched(settings)
    (latents / "new").mkdir()
    assert not _untouched(settings)
    _prepare(settings)
    repeated = replace(settings, sources=(settings.sources[0].model_copy(update={"repeats": 2}),))
    assert not _untouched(repeated) and _untouched(settings)
    filtered = replace(settings, filters=FiltersConfig(min_caption_chars=3))
    assert stamp_of(filtered) is None
    (latents / "link").symlink_to(latents / "0")
    assert stamp_of(settings) is None
    (latents / "link").unlink()
    shutil.rmtree(latents)
    assert stamp_of(settings) is None


def test_what_is_left_to_be_done_is_no_look_to_the_end(settings: PrepareSettings, tmp_path: Path) -> None:
    _prepare(settings, limit=10)
    assert not _untouched(settings)
    plan_prepare(settings, show_progress=False)
    assert _untouched(settings)
    forget_plan(settings.prepared)  # as where too many captions are missing
    assert not _untouched(settings)
    _prepare(settings)
    fields = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({key: fields[key] for key in list(fields)[:20]}))
    _prepare(settings, removed="keep")
    assert not _untouched(settings)
    assert _prepare(settings, removed="drop")[4] > 10
    _prepare(settings)
    assert _untouched(settings)


def test_folders_of_images_are_always_looked_at(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 3)
    assert stamp_of(settings_for(tmp_path / "prepared", tmp_path / "photos")) is None
