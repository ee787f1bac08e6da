"""Zip archives from outside: what is sound is read, what would fill memory or deceive is refused in one line."""

import io
import struct
import zipfile
from pathlib import Path

import pytest

from trainer.guards import Limits, Refused
from trainer.zip_guard import open_zip, read_member


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_a_sound_archive_is_read(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with open_zip(archive(tmp_path / "a.zip", {"a": b"one", "b": b"x" * 10_000}, method)) as found:
            assert (read_member(found, "a", 3, "a.zip"), read_member(found, "b", 10_000, "a.zip")) == (
                b"one",
                b"x" * 10_000,
            )
            with pytest.raises(Refused, match="unpacks to 10,000 bytes; at most 9,999"):
                read_member(found, "b", 9_999, "a.zip")
            with pytest.raises(Refused, match="has no member c"):
                read_member(found, "c", 10, "a.zip")


def test_a_bomb_that_declares_less_than_it_holds_is_damaged(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.zip", {"a": b"\0" * 10_000_000})
    data = path.read_bytes().replace(struct.pack("<I", 10_000_000), struct.pack("<I", 100))
    path.write_bytes(data)
    with open_zip(path) as found, pytest.raises(Refused, match="its member a is damaged"):
        read_member(found, "a", 1000, "bomb.zip")


def test_members_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    path = archive(tmp_path / "many.zip", {f"{n}": b"" for n in range(200)})
    with open_zip(path, Limits(archive_members=200)) as found:
        assert len(found.infolist()) == 200
    with pytest.raises(Refused, match="more than 199 members"), open_zip(path, Limits(archive_members=199)):
        pass
    path = archive(tmp_path / "names.zip", {"x" * 6000 + str(n): b"" for n in range(9)})
    with (
        pytest.raises(Refused, match="more than 10 members, or long names"),
        open_zip(path, Limits(archive_members=10)),
    ):
        pass


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """The second entry of the directory is made to point at the first member, as in a bomb of overlapping members."""
    path = archive(tmp_path / "shared.zip", {"a": b"1" * 100, "b": b"2" * 100}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    second = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :])
    with pytest.raises(Refused, match="members a and b overlap"), open_zip(path):
        pass
    buffer = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(Refused, match="two members have one name"), open_zip(path):
        pass


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_what_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = archive(tmp_path / "cut.zip", {"a": b"1" * 1000}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(Refused), open_zip(path) as found:
        read_member(found, "a", 1000, "cut.zip")
