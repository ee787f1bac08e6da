"""The memory plan held against what owners of real rigs have published: kohya-like settings, plain DDP.

    python benchmarks/published_memory.py

bf16 weights, DDP with gradients held twice (`gradient_as_bucket_view` off), four accumulated passes, checkpointing of
all blocks, 1024 x 1024 px, 225 tokens, both text encoders. Needs no GPU; takes a minute. DeepSpeed's ZeRO-2 was
published as well (23.5 GiB); its buffers are another engine's, which this plan does not know.
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.measure.card_memory import KEPT_BY_DRIVER
from trainer.memory.choice import GIB
from trainer.memory.holdings import Holding
from trainer.memory.run_plan import make_budget
from trainer.memory.strategy_peak import strategy_peak
from trainer.memory.traced_run import Shape, TracedRun, optimizer_bytes
from trainer.model_files.presets import preset
from trainer.model_files.run_model import open_model
from trainer.train.memory_inputs import planned_run

WORKERS = 4
UNET_71 = [f"input_blocks.{n}" for n in (1, 2, 3, 6)] + ["input_blocks.8.1", "output_blocks.0.1", "output_blocks.2.2"]
UNET_71 += ["output_blocks.5.2", *(f"output_blocks.{n}" for n in (6, 7, 8))]
CARD_GIB = 24 - KEPT_BY_DRIVER / GIB  # what CUDA has of an RTX 3090
TOKEN_EMBEDDING = 49408 * 1280  # the largest weight


@dataclass(frozen=True)
class Published:
    """A run that someone measured, as nvidia-smi shows it.

    Attributes:
        optimizer_bytes: of state for each weight; None: 8-bit AdamW.
        temporary_bytes: within the optimizer's step.
        told: GiB, or in words what happened on 24 GiB cards.
    """

    unet: str
    optimizer: str
    told: float | str
    batch: int = 1
    optimizer_bytes: float | None = None
    temporary_bytes: int = 0


ROWS = [
    Published("71 %", "AdamW 8-bit", "fits"),
    Published("100 %", "AdamW 8-bit", 26.1),
    Published("100 %", "AdamW 8-bit", 31.9, batch=4),
    # State in rows and columns: a thousandth of the weights. Five fp32 copies of one weight at a time (gradient,
    # weight, square, estimate, update), as transformers' implementation has them.
    Published("100 %", "Adafactor", 23.3, optimizer_bytes=0.0, temporary_bytes=5 * 4 * TOKEN_EMBEDDING),
    Published("100 %", "Lion 8-bit", "out of memory", optimizer_bytes=1.0),
    Published("100 %", "CAME", "out of memory", optimizer_bytes=2.0),  # one moment in bf16, the others factored
]


def main() -> None:
    """Print the table."""
    print("| UNet trained | optimizer | images in a pass | planned GiB | published GiB | difference |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(preset(name)))
        for row in ROWS:
            needed = planned_bytes(kohya_like(folder, row), row) / GIB
            if isinstance(row.told, str):
                right = (needed <= CARD_GIB) == (row.told == "fits")
                told = f"{row.told} ({CARD_GIB:.2f}) | {'as planned' if right else 'not as planned'}"
            else:
                told = f"{row.told} | {needed / row.told - 1:+.1%}"
            print(f"| {row.unet} | {row.optimizer} | {row.batch} | {needed:.1f} | {told} |", flush=True)


def kohya_like(folder: str, row: Published) -> Config:
    """What those runs had, in this product's words."""
    fields: dict[str, Any] = {
        "run": {"dir": "run"},
        "model": {"path": folder},
        "data": {"sources": [{"path": "images"}], "prepared": "prepared"},
        "captions": {"max_tokens": 225, "chunks": "kohya"},
        "trainable": {
            "unet": {"freeze": UNET_71 if row.unet == "71 %" else []},
            "text_encoder_1": {"train": True},
            "text_encoder_2": {"train": True},
        },
        "train": {"steps": 1, "batch_size_per_gpu": row.batch, "precision": "bf16_stochastic"},
        "optimizer": {"lr": 1e-6, "kind": "adamw_8bit"},
    }
    return Config.model_validate(fields)


def planned_bytes(config: Config, row: Published) -> int:
    """Bytes on each card, all in all."""
    planned = planned_run(config, open_model(config.model.path))
    run = TracedRun(planned, Shape(Bucket(1024, 1024), row.batch), "cuda")
    trace = run.trace("ddp", len(run.blocks("ddp")))
    trained = sum(math.prod(trace.shapes[name]) for name in trace.trains)
    state = row.optimizer_bytes
    holding = Holding(
        strategy="ddp",
        world=WORKERS,
        stored_bytes=2,
        compute_bytes=2,
        reduce_bytes=2,
        optimizer_bytes=optimizer_bytes(planned, trace) / trained if state is None else state,
        accumulation=4,
        bucket_views=False,
        optimizer_temporary_bytes=row.temporary_bytes,
    )
    return make_budget(config.memory.budget, "cuda", round(CARD_GIB * GIB), WORKERS).needed(
        strategy_peak(trace, holding)
    )


if __name__ == "__main__":
    main()
