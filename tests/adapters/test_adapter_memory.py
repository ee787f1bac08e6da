"""The plan of a run with an adapter: against measured memory of a small model, and for SDXL itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory_plan import POOLED_WIDTH, measured_peak, unet_config
from tests.adapters.adapter_config_of import KINDS
from tests.memory.test_run_plan import SQUARE, make_config, planned, setting
from tests.train.real_run import ALONE
from trainer.adapters.initial_values import AdapterStart, draw_initial
from trainer.adapters.parameters import adapter_parameters
from trainer.config.schema import Config, TrainableConfig
from trainer.data.buckets import Bucket
from trainer.memory.choice import GIB
from trainer.memory.run_plan import memory_plan
from trainer.memory.traced_run import Shape, TracedRun, holdings, lay_out_planned
from trainer.model.adapted import lay_out_run
from trainer.model.frozen.packed_layers import packed_bytes, packed_layers
from trainer.model.recompute import apply_recompute, repeated_blocks
from trainer.model_files.presets import preset
from trainer.optim.optimizers import make_optimizer
from trainer.optim.precision import precision_of
from trainer.parallel.strategy import Sharing, make_strategy
from trainer.train.trained_parts import what_trains

SIDE_PX, BATCH = 256, 2


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of a small SDXL, without weights."""
    folder = tmp_path_factory.mktemp("mini")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir()
        config = unet_config("mini") if name == "unet" else preset(name)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def step_of(config: Config, recompute: bool) -> Callable[[], Callable[[], None]]:
    """A real step of the run on random weights."""

    def fill(model: nn.Module) -> None:
        own = adapter_parameters(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(0.01)
                if name in own and "magnitude" not in name:
                    draw_initial(own[name], name, 0)
        for layer in packed_layers(model).values():
            layer.fill(torch.full(layer.weight_shape, 0.01))

    def prepare() -> Callable[[], None]:
        run = planned(config)
        start, precision = AdapterStart(config.adapter), precision_of(config.train.precision)
        dtypes, held = (torch.float32, precision.compute), run.frozen_weights
        model = lay_out_run(run.model, what_trains(config), start, *dtypes, frozen_weights=held).train()
        if recompute:
            apply_recompute(model, repeated_blocks(model))
        strategy = make_strategy(model, Sharing("single"), (), (), ALONE, fill)
        optimizer = make_optimizer(strategy.parameters, config.optimizer)
        width, side = unet_config("mini")["cross_attention_dim"], SIDE_PX // 8

        def step() -> None:
            target, noisy = torch.zeros(BATCH, 4, side, side), torch.zeros(BATCH, 4, side, side)
            texts = torch.zeros(BATCH, 77, width), torch.zeros(BATCH, POOLED_WIDTH)
            with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
                timesteps = torch.zeros(BATCH, dtype=torch.int64)
                prediction = model(noisy, timesteps, torch.zeros(BATCH, 6), None, *texts)
                loss = F.mse_loss(prediction.float(), target)
            strategy.backward(loss)
            del prediction, loss
            optimizer.step()
            strategy.clear_gradients()

        return step

    return prepare


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "precision", "recompute"),
    [("lora", "bf16", False), ("locon", "fp32", True), ("dora", "bf16", False), ("lokr", "bf16", False)],
)
def test_planned_is_measured(mini: Path, kind: str, precision: str, recompute: bool) -> None:
    """fp32 where blocks are recomputed: in bf16, 12 to 13 % more is measured than planned, 1.5 to 3 MiB of what this
    small a model then holds, probably scratch within operations of the CPU.
    """
    train = {"steps": 10, "precision": precision}
    sections: dict[str, Any] = {"adapter": KINDS[kind], "data": {"cache_text": True}, "train": train}
    config = make_config(mini, **sections)
    run = planned(config)
    traced = TracedRun(run, Shape(Bucket(SIDE_PX, SIDE_PX), BATCH), "cpu")
    recomputed = len(traced.blocks("single")) if recompute else 0
    holding = holdings(run, traced.trace("single"), 1, 1, "cpu")["one worker"]
    peak = traced.peak(holding, recomputed, False)
    assert peak.total == pytest.approx(measured_peak(step_of(config, recompute)), rel=0.05)
    trained = peak.split["optimizer"] // 8
    base = sum(parameter.numel() for parameter in lay_out_run_of(config).parameters()) - trained
    assert peak.split["weights"] == base * (2 if precision == "bf16" else 4) + trained * 4


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("held", "kind", "precision", "recompute"),
    [
        ("nf4", "lora", "fp32", False),
        ("int8", "lora", "fp32", True),
        ("int8", "dora", "bf16", False),
        ("nf4", "locon", "fp32", True),
        ("nf4", "loha", "fp32", False),
    ],
)
def test_planned_is_measured_over_a_packed_base(
    mini: Path, held: str, kind: str, precision: str, recompute: bool
) -> None:
    """Of LoRA in bf16, 5.4 % more is measured: the same tensors, but 2 MB of scratch within the CPU's kernels."""
    train = {"steps": 10, "precision": precision}
    model = {"path": str(mini), "frozen_weights": held}
    config = make_config(mini, adapter=KINDS[kind], data={"cache_text": True}, train=train, model=model)
    run = planned(config)
    traced = TracedRun(run, Shape(Bucket(SIDE_PX, SIDE_PX), BATCH), "cpu")
    recomputed = len(traced.blocks("single")) if recompute else 0
    holding = holdings(run, traced.trace("single"), 1, 1, "cpu")["one worker"]
    peak = traced.peak(holding, recomputed, False)
    assert peak.total == pytest.approx(measured_peak(step_of(config, recompute)), rel=0.05)
    laid_out = lay_out_planned(run, torch.float32, precision_of(precision).compute)
    assert peak.split["weights"] == packed_bytes(laid_out) + sum(p.nbytes for p in laid_out.parameters())


def lay_out_run_of(config: Config) -> nn.Module:
    run = planned(config)
    return lay_out_run(run.model, what_trains(config), AdapterStart(config.adapter), torch.float32, torch.float32)


@pytest.mark.slow
def test_sdxl_at_1024_px_on_a_card_of_12_gb(tmp_path: Path) -> None:
    """LoRA of rank 16, one image, text encoders in bf16 beside it."""
    folder = tmp_path / "sdxl"
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(preset(name)))
    sections: dict[str, Any] = {"adapter": {"kind": "lora"}, "memory": {"budget": "10GiB"}}
    config = make_config(folder, **sections, model={"path": str(folder), "text_encoder_precision": "bf16"})
    plan = memory_plan(planned(config), setting(config, 1, SQUARE), tmp_path / "plans")
    print("\n".join(plan.describe()))
    assert plan.chosen is not None and plan.chosen.needed < 10 * GIB
    assert plan.checkpoint_bytes < 0.6e9
    assert what_trains(config) == TrainableConfig()
