"""Room on the disk before a run and during it."""

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.host.disk_room import DiskAlarm, folder_bytes, free_bytes, require_room, shared_memory_warning

GB = 10**9


def test_what_is_kept_must_fit_and_what_is_there_already_counts(tmp_path: Path) -> None:
    run_dir = tmp_path / "not/there/yet"
    size = free_bytes(run_dir) // 4  # room for four, so for three and a half
    require_room([run_dir], size, held=0, keep=2, to_write=100)
    with pytest.raises(UserError, match=r"4 more checkpoints .*, and a little more, need"):
        require_room([run_dir], size, held=0, keep=3, to_write=100)
    require_room([run_dir], size, held=1, keep=3, to_write=100)
    require_room([run_dir], size, held=0, keep=10, to_write=3)
    require_room([run_dir], 2 * size, held=5, keep=2, to_write=100)
    with pytest.raises(UserError, match=r"run.dir .* a checkpoint of .* make room, lower checkpoint.keep"):
        require_room([run_dir, tmp_path], 4 * size, held=5, keep=2, to_write=100)
    require_room([run_dir], 10**18, held=0, keep=2, to_write=0)


def test_a_disk_that_fills_up_is_told_once(tmp_path: Path) -> None:
    alarm = DiskAlarm(tmp_path)
    assert alarm.add(11 * GB, 10 * GB) is None
    assert alarm.add(9 * GB, 10 * GB) == f"{tmp_path}: 9.0 GB free, less than the next checkpoint takes (10.0 GB)"
    assert [alarm.add(free * GB, 10 * GB) for free in (8, 9, 11, 9, 12, 9)] == [None] * 6
    assert alarm.add(13 * GB, 10 * GB) is None and alarm.add(9 * GB, 10 * GB) is not None


def test_sizes_of_folders(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/weights").write_bytes(b"12345")
    (tmp_path / "manifest.json").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8 and folder_bytes(tmp_path / "none") == 0


def test_shared_memory(tmp_path: Path) -> None:
    assert shared_memory_warning(4, tmp_path / "none") is None
    assert shared_memory_warning(1, tmp_path) is None and shared_memory_warning(2, tmp_path) is None
    line = shared_memory_warning(10**9, tmp_path)
    assert line is not None and "docker run --shm-size" in line
