"""A run that is sent back to an earlier checkpoint, given the same command twice, or left with damaged files."""

import json
import random
from pathlib import Path

import pytest

from tests.checkpoint.test_write import save
from trainer.checkpoint.manifest import MANIFEST, Damage, find_damage, read_manifest
from trainer.checkpoint.resume_point import RECORD, resume_from, resume_newest
from trainer.checkpoint.run_dir import CHECKPOINTS, checkpoint_at, list_checkpoints
from trainer.errors import UserError


def steps_of(run_dir: Path) -> list[str]:
    return [path.name[-2:] for path in list_checkpoints(run_dir)]


def test_what_came_after_the_point_of_return_is_moved_aside(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (3, 6, 9, 12)]
    lines: list[str] = []
    assert resume_from(tmp_path, paths[1], lines.append) == paths[1]
    assert steps_of(tmp_path) == ["03", "06"]
    (aside,) = (tmp_path / CHECKPOINTS).glob("before-resume-*")
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000009", "step-00000012"]
    assert all(find_damage(path) is None for path in aside.iterdir())
    assert lines == [f"step-00000009 to step-00000012: of the run as it was before; moved to {aside}"]


def test_the_same_command_goes_on_and_says_how_to_go_back_once_more(tmp_path: Path) -> None:
    source, run_dir, lines = save(tmp_path / "a", 3), tmp_path / "b", []
    assert resume_from(run_dir, source, lines.append) == source
    assert resume_from(run_dir, source, lines.append) == source  # nothing was written in between
    own = save(run_dir, 5)
    assert lines == []
    assert resume_from(run_dir, source, lines.append) == own
    assert (
        len(lines) == 1 and f"goes on from its own {own.name}" in lines[0] and f"delete {run_dir / RECORD}" in lines[0]
    )
    (run_dir / RECORD).unlink()
    assert resume_from(run_dir, source, lines.append) == source
    assert steps_of(run_dir) == []


def test_another_checkpoint_is_another_way(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (3, 6)]
    resume_from(tmp_path, paths[0], print)
    nine = save(tmp_path, 9)
    assert resume_from(tmp_path, nine, print) == nine
    assert resume_from(tmp_path, paths[0], print) == paths[0]
    assert steps_of(tmp_path) == ["03"]


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "unet" / "config.json").write_text("")
    with pytest.raises(UserError) as caught:
        resume_newest(tmp_path, print)
    assert len(caught.value.lines) == 3 and "no checkpoint is whole; give another run.dir" in caught.value.lines[-1]
    assert steps_of(tmp_path) == ["01", "02"], "they stay, so that the next start is refused as well"


def entries_of(path: Path) -> dict[str, dict[str, object]]:
    return json.loads((path / MANIFEST).read_text())["files"]


HARMED = {
    "nothing": "",
    "no object": "[]",
    "null": '{"files": null}',
    "a list": '{"files": ["unet/config.json"]}',
    "nested": '{"files": ' + "[" * 100_000,
    "without sizes": '{"files": {"unet/config.json": {"xxh3_128": "00"}}}',
    "sizes of another kind": '{"files": {"unet/config.json": {"size": true, "xxh3_128": "00"}}}',
    "no entry": '{"files": {"unet/config.json": 3}}',
    "elsewhere": '{"files": {"../../other": {"size": 1, "xxh3_128": "00"}}}',
    "from the root": '{"files": {"/etc/passwd": {"size": 1, "xxh3_128": "00"}}}',
    "NUL": '{"files": {"a\\u0000b": {"size": 1, "xxh3_128": "00"}}}',
    "long": '{"files": {"' + "a" * 5000 + '": {"size": 1, "xxh3_128": "00"}}}',
    "bytes": b"\xff\xfe\x00",
    "empty": '{"files": {}}',
}


@pytest.mark.parametrize("name", HARMED)
def test_a_manifest_that_was_not_written_so_is_damage(name: str, tmp_path: Path) -> None:
    good, path = save(tmp_path, 1), save(tmp_path, 2)
    text = HARMED[name]
    (path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    for contents in (False, True):
        damage = find_damage(path, contents=contents)
        assert damage and "\n" not in damage and len(damage) < 300
    assert checkpoint_at(tmp_path) == good
    with pytest.raises(UserError, match=r"take another checkpoint$"):
        checkpoint_at(path)
    assert resume_newest(tmp_path, print) == good


def test_a_file_that_the_manifest_leaves_out(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    entries = entries_of(path)
    for name in entries:
        left = {other: entry for other, entry in entries.items() if other != name}
        (path / MANIFEST).write_text(json.dumps({"files": left}))
        assert find_damage(path) in (f"{name} is not in {MANIFEST}", f"{MANIFEST} does not list {name}")
    (path / MANIFEST).write_text(json.dumps({"files": entries}))
    (path / "notes.txt").write_text("best so far")
    assert find_damage(path) is None


def test_a_thousand_harms_are_found(tmp_path: Path) -> None:
    """Flipped bits and cuts at random places of all files, the manifest included; the one before is taken each time."""
    good, path = save(tmp_path, 1), save(tmp_path, 2)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    drawn, before = random.Random(0), {file: file.read_bytes() for file in files}
    written = read_manifest(path)
    for number in range(1000):
        file = drawn.choice(files)
        content = bytearray(before[file])
        if number % 4:
            content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        else:
            del content[drawn.randrange(len(content)) :]
        file.write_bytes(content)
        damage = find_damage(path)
        # A bit of the manifest's own spaces, or of its version, changes nothing of what it says.
        unchanged = file.name == MANIFEST and damage is None and said(path) == written
        assert damage or unchanged, (number, file)
        file.write_bytes(before[file])
    assert find_damage(path) is None and find_damage(good) is None


def said(path: Path) -> object:
    try:
        return read_manifest(path)
    except Damage:
        return None
