"""Hostile images, captions, masks and folders: `prepare` goes on, takes what is sound, and lists the others."""

import os
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from PIL import Image

from tests.hostile_files import CANARY, Hostile, kind
from tests.hostile_sources import EPS, Bytes, encoded, prepared_from, shaken, variant
from trainer.config.sections.data.sources import FolderSource

GOOD = encoded("PNG")


def _set(folder: Path, **files: bytes) -> Path:
    """A folder of images with a sound one, and with files of the endings that the names tell."""
    root = folder / "set"
    root.mkdir()
    (root / "sound.png").write_bytes(GOOD)
    (root / "sound.txt").write_text("a sound image")
    for name, data in files.items():
        (root / f"odd.{name}").write_bytes(data)
    return root


def _prepared(folder: Path, root: Path, sound: int = 1, bad: int | None = 1, **fields: object) -> Hostile:
    """`prepare` on a folder must take `sound` images and leave out `bad`, or any number if that is None."""
    source = FolderSource(path=root, **fields)  # type: ignore[arg-type]
    return Hostile(root, call=lambda: prepared_from(folder, source, sound=sound, bad=bad), may_pass=True)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, depth: int = 8, colours: int = 2, *before: bytes, rows: int = 1) -> bytes:
    """A PNG that tells so many pixels and has some rows of them, all of them nought."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    row = bytes(min(1 << 20, 1 + -(-width * depth * {0: 1, 2: 3, 6: 4}[colours] // 8)))
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _many_scans(count: int, side: int) -> bytes:
    data = encoded("JPEG", (side, side), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def _tiff(*tags: tuple[int, int, int, int]) -> bytes:
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + body


OTHER_KINDS: Bytes = (
    lambda r: EPS,
    lambda r: b"%!PS-Adobe-3.0\n" + EPS,
    lambda r: b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
    lambda r: b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(40),
    lambda r: b"\xd7\xcd\xc6\x9a" + bytes(80),
    lambda r: b"icns\0\0\0\x10ic09" + bytes(8),
    lambda r: b"%PDF-1.7\n" + r.randbytes(200),
    lambda r: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    lambda r: b"SIMPLE  =                    T" + bytes(2850),
    lambda r: b"GRIB" + bytes(100),
    lambda r: b"\x89HDF\r\n\x1a\n" + bytes(100),
    lambda r: b"/* XPM */\nstatic char * a[] = {" + b'"1 1 1 1",' * 9,
    lambda r: b"Image type: L image\r\nFile size (no of images): 1\r\n" + bytes(600),
    lambda r: b"P6 99999 99999 255\n",
    lambda r: b"\x7fELF" + r.randbytes(100),
    lambda r: b"<!doctype html><title>\x1b[2Jgone</title>",
    lambda r: r.randbytes(r.randrange(1, 4000)),
    lambda r: b"qoif" + struct.pack(">II", 1 << 30, 1 << 30) + b"\4\0",
    lambda r: b"DDS " + struct.pack("<I", 124) + b"\xff" * 120,
    lambda r: b"\0\0\1\0\1\0" + b"\xff" * 16 + bytes(40),
)

BOMBS: Bytes = (
    lambda r: _png(30_000, 30_000, 1, 0),
    lambda r: _png(65_000, r.randrange(2000, 65_000)),
    lambda r: _png(2**31 - 1, 2**31 - 1),
    lambda r: encoded("GIF")[:6] + b"\xff\xff\xff\xff" + encoded("GIF")[10:],
    lambda r: (
        encoded("BMP")[:18] + struct.pack("<ii", 2**31 - 1, r.choice((2**31 - 1, -(2**31)))) + encoded("BMP")[26:]
    ),
    lambda r: encoded("JPEG").replace(b"\x00\x11\x08\x00\x40\x00\x60", b"\x00\x11\x08\xff\xff\xff\xff"),
    lambda r: _tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (273, 4, 1, 8), (278, 4, 1, 60_000)),
    lambda r: _tiff((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 2**31, 8), (279, 4, 2**31, 8)),
    lambda r: _tiff(*((tag, 4, 2**32 - 1, 8) for tag in range(254, 300))),
    lambda r: _png(64, 96, 8, 2, *(_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) for _ in range(200))),
    lambda r: _png(64, 96, 8, 2, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000), 1))),
    lambda r: _png(64, 96, 8, 2, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000), 1))),
    lambda r: _many_scans(5_000, 2_000),
    lambda r: (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff" * 6 + bytes(8)
    ),
)
MAY_BE_SOUND: Bytes = (  # sound as far as anyone can tell, and large
    lambda r: _png(9_400, 9_400, 8, 6, rows=9_400),
    lambda r: _png(9_000, 9_000, 16, 0, rows=9_000),
    lambda r: _many_scans(60, 1_000),
    lambda r: encoded("TIFF", (6_000, 5_000), compression="tiff_lzw"),
    lambda r: encoded("WEBP", (5_000, 4_000), lossless=True),
    lambda r: encoded("GIF", save_all=True, append_images=[Image.new("RGB", (96, 64), (n, n, n)) for n in range(200)]),
    lambda r: encoded("PNG") + bytes(1_000_000),
)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF")


@kind("image-of-another-kind")
def image_of_another_kind(r: Random, seed: int, folder: Path) -> Hostile:
    programs = folder / "programs"
    programs.mkdir()
    for name in ("gs", "gswin64c", "inkscape"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {folder / CANARY}\n")
        (programs / name).chmod(0o755)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    return _prepared(folder, _set(folder, **{r.choice(("jpg", "png", "webp", "tif")): variant(OTHER_KINDS, r, seed)}))


@kind("image-bomb")
def image_bomb(r: Random, seed: int, folder: Path) -> Hostile:
    return _prepared(folder, _set(folder, jpg=variant(BOMBS, r, seed)), bad=None)


@kind("large-image")
def large_image(r: Random, seed: int, folder: Path) -> Hostile:
    return _prepared(folder, _set(folder, png=variant(MAY_BE_SOUND, r, seed)), bad=None, sound=2, masks="alpha")


@kind("damaged-image")
def damaged_image(r: Random, seed: int, folder: Path) -> Hostile:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 300
    form = FORMATS[seed % len(FORMATS)]
    more = {} if form in ("GIF", "BMP") else {"exif": exif}
    root = _set(folder)
    for n in range(10):
        (root / f"odd{n}.jpg").write_bytes(shaken(encoded(form, (96, 64), **more), r))
    return _prepared(folder, root, bad=None)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        os.chdir(path.parent)  # such a name may have 107 bytes
        end.bind(path.name)
    os.chdir("/")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


ODD_FILES: tuple[Callable[[Path], object], ...] = (
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/urandom"),
    lambda path: path.symlink_to("/proc/self/mem"),
    lambda path: path.symlink_to("/dev/stdin"),
    _socket,
    _sparse,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/dev/tty"),
)


@kind("odd-file-as-image")
def odd_file_as_image(r: Random, seed: int, folder: Path) -> Hostile:
    root = _set(folder)
    ODD_FILES[seed % len(ODD_FILES)](root / "odd.jpg")
    return _prepared(folder, root, bad=None)


@kind("caption")
def caption(r: Random, seed: int, folder: Path) -> Hostile:
    texts = (
        b"\x1b]0;x\x07\x9b2J" * 9,
        b"\xff\xfe\0a\0",
        b"a" * (1 << 20),
        b"b" * ((1 << 20) + 1),
        b"\0" * 999,
        b"\xed\xa0\x80",
    )
    root = _set(folder, png=GOOD)
    if seed % 16 < len(ODD_FILES):
        ODD_FILES[seed % 16](root / "odd.txt")
        return _prepared(folder, root, bad=1)
    (root / "odd.txt").write_bytes(texts[seed % 16 - len(ODD_FILES)])
    return _prepared(folder, root, bad=None)


@kind("mask")
def mask(r: Random, seed: int, folder: Path) -> Hostile:
    root = _set(folder, png=GOOD)
    path = root / "odd-masklabel.png"
    if seed % 20 < len(ODD_FILES):
        ODD_FILES[seed % 20](path)
    else:
        path.write_bytes(variant((*BOMBS, *OTHER_KINDS), r, seed - len(ODD_FILES)))
    return _prepared(folder, root, bad=None, masks="files")


@kind("weight-file")
def weight_file(r: Random, seed: int, folder: Path) -> Hostile:
    root = _set(folder, png=GOOD)
    if seed % 14 < len(ODD_FILES):
        ODD_FILES[seed % 14](root / "odd.weight")
    else:
        (root / "odd.weight").write_bytes((b"1e400", b"nan", "\u00b2".encode(), b"9" * 300)[seed % 14 - len(ODD_FILES)])
    return _prepared(folder, root, bad=1, weight_extension=".weight")


def _deep(root: Path) -> None:
    here = os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def _knots(root: Path) -> None:
    """Folders that each link to all others, which has more ways through it than there are atoms."""
    names = [f"f{n:02d}" for n in range(30)]
    for name in names:
        (root / name).mkdir()
        for other in names:
            (root / name / f"to-{other}").symlink_to(f"../{other}")


def _names(root: Path) -> None:
    for name in (b"\xff\xfe.png", b"a\nb\x1b[2J.png", b"\x9b31m.png", b"x" * 251 + b".png", "\u202egnp.png".encode()):
        (root / os.fsdecode(name)).write_bytes(GOOD)
    for name in ("\u202eodd.png", "\x9b31m.png", "\u2028.png"):
        (root / name).write_bytes(b"")


FOLDERS: tuple[tuple[Callable[[Path], object], int, int], ...] = (  # with how many further images are sound, or bad
    (_deep, 0, 0),
    (_knots, 0, 0),
    (_names, 3, 5),
    (lambda root: (root / "up").symlink_to(".."), 0, 0),
    (lambda root: (root / "self").symlink_to("self"), 0, 0),
    (lambda root: (root / "long").symlink_to("x/" * 2000), 0, 0),
    (lambda root: (root / "gone.png").symlink_to("nowhere"), 0, 1),
    (lambda root: [(root / f"l{n}").symlink_to(".") for n in range(1000)], 0, 0),
    (lambda root: [(root / f"{n}.png").symlink_to("sound.png") for n in range(50)], 50, 0),
    (lambda root: [(root / f"{n}.\x1b[31m").write_bytes(b"") for n in range(50)], 0, 0),
)


@kind("folder")
def odd_folder(r: Random, seed: int, folder: Path) -> Hostile:
    root = _set(folder)
    build, sound, bad = FOLDERS[seed % len(FOLDERS)]
    build(root)
    source = FolderSource(path=root)

    def call() -> None:
        prepared_from(folder, source, sound=1 + sound, bad=bad)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # Python's own way recurses

    return Hostile(root, call=call, may_pass=True)


@kind("pixels-that-change")
def pixels_that_change(r: Random, seed: int, folder: Path) -> Hostile:
    """What was listed is exchanged before it is decoded."""
    root = _set(folder, png=GOOD)
    path = root / "odd.png"
    data = variant((*BOMBS, *OTHER_KINDS), r, seed)

    def exchange() -> None:
        path.unlink()
        path.write_bytes(data) if seed % 4 else os.mkfifo(path)

    source = FolderSource(path=root)
    mode = "images" if seed % 2 else "latents"
    call = lambda: prepared_from(folder, source, sound=1, bad=None, between=exchange, mode=mode)  # noqa: E731
    return Hostile(root, call=call, may_pass=True)
