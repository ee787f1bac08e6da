"""Files that grow, are cut off, replaced, or are not there: every line is given once, or the whole is read anew."""

import os
import random
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.report.followed_file import FollowedFile, FollowedList


def news(file: FollowedFile) -> tuple[bool, list[str]]:
    is_anew, lines = file.news()
    return is_anew, [*lines]


def test_what_is_appended_is_given_once_and_whole(tmp_path: Path) -> None:
    """The file is written in pieces of random length, within lines and within letters too."""
    path, rng = tmp_path / "file", random.Random(1)
    text = "".join(f"{n} {'räksmörgås' * rng.randrange(40)}\n" for n in range(500)).encode()
    path.write_bytes(b"")
    file, found, begin = FollowedFile(path), [], 0
    assert news(file) == (True, [])
    while begin < len(text):
        end = begin + rng.randrange(1, 3000)
        with path.open("ab") as appended:
            appended.write(text[begin:end])
        is_anew, lines = news(file)
        assert not is_anew
        found += lines
        assert len(found) == text[:end].count(b"\n")
        begin = end
    assert found == text.decode().splitlines()


def test_a_file_that_is_replaced_or_cut_off_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\ntwo\nthree\n")
    file = FollowedFile(path)
    assert news(file) == (True, ["one", "two", "three"]) and news(file) == (False, [])
    os.truncate(path, 4)
    assert news(file) == (True, ["one"])
    with path.open("a") as appended:
        appended.write("four\nfive\n")
    assert news(file) == (False, ["four", "five"])
    # Cut off, and grown past the place that was reached before anybody looked.
    path.write_text("one\nsix\nseven\neight\nnine\n")
    assert news(file) == (True, ["one", "six", "seven", "eight", "nine"])
    # Another file of the same beginning in its place, as a run's restart leaves it.
    (tmp_path / "other").write_text("one\nsix\nseven\neight\nnine\nten\n")
    (tmp_path / "other").replace(path)
    assert news(file)[0]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.news()
    path.write_text("one\n")
    assert news(file) == (True, ["one"])


def test_what_is_no_text_of_lines_costs_no_memory_and_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (5 << 20) + b"\n\xff\xfe\nlast\n")
    lines = news(FollowedFile(path))[1]
    assert len(lines) == 3 and len(lines[0]) < 2 << 20 and lines[2] == "last"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        FollowedFile(tmp_path / "pipe").news()
    pipe = FollowedList(tmp_path / "pipe", 5)
    pipe.update()
    assert pipe.count == 0


def test_a_list_counts_all_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    events = FollowedList(path, 3)
    events.update()
    assert (events.count, [*events.newest]) == (0, [])
    path.write_text("".join(f"{n}\n" for n in range(7)) + "\n\x1b[31m\n")
    events.update()
    assert (events.count, [*events.newest]) == (8, ["5", "6", "\\x1b[31m"])
    path.write_text("anew\n")
    events.update()
    assert (events.count, [*events.newest]) == (1, ["anew"])
