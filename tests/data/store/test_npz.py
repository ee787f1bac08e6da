"""kohya's `.npz`: the values come out as they are, and nothing damaged goes unnoticed."""

import io
import resource
import zipfile

import numpy as np
import pytest

from tests.data.kohya_files import kohya_npz, latents_of, npz_bytes
from trainer.data.store.npz import HEAD_BYTES, BadNpz, latents_hw, latents_hw_of_head, read_latents


def _room() -> np.ndarray:
    return np.empty((4, 8, 16), dtype=np.float16)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_latents_and_sizes_come_out(kind: type) -> None:
    room = _room()
    told = read_latents(kind(kohya_npz(1)), room)
    np.testing.assert_array_equal(room, latents_of(1).astype(np.float16))
    assert told.original_hw == (200, 300)
    assert told.crop_top_left == (5, 3)


@pytest.mark.parametrize(
    "data",
    [
        npz_bytes(latents=latents_of(2)),
        npz_bytes(compressed=True, latents=latents_of(2)),
        npz_bytes(latents=latents_of(2).astype(np.float64)),
        npz_bytes(latents=latents_of(2).astype(">f4")),
        npz_bytes(latents=np.asfortranarray(latents_of(2))),
        npz_bytes(alpha_mask=np.ones((64, 128)), latents=latents_of(2)),
    ],
    ids=["alone", "deflated", "float64", "big-endian", "columns first", "after a mask"],
)
def test_other_forms(data: bytes) -> None:
    room = _room()
    told = read_latents(bytearray(data), room)
    np.testing.assert_array_equal(room, latents_of(2).astype(np.float16))
    assert told.original_hw is None and told.crop_top_left is None
    assert latents_hw(data) == (8, 16)
    assert latents_hw_of_head(data[:HEAD_BYTES]) in (None, (8, 16))


def test_mirrored_latents_and_their_crop() -> None:
    """kohya's rule for the left edge: the bucket's width less the right edge that is stored."""
    room = _room()
    data = npz_bytes(
        latents=latents_of(1),
        latents_flipped=latents_of(2),
        crop_ltrb=np.array([9, 5, 100, 69]),
        original_size=(150, 80),
    )
    told = read_latents(bytearray(data), room, mirrored=True)
    np.testing.assert_array_equal(room, latents_of(2).astype(np.float16))
    assert told.crop_top_left == (5, 128 - 100) and told.original_hw == (80, 150)
    alone = npz_bytes(latents=latents_of(1), crop_ltrb=np.array([9, 5, 100, 69]))
    assert read_latents(alone, room, mirrored=True).crop_top_left == (5, 9)
    np.testing.assert_array_equal(room, latents_of(1).astype(np.float16))


def test_names_with_a_size() -> None:
    small, large = latents_of(1), latents_of(2, (128, 256))
    one = {"latents_8x16": small, "original_size_8x16": (300, 200), "crop_ltrb_8x16": (3, 5, 131, 69)}
    room = _room()
    told = read_latents(npz_bytes(**one), room)
    np.testing.assert_array_equal(room, small.astype(np.float16))
    assert (told.original_hw, told.crop_top_left) == ((200, 300), (5, 3)) and latents_hw(npz_bytes(**one)) == (8, 16)
    both = npz_bytes(latents_16x32=large, **one)
    read_latents(both, room)
    np.testing.assert_array_equal(room, small.astype(np.float16))
    with pytest.raises(BadNpz, match="latents of several sizes"):
        latents_hw(both)


def test_the_head_tells_the_size_of_what_kohya_writes() -> None:
    assert latents_hw_of_head(kohya_npz(1, (1216, 832))[:HEAD_BYTES]) == (152, 104)


def _with(value: float) -> bytes:
    latents = latents_of(3)
    latents[2, 3, 4] = value
    return npz_bytes(latents=latents)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (kohya_npz(1)[:-100], "no zip archive, or cut off"),
        (b"\xff\xd8\xff" * 1000, "no zip archive"),
        (npz_bytes(other=latents_of(1)), "holds no latents_8x16, but other"),
        (kohya_npz(1, (128, 64)), r"shape \[4, 16, 8\], but its bucket needs \[4, 8, 16\]"),
        (_with(np.nan), "not finite"),
        (_with(-np.inf), "not finite"),
        (_with(65520.0), "too large for fp16"),
        (npz_bytes(latents=np.zeros((4, 8, 16), dtype=np.int32)), "type int32"),
        (npz_bytes(latents=np.array(["a", "b"])), "an array of type <U1"),
        (npz_bytes(latents=latents_of(1), original_size=np.array([1, 2, 3])), "original_size is not 2 numbers"),
        (npz_bytes(latents=latents_of(1), crop_ltrb=np.array([1, np.nan, 3, 4])), "crop_ltrb is not 4 numbers"),
        (npz_bytes(latents=latents_of(1), original_size=np.array([0, 5])), "original_size is 0 x 5"),
    ],
    ids=str,
)
def test_what_cannot_be_used(data: bytes, reason: str) -> None:
    with pytest.raises(BadNpz, match=reason):
        read_latents(bytearray(data), _room())


def test_every_damaged_byte_is_found_or_does_no_harm() -> None:
    """A flipped bit is found, or it changes nothing that is used, such as the time of a member."""
    whole = kohya_npz(5)
    expected = _room()
    told = read_latents(whole, expected)
    unnoticed = 0
    for i in range(0, len(whole), 11):
        data = bytearray(whole)
        data[i] ^= 1 << i % 8
        room = _room()
        try:
            found = read_latents(data, room)
        except BadNpz:
            continue
        unnoticed += 1
        np.testing.assert_array_equal(room, expected)
        assert found.original_hw in (told.original_hw, None) and found.crop_top_left in (told.crop_top_left, None)
    assert unnoticed < len(whole) / 11 / 2


def test_each_cut_is_found() -> None:
    whole = kohya_npz(6)
    for end in range(0, len(whole), 101):
        with pytest.raises(BadNpz):
            read_latents(bytearray(whole[:end]), _room())


def test_an_archive_that_claims_to_be_huge_is_refused() -> None:
    data = bytearray(npz_bytes(compressed=True, latents=latents_of(1)))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (0xF0000000).to_bytes(4, "little")
    with pytest.raises(BadNpz, match="damaged zip"):
        read_latents(data, _room())


def _npz_with_header(header: str, name: str = "latents.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    text = header.encode("latin-1").ljust(118) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 4 * 8 * 16)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, npy)
    return stream.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("descr", "shape"),
    [
        ("'<f4'", f"(4, {10**30}, 8)"),
        ("'<f4'", "(4, 1e400, 8)"),
        ("'<f4'", "(4, 8, 16.0)"),
        ("'<f4'", "(4, -8, -16)"),
        ("'<f4'", "(4, True, 512)"),
        ("'<f4'", "4"),
        ("'<f4'", "(4, 0x" + "f" * 60 + ", 8)"),
        ("'<f4'", "(" * 40 + ")" * 40),
        ("'|O'", "(4, 8, 16)"),
        ("'O'", "(4, 8, 16)"),
        ("'<f4,<f4'", "(4, 8, 8)"),
        ("[('a', '<f4')]", "(4, 8, 16)"),
        ("'\x1b[31m'", "(4, 8, 16)"),
        ("'<f4'", "(4, 60000, 60000)"),
    ],
)
def test_a_hostile_header_is_a_bad_row(descr: str, shape: str, method: int) -> None:
    data = _npz_with_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", method=method)
    for read in (lambda: read_latents(data, _room()), lambda: latents_hw(data)):
        with pytest.raises(BadNpz) as error:
            read()
        assert str(error.value).isprintable()
    if method == zipfile.ZIP_STORED:
        with pytest.raises(BadNpz):
            latents_hw_of_head(data[:HEAD_BYTES], len(data))


@pytest.mark.parametrize("told", [0, 1000, 1 << 27], ids=["nothing", "less", "more"])
def test_no_more_is_inflated_than_an_archive_tells(told: int) -> None:
    """A size of 0 would be no limit for zlib."""
    data = bytearray(_npz_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8, 16), }" + " " * 60_000,
                                      method=zipfile.ZIP_DEFLATED))  # fmt: skip
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = told.to_bytes(4, "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadNpz):
        read_latents(data, _room())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16


def test_sizes_are_not_read_from_large_members() -> None:
    data = npz_bytes(compressed=True, latents=latents_of(1), original_size=np.zeros(1 << 20))
    with pytest.raises(BadNpz, match="original_size of 8,388,736 bytes; at most 4,096"):
        read_latents(data, _room())


def test_names_of_members_do_not_steer_the_terminal() -> None:
    with pytest.raises(BadNpz) as error:
        read_latents(_npz_with_header("{}", "\x1b]0;owned\x07.npy"), _room())
    assert str(error.value) == "holds no latents_8x16, but \\x1b]0;owned\\x07"
