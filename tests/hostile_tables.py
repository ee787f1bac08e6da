"""Hostile metadata, tars, latents, tables and files of tags: a bad row each, or one line for the source as a whole."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.kohya_files import kohya_npz, npz_bytes, write_tar
from tests.hostile_files import CANARY, Hostile, kind
from tests.hostile_sources import EPS, Bytes, encoded, prepared_from, shaken, variant
from trainer.config.sections.data.sources import (
    HfSource,
    KohyaJsonSource,
    LatentTarsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from trainer.data.sources.metadata import read_metadata
from trainer.data.survey.tag_file import read_tag_file

IMAGE = encoded("PNG")
LATENTS = kohya_npz(0)


class Runs:
    """Makes the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / CANARY

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.canary,)


def _tried(folder: Path, source: Source, sound: int = 1) -> Hostile:
    return Hostile(folder, call=lambda: prepared_from(folder, source, sound=sound, bad=None), may_pass=True)


def _entry(caption: str = "x") -> str:
    return json.dumps({"caption": caption, "tags": "a, b"})


METADATA: Bytes = (
    lambda r: b"{" + b'"a":{' * 10**6,
    lambda r: b'{"a":' + b"[" * 10**6,
    lambda r: b'{"a":{"caption":"' + b"x" * 60_000_000,
    lambda r: b'{"' + b"k" * 30_000_000 + b'":{}}',
    lambda r: b'{"a":{"tags":[' + b"[]," * 10_000_000 + b"0]}}",
    lambda r: b'{"a":{"image_size":[' + b"9" * 5000 + b",1]}}",
    lambda r: b'{"a":{"image_size":[1e400,-1e400],"train_resolution":[1e99,8]}}',
    lambda r: b'{"a":{"train_resolution":[65535,65535]},"b":{"train_resolution":[-8,8]}}',
    lambda r: b'{"odd\\u0000":{},"odd\\u001b[2J":{},"\\ud800":{},"odd\\n":{},"../../etc/passwd":{}}',
    lambda r: b'{"odd":{"caption":"\\ud800\\u0000\\u001b]0;x\\u0007"}}',
    lambda r: b'{"odd":' + b" " * 30_000_000 + b"{}}",
    lambda r: b'{"odd":1,"odd":[],"odd":null,"odd":"x","odd":{"caption":{}}}',
    lambda r: b'{"odd":{},\xff\xfe}',
    lambda r: b'{"odd":{}}' * 1000,
    lambda r: b"[" * 10**6,
    lambda r: b"\x80\x04" + pickle.dumps({"a": 1}),
    lambda r: b'{"odd":{"caption":NaN}}',
    lambda r: ('{"odd":' + _entry("\\" * 70_001) + "}").encode(),
    lambda r: shaken(b'{"odd":{"caption":"a","image_size":[1,2]}}', r),
    lambda r: b"",
)


@kind("metadata")
def metadata(r: Random, seed: int, folder: Path) -> Hostile:
    """Of a source of images, as an object or as lines; beside entries that are sound, if it can be read at all."""
    data, images = variant(METADATA, r, seed // 2), folder / "images"
    images.mkdir()
    (images / "sound.png").write_bytes(IMAGE)
    (images / "odd.png").write_bytes(IMAGE)
    path = folder / ("meta.json", "meta.jsonl")[seed % 2]
    if seed % 2:
        path.write_bytes(data[:5_000_000] + b'\n{"image_path":"sound"}\n')
        return _tried(folder, KohyaJsonSource(type="kohya_json", path=path, images=images))
    path.write_bytes(data)

    def call() -> None:
        prepared_from(folder, KohyaJsonSource(type="kohya_json", path=path, images=images), sound=0, bad=None)

    return Hostile(path, call=call, may_pass=True)


@kind("odd-file-as-table")
def odd_file_as_table(r: Random, seed: int, folder: Path) -> Hostile:
    """A FIFO or a device where a file is expected, of every kind of source."""
    name = ("meta.json", "a.jsonl", "a.tar", "b.tar", "a.parquet", "tags.json", "tags.csv")[seed % 7]
    path = folder / name
    os.mkfifo(path) if seed % 2 else path.symlink_to("/dev/zero")
    calls: dict[str, Callable[[], object]] = {
        "meta.json": lambda: list(read_metadata(path)),
        "a.jsonl": lambda: list(read_metadata(path)),
        "a.tar": lambda: prepared_from(folder, WebdatasetSource(type="webdataset", tars=path)),
        "b.tar": lambda: prepared_from(folder, LatentTarsSource(type="latent_tars", metadata=path, tars=folder)),
        "a.parquet": lambda: prepared_from(folder, ParquetSource(type="parquet", files=folder)),
        "tags.json": lambda: read_tag_file(path),
        "tags.csv": lambda: read_tag_file(path),
    }
    return Hostile(path, call=calls[name])


def _header(name: bytes = b"odd.png", kind: bytes = b"0", **fields: bytes) -> bytes:
    """A tar header whose fields may hold anything; its sum is right."""
    places = {"size": (124, 12, b"00000000000"), "mtime": (136, 12, b"00000000000"), "magic": (257, 8, b"ustar\00000")}
    block = bytearray(512)
    block[: len(name)], block[156:157] = name, kind
    for field, (at, width, usual) in places.items():
        value = fields.get(field, usual)[:width]
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(**fields: bytes) -> bytes:
    data = b""
    for name, value in fields.items():
        record = b" " + name.encode() + b"=" + value + b"\n"
        length = len(record) + len(str(len(record) + 6))
        data += str(length).encode() + record
    return _header(b"pax", b"x", size=b"%011o" % len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0")


MEMBERS: Bytes = (
    lambda r: _pax(size=b"9" * 5000) + _header(),
    lambda r: _pax(size="\u00b2\u00b3".encode()) + _header(),
    lambda r: _header(mtime=b"\x80" + b"\xff" * 11),
    lambda r: _header(mtime=b"not a time"),
    lambda r: (
        _header(b"x", b"x", size=b"%011o" % 40) + b"99999999999999999999999 path=x\n".ljust(512, b"\0") + _header()
    ),
    lambda r: _header(b"x", b"x", size=b"%011o" % 40) + "\u0663\u0663 path=x\n".encode().ljust(512, b"\0") + _header(),
    lambda r: _pax(path=b"p" * 100_000) + _header(),
    lambda r: _pax(path=b"../../\x1b[2J\n\x00.png") + _header(),
    lambda r: _header(b"long", b"L", size=b"%011o" % (2 << 20)) + bytes(2 << 20) + _header(),
    lambda r: _header(b"odd.png", b"2") + _header(b"odd.png", b"1") + _header(b"odd.png", b"3") + _header(b"odd", b"6"),
    lambda r: _header(b"odd.png", b"S") + _header(b"odd.png", b"0"),
    lambda r: b"".join(_header(b"same.png") for _ in range(2000)),
    lambda r: b"".join(_header(b"%d.png" % n) for n in range(4000)),
    lambda r: b"".join(_header(b"one.%d-masklabel.png" % n) for n in range(4000)),
    lambda r: _pax(**{"GNU.sparse.major": b"1", "GNU.sparse.realsize": b"9" * 400}) + _header(),
    lambda r: _header(b"odd.json", size=b"%011o" % 500_000) + b"[" * 500_224 + _header(b"odd.png"),
    lambda r: b"".join(_pax(path=b"%d" % n) for n in range(500)) + _header(),
    lambda r: _header(b"\xff\xfe\x9b31m.png"),
)
TAR_ENDS: Bytes = (
    lambda r: _header(size=b"\x80" + b"\xff" * 11),
    lambda r: _header(size=b"\xff" * 12),
    lambda r: _header(size=b"77777777777"),
    lambda r: _header(size=b"0x10 -1"),
    lambda r: r.randbytes(r.randrange(1, 5000)),
    lambda r: shaken(_pax(path=b"a.png") + _header(), r),
)


@kind("webdataset")
def webdataset(r: Random, seed: int, folder: Path) -> Hostile:
    """A sound image, something odd, and after it another sound one, which an odd member must not take with it."""
    write_tar(folder / "first.tar", {"sound.png": IMAGE, "sound.txt": b"a"})
    write_tar(folder / "last.tar", {"sounder.png": IMAGE})
    is_end = seed % 4 == 3
    odd = variant(TAR_ENDS if is_end else MEMBERS, r, seed)
    first, last = ((folder / name).read_bytes() for name in ("first.tar", "last.tar"))
    (folder / "a").mkdir()
    (folder / "a/a.tar").write_bytes(first[: first.rindex(b"a" + bytes(511)) + 512] + odd + last)
    source = WebdatasetSource(type="webdataset", tars=folder / "a", masks=("none", "files")[seed // 2 % 2])
    return _tried(folder, source, sound=1 if is_end else 2)


@kind("latent-tar")
def latent_tar(r: Random, seed: int, folder: Path) -> Hostile:
    write_tar(folder / "a.tar", {"sound.npz": LATENTS})
    data = (folder / "a.tar").read_bytes()
    odd = variant((*MEMBERS, *TAR_ENDS), r, seed).replace(b".png", b".npz")
    (folder / "a.tar").write_bytes(data[: 512 + -(-len(LATENTS) // 512) * 512] + odd + bytes(1024))
    (folder / "meta.json").write_text(json.dumps({f"a/{name}": {} for name in ("sound", "odd", "same", "7")}))
    return _tried(folder, LatentTarsSource(type="latent_tars", metadata=folder / "meta.json", tars=folder))


def _npy(header: str) -> bytes:
    text = header.encode("latin-1").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(4 * 4 * 8 * 16)


def _zip(data: bytes, name: str = "latents.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def _told(shape: str, descr: str = "'<f4'") -> bytes:
    return _zip(_npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"))


def _bomb(full_size: int) -> bytes:
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(bytes(100_000_000)) + packed.flush()
    archive = bytearray(_zip(b"x" * 9, method=zipfile.ZIP_DEFLATED))
    begin, end = archive.index(b"latents.npy") + 11, archive.rindex(b"PK\1\2")
    archive[begin:end] = data
    central = archive.rindex(b"PK\1\2")
    struct.pack_into("<II", archive, central + 20, len(data), full_size)
    struct.pack_into("<I", archive, archive.rindex(b"PK\5\6") + 16, central)
    return bytes(archive)


NPZ: tuple[Callable[[Random, Path], bytes], ...] = (
    lambda r, f: _told(f"(4, {10**30}, 8)"),
    lambda r, f: _told("(4, 1e400, 8)"),
    lambda r, f: _told(f"(4, {'9' * 60}, 8)"),
    lambda r, f: _told("(4, 60000, 60000)"),
    lambda r, f: _told("(4, 8, 16)", "'|O'"),
    lambda r, f: _told("(4, 8, 16)", "'<f4,<f4'"),
    lambda r, f: _told("(4, 8, 16)", "'\\d'"),
    lambda r, f: _told("(" * 50 + ")" * 50),
    lambda r, f: _zip(b"\x93NUMPY\x01\x00\x76\x00" + b"[" * 118),
    lambda r, f: _zip(pickle.dumps(Runs(f))),
    lambda r, f: _pickled(f),
    lambda r, f: pickle.dumps(Runs(f)),
    lambda r, f: _bomb(100_000_000),
    lambda r, f: _bomb(2_176),
    lambda r, f: _bomb(0),
    lambda r, f: npz_bytes(compressed=True, latents=np.zeros((4, 1200, 1200), np.float32)),
    lambda r, f: shaken(LATENTS, r),
    lambda r, f: LATENTS[: r.randrange(1, len(LATENTS))],
    lambda r, f: LATENTS[:-6] + b"\xff\xff\xff\xff\xff\xff",
    lambda r, f: EPS,
)


def _pickled(folder: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, latents=np.array([Runs(folder)], dtype=object))
    return file.getvalue()


@kind("latents")
def latents(r: Random, seed: int, folder: Path) -> Hostile:
    (folder / "sound.npz").write_bytes(LATENTS)
    (folder / "odd.npz").write_bytes(NPZ[seed % len(NPZ)](r, folder))
    resolution = {} if seed % 2 else {"train_resolution": [128, 64]}
    (folder / "meta.json").write_text(json.dumps({"sound": {}, "odd": resolution}))
    return _tried(folder, KohyaJsonSource(type="kohya_json", path=folder / "meta.json", latents=folder))


def _table(**columns: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    return file.getvalue()


PARQUET: Bytes = (
    lambda r: _table(image=[1, 2], caption=["a", "b"]),
    lambda r: _table(image=[[[IMAGE]]], caption=["a"]),
    lambda r: _table(image=[{"bytes": {"bytes": IMAGE}, "path": 7}], caption=[{"a": [1]}]),
    lambda r: _table(image=[bytes(100_000_000)], caption=["a"]),
    lambda r: _table(image=[IMAGE], caption=["x" * 30_000_000]),
    lambda r: _table(
        image=["/dev/zero", "file:///dev/stdin", "\0", "a" * 9000, "../" * 900, "http://[::1"], caption=[""] * 6
    ),
    lambda r: _table(image=[EPS], caption=["\x1b[2J"]),
    lambda r: _table(image=[IMAGE], caption=pa.array([2**62], pa.timestamp("us"))),
    lambda r: b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
    lambda r: b"PAR1" + b"\x15\x04\x19\xfc\xff\xff\xff\xff\x0f" + bytes(99) + struct.pack("<I", 108) + b"PAR1",
    lambda r: _lying_page(),
    lambda r: shaken(_table(image=[IMAGE] * 9, caption=["a"] * 9), r),
    lambda r: _shaken_footer(r),
)


def _lying_page() -> bytes:
    """The first page says that it holds 2 GiB."""
    data = bytearray(_table(image=[IMAGE, IMAGE], caption=["a", "b"]))
    at = data.index(b"\x15", 5)  # its second field
    end = next(i for i in range(at + 1, at + 7) if data[i] < 128) + 1
    data[at + 1 : end] = b"\xfe\xff\xff\xff\x0f"[: end - at - 1 - 1] + b"\x7f"
    return bytes(data)


def _shaken_footer(r: Random) -> bytes:
    data = bytearray(_table(image=[IMAGE] * 9, caption=["a"] * 9))
    footer = len(data) - 8 - struct.unpack_from("<I", data, len(data) - 8)[0]
    for _ in range(3):
        data[r.randrange(footer, len(data) - 8)] = r.randrange(256)
    return bytes(data)


@kind("parquet")
def parquet(r: Random, seed: int, folder: Path) -> Hostile:
    (folder / "sound.parquet").write_bytes(_table(image=[IMAGE], caption=["a"]))
    (folder / "odd.parquet").write_bytes(variant(PARQUET, r, seed))
    return _tried(folder, ParquetSource(type="parquet", files=folder))


@kind("hf-folder")
def hf_folder(r: Random, seed: int, folder: Path) -> Hostile:
    import datasets

    datasets.disable_progress_bars()
    table = {"image": [IMAGE] * 4, "caption": ["a"] * 4}
    path = folder / "set"
    datasets.Dataset.from_dict(table).save_to_disk(path)
    (arrow,) = path.glob("*.arrow")
    state, info = path / "state.json", path / "dataset_info.json"
    ways: tuple[Callable[[], object], ...] = (
        lambda: state.write_bytes(b"[" * 10**6),
        lambda: state.write_text('{"_data_files":[{"filename":"/dev/zero"}]}'),
        lambda: (state.unlink(), os.mkfifo(state)),
        lambda: state.write_text("[1]"),
        lambda: info.write_text('{"features":{"image":{"_type":"\x7f"}}}'),
        lambda: info.write_text('{"features":[1,2]}'),
        lambda: info.unlink(),
        lambda: arrow.write_bytes(b""),
        lambda: arrow.write_bytes(shaken(arrow.read_bytes(), r)),
        lambda: arrow.write_bytes(arrow.read_bytes()[: r.randrange(9, 900)]),
        lambda: (arrow.unlink(), arrow.symlink_to("/dev/zero")),
        lambda: (path / "evil.py").write_text(f"open({str(folder / CANARY)!r}, 'w')"),
        lambda: state.write_bytes(shaken(state.read_bytes(), r)),
    )
    ways[seed % len(ways)]()
    return _tried(folder, HfSource(type="hf", path=str(path)), sound=0)


TAGS: Bytes = (
    lambda r: b"[" * 10**6,
    lambda r: b"{" + b'"a":[' * 10**5,
    lambda r: b'{"a":' + b"9" * 10**6 + b"}",
    lambda r: b'{"a":1e999}',
    lambda r: b'{"\\u001b[2J":0,"a":NaN}',
    lambda r: b'{"a":{}' + b',"b":{}' * 1_000_000 + b"}",
    lambda r: b'"' + b"x" * 34_000_000 + b'"',
    lambda r: b"\xff\xfe" * 100,
    lambda r: b"a," + b"1" * 200_000 + b"\n" * 9,
    lambda r: r.randbytes(3000),
)


@kind("tag-file")
def tag_file(r: Random, seed: int, folder: Path) -> Hostile:
    path = folder / f"tags.{('json', 'csv', 'yaml')[seed % 3]}"
    path.write_bytes(variant(TAGS, r, seed // 3))
    return Hostile(path, call=lambda: read_tag_file(path))
