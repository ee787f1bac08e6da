"""The memory plan held against what owners of real rigs have published: kohya-like settings, plain DDP.

    python benchmarks/published_memory.py

bf16 weights, 8-bit AdamW, DDP with gradients held twice (`gradient_as_bucket_view` off), four accumulated passes,
checkpointing of all blocks, 1024 x 1024 px, 225 tokens, both text encoders. Needs no GPU; takes a minute.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.measure.memory_plan import GIB
from trainer.measure.memory_strategy import Holding, strategy_peak
from trainer.model.presets import preset
from trainer.train.memory_plan import make_budget
from trainer.train.traced import Shape, TracedRun, optimizer_bytes

UNET_71 = [f"input_blocks.{n}" for n in (1, 2, 3, 6)] + ["input_blocks.8.1", "output_blocks.0.1", "output_blocks.2.2"]
UNET_71 += ["output_blocks.5.2", *(f"output_blocks.{n}" for n in (6, 7, 8))]
# Share of the UNet, images in a pass, frozen blocks, what was published (GiB as nvidia-smi shows them).
ROWS: list[tuple[str, int, list[str], float | None]] = [
    ("71 %", 1, UNET_71, None),
    ("100 %", 1, [], 26.1),
    ("100 %", 4, [], 31.9),
]


def main() -> None:
    """Print the table."""
    print("| UNet trained | images in a pass | planned GiB | published GiB | difference |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(preset(name)))
        for share, batch, frozen, published in ROWS:
            needed = planned(kohya_like(folder, batch, frozen), batch) / GIB
            told = "fits in 24" if published is None else f"{published} | {needed / published - 1:+.1%}"
            print(f"| {share} | {batch} | {needed:.1f} | {told} |", flush=True)


def kohya_like(folder: str, batch: int, frozen: list[str]) -> Config:
    """What those runs had, in this product's words."""
    fields: dict[str, Any] = {
        "run": {"dir": "run"},
        "model": {"path": folder},
        "data": {"sources": [{"path": "images"}], "prepared": "prepared"},
        "captions": {"max_tokens": 225, "chunks": "kohya"},
        "trainable": {
            "unet": {"freeze": frozen},
            "text_encoder_1": {"train": True},
            "text_encoder_2": {"train": True},
        },
        "train": {"steps": 1, "batch_size_per_gpu": batch, "precision": "bf16_stochastic"},
        "optimizer": {"lr": 1e-6, "kind": "adamw_8bit"},
    }
    return Config.model_validate(fields)


def planned(config: Config, batch: int) -> int:
    """Bytes on each of four cards."""
    run = TracedRun(config, Shape(Bucket(1024, 1024), batch), "cuda")
    trace = run.trace("ddp", len(run.blocks("ddp")))
    trained = sum(_product(trace.shapes[name]) for name in trace.trains)
    holding = Holding(
        strategy="ddp",
        world=4,
        stored_bytes=2,
        compute_bytes=2,
        reduce_bytes=2,
        optimizer_bytes=optimizer_bytes(config, trace) / trained,
        accumulation=4,
        bucket_views=False,
    )
    return make_budget(config, "cuda", 24 * GIB, 4).needed(strategy_peak(trace, holding))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


if __name__ == "__main__":
    main()
