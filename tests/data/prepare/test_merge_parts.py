"""Parts of a set that hosts have encoded on drives of their own are merged into what one host would have made."""

import shutil
from pathlib import Path

import pytest

from tests.data.photographs import pooled, settings_for, write_crops
from tests.data.prepare.test_changes import held, name, prepare, remove
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.merge_parts import take_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.errors import UserError


def encode_part(folder: Path, photos: Path, part: int, parts: int, **changes: object) -> int:
    settings = settings_for(folder, photos, **changes)
    plan_prepare(settings, show_progress=False)
    return encode_shards(folder, 0, 1, pooled, part=(part, parts))


def finished(prepared: Path) -> dict[str, bytes]:
    files = [*prepared.glob("shards/*/*"), *prepared.glob("snapshots/*"), prepared / "CURRENT"]
    return {path.relative_to(prepared).as_posix(): path.read_bytes() for path in files}


def test_parts_on_drives_of_their_own(tmp_path: Path) -> None:
    photos, one = tmp_path / "photos", tmp_path / "one"
    write_crops(photos, 48)
    prepare(settings_for(one, photos))
    folders = [tmp_path / f"host{number}" for number in (1, 2, 3)]
    counts = [encode_part(folder, photos, number, 3) for number, folder in enumerate(folders, 1)]
    assert min(counts) >= 3 and sum(counts) == len(list(one.glob("shards/*/*")))
    with pytest.raises(UserError, match=rf"{counts[1]} of {sum(counts)} shards are in none of the folders, such as"):
        plan_prepare(settings_for(tmp_path / "merged", photos), show_progress=False)
        take_shards(tmp_path / "merged", [folders[0], folders[2]])
    said = take_shards(tmp_path / "merged", folders)
    assert said == f"merged: {counts[1]} shards taken from 3 folders"  # the others were kept
    commit(tmp_path / "merged")
    assert finished(tmp_path / "merged") == finished(one)
    take_shards(folders[0], folders[1:])  # into one of them
    commit(folders[0])
    assert finished(folders[0]) == finished(one) and held(folders[0]) == held(one)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 24)
    encode_part(tmp_path / "a", photos, 1, 2)
    encode_part(tmp_path / "b", photos, 2, 2, validation_fraction=0.1)
    with pytest.raises(UserError, match=r"b: was prepared with another data\.validation_fraction than .*/a"):
        take_shards(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(UserError, match="nothing has been planned there yet"):
        take_shards(tmp_path / "a", [tmp_path / "nowhere"])
    shutil.rmtree(tmp_path / "b")
    for i in range(3):
        remove(photos, name(i))
    encode_part(tmp_path / "b", photos, 2, 2)
    with pytest.raises(UserError, match=r"such as photos/crop-0-00.: its host saw other sources"):
        take_shards(tmp_path / "a", [tmp_path / "b"])
    encode_part(tmp_path / "c", photos, 2, 2)
    (shard, *_) = (tmp_path / "c").glob("shards/*/*")
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match="its header tells another number; encode that part again"):
        take_shards(tmp_path / "a", [tmp_path / "c"])
