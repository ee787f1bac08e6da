"""Hostile files for what takes two models or writes one, and paths that no file can have."""

import struct
from pathlib import Path
from random import Random

from tests.hostile_files import Hostile, kind
from tests.hostile_models import tensor, write_header

UNET = "model.diffusion_model."
FIRST = UNET + "input_blocks.0.0.weight"
# Of text in a chart, `$` begins a formula.
NAMES = (UNET + r"$\frac{$.0.weight", UNET + "\x1b[2J.0.weight", UNET + "a\u202e.b.weight", UNET + "\ud800x.1.weight",
         UNET + "x" * 5000 + ".weight", "first_stage_model.\u2028.3.weight", "other\x1b[2J")  # fmt: skip
STACKED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
POSITIONS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
SHAPES: tuple[dict[str, list[int]], ...] = (
    {name: [4] for name in NAMES},
    {STACKED: []},
    {STACKED: [3]},
    {STACKED: [0, 1 << 40]},
    {POSITIONS: [3], "conditioner.embedders.1.model.logit_scale": [0]},
    {UNET + "input_blocks.1.1.norm.weight": [], "conditioner.embedders.1.model.text_projection": [2, 1, 1]},
)
VALUES = (1.0, float("nan"), float("inf"), 3e38)


def model(path: Path, shapes: dict[str, list[int]], value: float) -> Path:
    header, end = {}, 0
    for name, shape in ({FIRST: [320, 4, 3, 3]} | shapes).items():
        count = 1
        for length in shape:
            count *= length
        header[name] = tensor(shape, end, end + 4 * count)
        end += 4 * count
    return write_header(path, header, struct.pack("<f", value) * (end // 4))


@kind("two-models")
def two_models(random: Random, seed: int, folder: Path) -> Hostile:
    shapes = SHAPES[seed % len(SHAPES)]
    a, b = (model(folder / f"{name}.safetensors", shapes, random.choice(VALUES)) for name in "ab")
    ways = ((str(b),), (str(b), "--json"), ("--reference", str(b)))
    return Hostile(a, argv=("inspect", str(a), *random.choice(ways)), may_pass=True)


PATHS = ("x" * 5000, "a\x00b", "none\x1b[2J\u202e", "/dev/zero", "x" * 255 + ".yaml", "/" * 3000 + "\udcff")


@kind("path")
def path_of_nothing(random: Random, seed: int, folder: Path) -> Hostile:
    place = PATHS[seed % len(PATHS)]
    out = str(folder / "out.safetensors")
    ways = (("inspect", place), ("export", place, "-o", out), ("train", place), ("plan", place),
            ("merge", place, place, "--alpha", "0.5", "-o", out), ("sample", place), ("ema", place))  # fmt: skip
    return Hostile(folder, argv=ways[seed // len(PATHS) % len(ways)])
