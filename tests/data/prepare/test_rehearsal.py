"""`prepare --dry-run` where its copy has no room: the disk that is full is named, not the one of the set."""

import tempfile
from pathlib import Path

import pytest

from tests.data.photographs import settings_for, write_crops
from trainer.data.catalog import catalog
from trainer.data.prepare.rehearsal import rehearsed
from trainer.data.prepare.stages import plan_prepare
from trainer.errors import UserError


def test_a_full_disk_is_that_of_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    (tmp_path / "small").mkdir()
    write_crops(tmp_path / "photos", 4)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos")
    plan_prepare(settings, show_progress=False)
    with pytest.raises(UserError) as told, rehearsed(settings) as copy, catalog.open_catalog(copy.prepared) as rows:
        rows.execute("PRAGMA max_page_count = 1")  # SQLite then fails as on a full disk
        with catalog.transaction(rows):
            rows.execute("CREATE TABLE more AS SELECT hex(zeroblob(100000))")
    (line,) = told.value.lines
    assert f"a copy of {settings.prepared / 'catalog.sqlite'}" in line
    assert f"not room enough in {tmp_path / 'small'}; name a folder with room, such as TMPDIR={tmp_path}" in line
    assert "Make room" not in line and not any((tmp_path / "small").iterdir())


def test_a_mistake_is_told_of_the_prepared_folder(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 4)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos")
    with pytest.raises(UserError, match=f"^{settings.prepared}/x: wrong$"), rehearsed(settings) as copy:
        raise UserError(f"{copy.prepared}/x: wrong")
