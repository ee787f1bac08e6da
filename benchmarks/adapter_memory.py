"""Planned against measured peak memory of an adapter: SDXL itself, at full size, trained for real on the CPU.

    python -m benchmarks.adapter_memory [--kind lora] [--side 1024] [--budget 10GiB] [--precision bf16] [--frozen nf4]

The weights are made up, all else is as in a run of one worker: the frozen base, the adapter, AdamW, the frozen text
encoders in bf16, and as many recomputed blocks as the plan chooses for the budget. The measured peak is PyTorch's own
count of what it allocates in the second step; the first is one of 64 px. At 1024 px it takes 11 GB of memory and some
minutes of one core.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory_plan import measured_peak
from trainer.adapters.initial_values import AdapterStart, draw_initial
from trainer.adapters.parameters import adapter_parameters
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.memory.choice import GIB
from trainer.memory.planned_run import PlannedRun
from trainer.memory.run_plan import memory_plan
from trainer.memory.traced_run import POSITIONS_PER_CHUNK, Shape, frozen_text_encoders
from trainer.model.adapted import lay_out_run
from trainer.model.conditioning import condition_text
from trainer.model.frozen.packed_layers import packed_layers
from trainer.model.recompute import apply_recompute
from trainer.model_files.presets import preset
from trainer.model_files.run_model import open_model
from trainer.optim.optimizers import make_optimizer
from trainer.optim.precision import precision_of
from trainer.parallel.comm import Comm
from trainer.parallel.sharding import materialize
from trainer.parallel.strategy import Sharing, make_strategy
from trainer.train.memory_inputs import make_setting, planned_run
from trainer.train.trained_parts import what_trains

ALONE = Comm(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def step_of(
    config: Config, shape: Shape, recomputed: Collection[str] = (), first: Shape | None = None
) -> Callable[[], Callable[[], None]]:
    """What makes a real step of the run ready, on made up weights.

    Args:
        recomputed: names of blocks.
        first: of the first step, where a smaller one will do to have the optimizer's state; None: `shape`.
    """

    def prepare() -> Callable[[], None]:
        run, precision = planned_run(config, open_model(Path(str(config.model.path)))), _precision(config)
        start, held = AdapterStart(config.adapter), run.frozen_weights
        dtypes = precision.weights, precision.compute
        model = lay_out_run(run.model, what_trains(config), start, *dtypes, frozen_weights=held).train()
        apply_recompute(model, recomputed)
        strategy = make_strategy(model, Sharing("single"), (), (), ALONE, _fill)
        rounding = precision.rounding
        optimizer = make_optimizer(strategy.parameters, config.optimizer, rounding=rounding)
        text, autocast = _text_of(run, model, shape.batch), precision.autocast
        shapes = [first or shape]

        def step() -> None:
            now = shapes.pop() if shapes else shape
            size = (shape.batch, 4, now.bucket.height_px // 8, now.bucket.width_px // 8)
            target, noisy = torch.zeros(size), torch.zeros(size, dtype=precision.weights)
            arguments = text()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                timesteps = torch.zeros(shape.batch, dtype=torch.int64)
                prediction = strategy.model(noisy, timesteps, torch.zeros(shape.batch, 6), **arguments)
                loss = F.mse_loss(prediction.float(), target)
            del arguments
            strategy.backward(loss)
            del prediction, loss
            optimizer.step()
            strategy.clear_gradients()

        return step

    return prepare


def _precision(config: Config) -> Any:
    return precision_of(config.train.precision)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    own = adapter_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.fill_(0.01)
        if name in own and "magnitude" not in name:
            draw_initial(own[name], name, 0)
    for layer in packed_layers(model).values():
        layer.fill(torch.full(layer.weight_shape, 0.01))


def _text_of(run: PlannedRun, model: Any, batch: int) -> Callable[[], dict[str, Tensor]]:
    """What a pass is given of captions: what frozen text encoders make of them, or what was stored."""
    unet = dict(model.unet.config)
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    if run.cache_text:
        hidden = (batch, POSITIONS_PER_CHUNK, unet["cross_attention_dim"])
        return lambda: {"text_hidden": torch.zeros(hidden), "text_pooled": torch.zeros(batch, pooled)}
    encoders = frozen_text_encoders(run)
    for module in (encoders.one, encoders.two):
        materialize(module, ALONE.device)
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.01)

    def encode() -> dict[str, Tensor]:
        ids = torch.zeros(batch, 2, 1, POSITIONS_PER_CHUNK, dtype=torch.int64)
        found = condition_text(encoders, ALONE.device, ids, None, None)
        return {"text_hidden": found.hidden, "text_pooled": found.pooled}

    return encode


def write_configurations(folder: Path) -> Path:
    """SDXL's own, without weights."""
    for name in COMPONENTS:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(preset(name)))
    return folder


def main() -> None:
    """Print one row of a table, and below it what the plan consists of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024, help="of the images in px (default: 1024)")
    parser.add_argument("--budget", default="10GiB")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--frozen", default="compute", help="model.frozen_weights")
    parser.add_argument("--recompute", default="auto", help="memory.recompute")
    parser.add_argument("--cache-text", action="store_true", help="without the text encoders")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_configurations(Path(temporary) / "sdxl")
        model = {"path": str(folder), "text_encoder_precision": "bf16", "frozen_weights": arguments.frozen}
        fields = {
            "run": {"dir": "run"},
            "model": model,
            "data": {"sources": [{"path": "."}], "prepared": "prepared", "cache_text": arguments.cache_text},
            "train": {"steps": 10, "precision": arguments.precision},
            "optimizer": {"lr": 1e-4},
            "memory": {"budget": arguments.budget, "recompute": arguments.recompute},
            "adapter": {"kind": arguments.kind, "rank": arguments.rank},
        }
        config, bucket = Config.model_validate(fields), Bucket(arguments.side, arguments.side)
        plan = memory_plan(
            planned_run(config, open_model(folder)),
            make_setting(config, "cpu", None, 1, 1, [bucket]),
            Path(temporary) / "plans",
        )
        assert plan.chosen is not None, "nothing fits the budget"
        begin, cpu = time.perf_counter(), time.process_time()
        small = Shape(Bucket(64, 64), 1)
        measured = measured_peak(step_of(config, Shape(bucket, 1), plan.recompute, small))
        took = f"{time.perf_counter() - begin:,.0f} s, {time.process_time() - cpu:,.0f} s of CPU time for both steps"
    planned = sum(plan.chosen.split.values())
    what = f"{arguments.kind} {arguments.rank}, {arguments.precision} over {arguments.frozen}"
    numbers = f"{planned / GIB:.3f} | {measured / GIB:.3f} | {planned / measured - 1:+.2%}"
    print("| adapter | px | recomputed | planned GiB | measured GiB | error |\n|---|---|---|---|---|---|")
    print(f"| {what} | {arguments.side} | {len(plan.recompute)} of {plan.num_blocks} | {numbers} |")
    print(f"\n{', '.join(f'{part} {size / GIB:.2f}' for part, size in plan.chosen.split.items() if size)}; {took}")


if __name__ == "__main__":
    main()
