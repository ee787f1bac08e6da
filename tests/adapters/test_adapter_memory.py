"""The plan of a run with an adapter: against measured memory of a small model, and for SDXL itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.adapter_memory import step_of
from benchmarks.memory_plan import measured_peak, unet_config
from tests.adapters.adapter_config_of import KINDS
from tests.memory.test_run_plan import SQUARE, make_config, planned, setting
from trainer.adapters.initial_values import AdapterStart
from trainer.config.schema import Config, TrainableConfig
from trainer.data.buckets import Bucket
from trainer.memory.choice import GIB
from trainer.memory.run_plan import memory_plan
from trainer.memory.traced_run import Shape, TracedRun, holdings, lay_out_planned
from trainer.model.adapted import lay_out_run
from trainer.model.frozen.packed_layers import packed_bytes
from trainer.model_files.presets import preset
from trainer.optim.precision import precision_of
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """In bf16, the CPU's convolutions take scratch for each thread, which shows in so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "precision", "recompute"),
    [
        ("lora", "bf16", False),
        ("lora", "bf16", True),
        ("locon", "fp32", True),
        ("dora", "bf16", False),
        ("lokr", "bf16", False),
    ],
)
def test_planned_is_measured(mini: Path, kind: str, precision: str, recompute: bool) -> None:
    train = {"steps": 10, "precision": precision}
    sections: dict[str, Any] = {"adapter": KINDS[kind], "data": {"cache_text": True}, "train": train}
    config = make_config(mini, **sections)
    run = planned(config)
    shape = Shape(Bucket(SIDE_PX, SIDE_PX), BATCH)
    traced = TracedRun(run, shape, "cpu")
    blocks = traced.blocks("single") if recompute else ()
    holding = holdings(run, traced.trace("single"), 1, 1, "cpu")["one worker"]
    peak = traced.peak(holding, len(blocks), False)
    assert peak.total == pytest.approx(measured_peak(step_of(config, shape, blocks)), rel=0.05)
    trained = peak.split["optimizer"] // 8
    base = sum(parameter.numel() for parameter in lay_out_run_of(config).parameters()) - trained
    assert peak.split["weights"] == base * (2 if precision == "bf16" else 4) + trained * 4


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("held", "kind", "precision", "recompute"),
    [
        ("nf4", "lora", "bf16", False),
        ("int8", "lora", "fp32", True),
        ("int8", "dora", "bf16", False),
        ("nf4", "locon", "fp32", True),
        ("nf4", "loha", "fp32", False),
    ],
)
def test_planned_is_measured_over_a_packed_base(
    mini: Path, held: str, kind: str, precision: str, recompute: bool
) -> None:
    train = {"steps": 10, "precision": precision}
    model = {"path": str(mini), "frozen_weights": held}
    config = make_config(mini, adapter=KINDS[kind], data={"cache_text": True}, train=train, model=model)
    run = planned(config)
    shape = Shape(Bucket(SIDE_PX, SIDE_PX), BATCH)
    traced = TracedRun(run, shape, "cpu")
    blocks = traced.blocks("single") if recompute else ()
    holding = holdings(run, traced.trace("single"), 1, 1, "cpu")["one worker"]
    peak = traced.peak(holding, len(blocks), False)
    assert peak.total == pytest.approx(measured_peak(step_of(config, shape, blocks)), rel=0.05)
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
