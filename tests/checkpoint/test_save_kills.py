"""Kills and power cuts in the middle of saves; `benchmarks/save_kills.py` does a thousand of the former."""

from pathlib import Path

import pytest

from benchmarks.save_kills import Disk, Operation, kills, newest_step, power_cuts


@pytest.mark.e2e
def test_power_cuts_at_every_moment_of_a_save(tmp_path: Path) -> None:
    outcome = power_cuts(1, tmp_path)
    assert outcome.tried > 500
    assert (outcome.unusable, outcome.lost) == ([], [])


def test_the_disk_loses_what_was_not_flushed(tmp_path: Path) -> None:
    """A checkpoint that is renamed before its files are on the disk is unusable there: the model can tell."""
    careless = [
        Operation("mkdir", "checkpoints"),
        Operation("mkdir", "checkpoints/step-00000001.tmp"),
        Operation("create", "checkpoints/step-00000001.tmp/manifest.json"),
        Operation("write", "checkpoints/step-00000001.tmp/manifest.json", (0, b'{"files": {}}')),
        Operation("sync", "checkpoints/step-00000001.tmp"),
        Operation("rename", "checkpoints/step-00000001.tmp", "checkpoints/step-00000001"),
        Operation("sync", "checkpoints"),
        Operation("sync", "."),
    ]
    disk = Disk(lambda: False)
    for operation in careless:
        disk.run(operation)
    disk.left(tmp_path)
    assert (tmp_path / "checkpoints/step-00000001/manifest.json").read_bytes() == b""
    with pytest.raises(Exception, match="manifest"):
        newest_step(tmp_path)


@pytest.mark.e2e
def test_kills_in_the_middle_of_saves(tmp_path: Path) -> None:
    outcome = kills(25, 1, tmp_path)
    assert (outcome.tried, outcome.unusable, outcome.lost) == (25, [], [])
