"""Offsets of tar members against Python's `tarfile` as an independent writer and reader, and damaged tars."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainer.data.sources.tar_members import BadTar, TarMember, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a" * 90 + "/" + "b" * 60


def _write(path: Path, form: int, names: list[str]) -> dict[str, bytes]:
    contents = {}
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            contents[name] = rng.bytes([0, 1, 511, 512, 513, 100_000][number % 6])
            info.size, info.mtime = len(contents[name]), 1_700_000_000 + number
            tar.addfile(info, io.BytesIO(contents[name]))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, names[0]
        tar.addfile(link)
    return contents


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_as_tarfile(tmp_path: Path, form: str) -> None:
    names = [f"{n:06d}.npz" for n in range(20)] + [LONG, "a b.txt"]
    if form != "ustar":
        names += ["ü/☕.jpg", "x" * 300]
    contents = _write(tmp_path / "a.tar", FORMATS[form], names)
    data = (tmp_path / "a.tar").read_bytes()
    members = list(walk_tar(tmp_path / "a.tar"))
    assert {m.name: data[m.offset : m.offset + m.size] for m in members} == contents
    assert members[1].mtime_ns == 1_700_000_001 * 10**9
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [m[:3] for m in members] == theirs


def test_sizes_beyond_eight_gibibytes(tmp_path: Path) -> None:
    """Both ways to write them, in a file of holes."""
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        info = tarfile.TarInfo("big.bin")
        info.size = 9 << 30
        header = info.tobuf(FORMATS[form])
        after = tarfile.TarInfo("after.txt")
        after.size = 3
        with path.open("wb") as file:
            file.write(header)
            file.seek(len(header) + info.size)
            file.write(after.tobuf(FORMATS[form]) + b"abc".ljust(512, b"\0") + bytes(1024))
        big, small = walk_tar(path)
        assert (big.name, big.offset, big.size) == ("big.bin", len(header), 9 << 30)
        with path.open("rb") as file:
            file.seek(small.offset)
            assert small.name == "after.txt" and file.read(small.size) == b"abc"


def test_damaged_tars_give_what_lies_before(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    _write(path, tarfile.USTAR_FORMAT, ["one", "two", "three", "four", "five", "six"])
    whole = path.read_bytes()
    members = list(walk_tar(path))
    six = members[5]
    cases = {
        "cut in the data": (whole[: six.offset + 10], f"byte {six.offset - 512}: the tar ends before this member", 5),
        "cut in a header": (whole[: six.offset - 100], f"byte {six.offset - 512}: the tar ends within a header", 5),
        "without an end mark": (whole[: six.offset + 100_352], "", 6),
        "cut in the end mark": (whole[: six.offset + 100_352 + 512 + 100], "", 6),
        "several strung together": (whole + whole, "behind the tar's end mark more follows", 6),
        "flipped name": (whole[: six.offset - 512] + b"X" + whole[six.offset - 511 :], "no tar header", 5),
        "empty": (b"", "the file is empty", 0),
        "short": (b"abc", "byte 0: the tar ends within a header", 0),
        "text": (b"no tar at all" * 100, "byte 0: no tar header", 0),
        "compressed": (gzip.compress(whole), "compressed (gzip)", 0),
    }
    for name, (data, reason, count) in cases.items():
        path.write_bytes(data)
        seen: list[TarMember] = []
        found = ""
        try:
            for member in walk_tar(path):
                seen.append(member)  # noqa: PERF402 - what came before the error counts
        except BadTar as error:
            found = str(error)
        assert reason in found and bool(reason) == bool(found), name
        assert seen == members[:count], name


def test_flipped_bytes_never_give_another_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    _write(path, tarfile.PAX_FORMAT, ["one", "ü", "x" * 200])
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(400):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 5)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged[: rng.integers(1, len(whole))])
        try:
            for member in walk_tar(path):
                assert member.offset + member.size <= path.stat().st_size
        except BadTar as error:
            assert str(error).startswith("byte ")
