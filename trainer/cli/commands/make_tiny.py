"""`sdxl-train make-tiny`: a tiny SDXL and a data set of real photographs, to try everything out."""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_EXAMPLE = """\
example:
  sdxl-train make-tiny --out data/tiny        one to three minutes; again: at once
  sdxl-train configs/tiny.yaml

writes DIR/photos (captioned crops of photographs that installed packages ship) and DIR/model (SDXL in
diffusers' folder layout: the real topology, small widths, random weights, and a VAE trained on the photos)
"""
_RECORD = "made.json"
_VERSION = 2  # of what is made: raise it when the same settings give something else


def main(argv: Sequence[str]) -> int:
    """Makes what is missing of the tiny model and its data; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train make-tiny",
        description="Make a tiny SDXL and a data set of real photographs, to try everything out.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument("--vae-steps", type=_count, default=1200, metavar="N", help="training of the VAE (1200)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of all random numbers (0)")
    # Two threads on two free cores take a third off the time; on busy cores they make it eight times as long.
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads (1)")
    arguments = parser.parse_intermixed_args(argv)
    out: Path = arguments.out
    photos, model = out / "photos", out / "model"
    _make(photos, {"version": _VERSION}, _make_photos)
    settings = {"version": _VERSION, "seed": arguments.seed, "vae_steps": arguments.vae_steps}
    _make(
        model,
        settings,
        lambda folder: _make_model(folder, photos, arguments.seed, arguments.vae_steps, arguments.threads),
    )
    print(f"{photos}: {len(list(photos.glob('*.jpg')))} photographs with captions")
    print(f"{model}: a tiny SDXL")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _positive(text: str) -> int:
    if not _count(text):
        raise ValueError
    return int(text)


def _make(folder: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Make one folder of the output, unless it was made with the same settings; it appears only when complete."""
    record = folder.parent / _RECORD
    made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if folder.exists():
        if folder.name not in made:
            raise UserError(f"{folder}: exists, and was not made by make-tiny; remove it or give another --out")
        if made[folder.name] == settings:
            return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    if folder.exists():
        print(f"{folder}: made anew, as the settings differ")
        shutil.rmtree(folder)
    # Recorded first: were it the other way round, a stop between the two would leave a folder of unknown origin.
    record.write_text(json.dumps(made | {folder.name: settings}, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)


def _make_photos(folder: Path) -> None:
    from trainer.tiny.photos import write_photos

    write_photos(folder)


def _make_model(folder: Path, photos: Path, seed: int, vae_steps: int, threads: int) -> None:
    import torch

    from trainer.tiny.tiny_model import write_tiny_model
    from trainer.tiny.tiny_vae import reconstruction_psnr, train_tiny_vae

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = _read_images(photos)
        vae = train_tiny_vae(images, vae_steps, seed)
        print(f"VAE: {reconstruction_psnr(vae, images[::4]):.1f} dB PSNR on the photographs")
        captions = [path.read_text(encoding="utf-8").strip() for path in sorted(photos.glob("*.txt"))]
        write_tiny_model(folder, seed=seed, vae=vae, captions=captions)
    finally:
        torch.set_num_threads(threads_before)


def _read_images(photos: Path) -> list[Any]:
    """The photographs as arrays [H, W, 3] uint8, at half their size, as configs/tiny.yaml trains on them."""
    import numpy as np
    from PIL import Image

    from trainer.raster import open_image

    arrays = []
    for path in sorted(photos.glob("*.jpg")):
        with open_image(path) as image:
            size = (image.width // 2, image.height // 2)
            arrays.append(np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)))
    return arrays
