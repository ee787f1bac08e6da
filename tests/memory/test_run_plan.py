"""The plan of a run: within its budget, kept for the next time, and for SDXL itself what is published of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.real_run import model_of
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.memory.choice import GIB
from trainer.memory.planned_run import PlannedRun
from trainer.memory.report import MemoryPlan
from trainer.memory.run_plan import Setting, make_budget, memory_plan, require_fit
from trainer.memory.traced_run import Shape, TracedRun, holdings
from trainer.model_files.presets import preset
from trainer.optim.hosted import hosted_activations
from trainer.tiny.tiny_model import write_tiny_model
from trainer.train.memory_inputs import make_setting, planned_run

SQUARE = Bucket(1024, 1024)
BOTH_ENCODERS = {"text_encoder_1": {"train": True}, "text_encoder_2": {"train": True}}
SMALLEST_STATE = {"train": {"precision": "bf16_stochastic"}, "optimizer": {"kind": "adamw_8bit"}}


def make_config(folder: Path, /, **sections: dict[str, Any]) -> Config:
    fields: dict[str, dict[str, Any]] = {
        "run": {"dir": "run"},
        "model": {"path": str(folder)},
        "data": {"sources": [{"path": "images"}], "prepared": "prepared"},
        "train": {"steps": 10},
        "optimizer": {"lr": 1e-6},
    }
    for name, values in sections.items():
        fields[name] = fields.get(name, {}) | values
    return Config.model_validate(fields)


def planned(config: Config) -> PlannedRun:
    return planned_run(config, model_of(config))


def setting(config: Config, workers: int, bucket: Bucket) -> Setting:
    return make_setting(config, "cuda", None, workers, workers, [bucket])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's configurations, without its weights."""
    folder = tmp_path_factory.mktemp("sdxl")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(preset(name)))
    return folder


@pytest.mark.e2e
def test_a_small_model_in_a_small_budget(model_folder: Path, tmp_path: Path) -> None:
    config = make_config(model_folder, memory={"budget": "2GiB"})
    wide = memory_plan(planned(config), setting(config, 4, Bucket(256, 256)), tmp_path)
    assert wide.chosen and wide.chosen.strategy == "zero2" and wide.recompute == ()  # gradients travel in bf16
    assert {rung.strategy for rung in wide.looked_at} == {"ddp", "zero2", "zero3"}
    (kept,) = tmp_path.iterdir()
    again = memory_plan(planned(config), setting(config, 4, Bucket(256, 256)), tmp_path)
    assert again == wide and list(tmp_path.iterdir()) == [kept]


@pytest.mark.e2e
def test_the_optimizers_state_goes_to_the_host_where_nothing_else_fits(model_folder: Path, tmp_path: Path) -> None:
    def plan(offload: str | bool, budget: str, **memory: Any) -> MemoryPlan:
        memory = {"release_gradients": True, "offload_optimizer": offload, "budget": budget, **memory}
        config = make_config(model_folder, memory=memory, **SMALLEST_STATE)
        return memory_plan(planned(config), setting(config, 1, Bucket(64, 64)), tmp_path)

    least = {"recompute": "all", "offload_activations": True}
    kept, hosted = (plan(offload, "2GiB", **least) for offload in (False, True))
    assert kept.chosen and hosted.chosen and hosted.chosen.hosts_state and not kept.chosen.hosts_state
    state = kept.optimizer_bytes["adamw_8bit"]
    assert kept.chosen.split["optimizer"] == pytest.approx(state, rel=1e-3)
    assert hosted.chosen.split["optimizer"] < 0.5 * state
    assert hosted.host_bytes - kept.host_bytes == pytest.approx(state, rel=1e-3)
    assert not (chosen := plan("auto", f"{kept.chosen.needed / 2**20 + 1:.3f}MiB").chosen) or not chosen.hosts_state
    between = f"{(kept.chosen.needed + hosted.chosen.needed) / 2 / 2**20:.3f}MiB"
    found = plan("auto", between).chosen
    assert found and found.hosts_state and "host's memory" in found.label
    refused = plan(False, between)
    assert refused.chosen is None and refused.advice == ("memory.offload_optimizer: auto",)


@pytest.mark.e2e
def test_what_cannot_fit_is_refused_with_what_would(model_folder: Path, tmp_path: Path) -> None:
    config = make_config(model_folder, memory={"budget": "700MiB"}, train={"batch_size_per_gpu": 16})
    plan = memory_plan(planned(config), setting(config, 1, SQUARE), tmp_path)
    assert plan.chosen is None and plan.advice == ("train.batch_size_per_gpu: 8",)
    with pytest.raises(UserError, match="it fits with train"):
        require_fit(plan)


def test_budgets(model_folder: Path) -> None:
    config = make_config(model_folder)
    assert make_budget(config.memory.budget, "cpu", None, 4).total is None
    card = make_budget(config.memory.budget, "cuda", 24 * GIB, 4)
    assert card.total is not None and 23 * GIB < card.total < 24 * GIB and card.buffers > 0
    assert make_budget(config.memory.budget, "cuda", 24 * GIB, 1).buffers == 0


@pytest.mark.e2e
def test_averages_are_counted(model_folder: Path, tmp_path: Path) -> None:
    """fp32 copies of what trains: on one worker all, spread as the weights are, or in the host's memory."""
    sections: dict[str, Any] = {"memory": {"budget": "2GiB"}, "train": {"precision": "bf16_stochastic"}}
    two = {"averages": [{}, {"name": "long", "kind": "power"}], "snapshots": {"every_steps": 5, "dtype": "fp16"}}
    plain = make_config(model_folder, **sections)
    weights = model_of(plain).count_weights("unet")

    def plan(workers: int, **ema: Any) -> MemoryPlan:
        config = make_config(model_folder, ema=ema, **sections)
        return memory_plan(planned(config), setting(config, workers, Bucket(64, 64)), tmp_path)

    def averages(plan: MemoryPlan, strategy: str) -> int:
        return min(rung.split["averages"] for rung in plan.looked_at if rung.strategy == strategy)

    without, alone, shared = plan(1), plan(1, **two), plan(4, **two)
    assert without.chosen and alone.chosen and without.chosen.split["averages"] == 0
    assert averages(alone, "single") == averages(shared, "ddp") == 2 * 4 * weights
    assert averages(shared, "zero2") == pytest.approx(2 * weights, rel=0.02)  # rows are not divided evenly
    assert alone.chosen.needed - without.chosen.needed >= 2 * 4 * weights
    assert alone.checkpoint_bytes - without.checkpoint_bytes == 2 * 4 * weights
    assert (alone.snapshot_bytes, without.snapshot_bytes) == (2 * weights, 0)
    assert "each of the averages' snapshots takes" in "\n".join(alone.describe())
    on_host = plan(1, **two, place="host")
    assert averages(on_host, "single") == 0 and on_host.chosen
    assert on_host.host_bytes - without.host_bytes >= 2 * 4 * weights
    # bf16 weights wait beside their average while it is scored, and it is exchanged through an fp32 buffer.
    for score, swap in (("live", 0), ("long", (2 + 4) * weights)):
        run = planned(make_config(model_folder, ema=two | {"score": [score]}, **sections))
        trace = TracedRun(run, Shape(Bucket(64, 64), 1), "cuda").trace("single")
        assert holdings(run, trace, 1, 1, "cuda")["one worker"].average_swap_bytes == swap


@pytest.mark.e2e
def test_weights_that_are_averaged_are_counted(model_folder: Path, tmp_path: Path) -> None:
    """No buckets; common weights and momentum on the card or the host; each worker's own in a checkpoint."""

    def plan(**exchange: Any) -> MemoryPlan:
        config = make_config(model_folder, memory={"strategy": "ddp"}, exchange=exchange)
        return memory_plan(planned(config), setting(config, 4, Bucket(64, 64)), tmp_path / "plans")

    shared, device, host = plan(), plan(average_every=8), plan(average_every=8, outer_place="host")
    weights = device.num_trained
    assert shared.chosen and device.chosen and host.chosen
    assert device.chosen.split["communication"] - host.chosen.split["communication"] == 8 * weights
    assert host.host_bytes - device.host_bytes == 4 * 8 * weights
    assert device.wire_bytes == shared.wire_bytes // 8 == 2 * 4 * weights * 3 // 4 // 8
    # Momentum, the weights of four, and the moments of three more.
    assert device.checkpoint_bytes - shared.checkpoint_bytes == pytest.approx((4 + 4 * 4 + 3 * 8) * weights, rel=1e-3)
    assert any("exchange.outer_place: host" in line for line in advice_of(model_folder, device, tmp_path))


def advice_of(model_folder: Path, device: MemoryPlan, tmp_path: Path) -> tuple[str, ...]:
    """For the same run with a little less memory than its common weights take."""
    assert device.chosen
    budget = f"{(device.chosen.needed - 4 * device.num_trained) / 2**20:.3f}MiB"
    wish = {"strategy": "ddp", "budget": budget, "recompute": "none", "offload_activations": False}
    config = make_config(model_folder, memory=wish, exchange={"average_every": 8})
    return memory_plan(planned(config), setting(config, 4, Bucket(64, 64)), tmp_path / "plans").advice


@pytest.mark.slow
def test_all_of_sdxl_on_four_cards_of_24_gb(sdxl: Path, tmp_path: Path) -> None:
    """UNet and both text encoders, 225 tokens, fp32 weights and AdamW, 4 images a card, by arithmetic.

    3.385 billion weights, of which the last layer of text encoder 1 does not train; activations as measured elsewhere.
    """
    config = make_config(
        sdxl,
        memory={"budget": "23GiB"},
        trainable=BOTH_ENCODERS,
        captions={"max_tokens": 225},
        train={"batch_size_per_gpu": 4},
    )
    plan = memory_plan(planned(config), setting(config, 4, SQUARE), tmp_path)
    assert plan.chosen and plan.chosen.strategy == "zero2" and plan.chosen.needed <= 23 * GIB
    assert plan.num_blocks == 131
    (least,) = [rung for rung in plan.looked_at if rung.strategy == "zero2" and rung.recomputed == plan.num_blocks]
    share, embeddings = 3.385e9 / 4, 101.3e6
    assert least.split["weights"] == pytest.approx(2 * (4 * share - embeddings), rel=0.01)
    assert least.split["masters"] == pytest.approx(4 * share, rel=0.01)
    assert least.split["optimizer"] == pytest.approx(8 * share, rel=0.01)
    assert least.split["gradients"] == pytest.approx(4 * share, rel=0.02)
    assert least.split["activations"] == pytest.approx(2.70 * GIB, rel=0.02)


@pytest.mark.slow
def test_all_of_the_unet_on_one_card_of_24_gb(sdxl: Path, tmp_path: Path) -> None:
    """Activations of one image as measured elsewhere: 6.44 GiB, and 0.67 GiB when recomputed."""
    found = {}
    for recompute in ("auto", "all"):
        memory = {"budget": "23GiB", "recompute": recompute}
        config = make_config(sdxl, memory=memory, model={"text_encoder_precision": "bf16"}, **SMALLEST_STATE)
        plan = memory_plan(planned(config), setting(config, 1, SQUARE), tmp_path)
        assert plan.chosen and plan.chosen.needed <= 23 * GIB
        found[plan.chosen.recomputed] = plan.chosen.split["activations"] / GIB
    assert found[0] == pytest.approx(6.44, abs=0.02) and found[plan.num_blocks] <= 0.68


@pytest.mark.e2e
def test_activations_of_so_many_blocks_move(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are not recomputed, and the table tells the price; `some` is never dearer than none."""
    monkeypatch.setattr(hosted_activations, "SMALLEST_BYTES", 2**12)  # the model is small

    def plan(offload: str | int | bool, budget: str, recompute: str = "auto") -> MemoryPlan:
        memory = {"budget": budget, "offload_activations": offload, "recompute": recompute}
        config = make_config(model_folder, memory=memory, train={"batch_size_per_gpu": 2})
        return memory_plan(planned(config), setting(config, 1, Bucket(512, 512)), tmp_path / "plans")

    plain, all_again = plan(False, "4GiB"), plan(False, "4GiB", "all")
    assert plain.chosen and all_again.chosen and not plain.recompute
    budget = f"{(plain.chosen.needed + 3 * all_again.chosen.needed) / 4 / 2**20:.3f}MiB"
    again, some, wished = plan(False, budget), plan("some", budget), plan(5, budget)
    assert again.chosen and some.chosen and wished.chosen
    assert some.chosen.extra_s <= again.chosen.extra_s and some.chosen.recomputed <= again.chosen.recomputed
    count = wished.chosen.moved
    assert len(wished.moved) == count == min(5, wished.num_blocks - wished.chosen.recomputed) > 0
    assert len({*wished.moved}) == count
    assert not {*wished.moved} & {*wished.recompute} and len(wished.recompute) == wished.chosen.recomputed
    assert wished.host_bytes - again.host_bytes == wished.chosen.moved_bytes > 0
    text = "\n".join(wished.describe())
    assert f"activations of {count} in the host's memory" in text and "12 GB/s between a card" in text
    assert "GiB moved  waits s" in text and f"{wished.chosen.recomputed} recomputed, {count} moved" in text
    assert MemoryPlan.from_json(json.loads(json.dumps(wished.to_json()))) == wished


@pytest.mark.slow
def test_with_a_fast_link_nearly_nothing_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with one that copies nothing in time, what is moved is let be."""
    monkeypatch.setattr(hosted_activations, "SMALLEST_BYTES", 2**12)
    monkeypatch.setattr(hosted_activations, "PATIENCE", 2)
    write_tiny_model(tmp_path / "model")

    def plan(offload: str | bool, link: float) -> MemoryPlan:
        memory = {"budget": "884.75MiB", "offload_activations": offload, "link_gb_s": link}
        config = make_config(tmp_path / "model", memory=memory, train={"batch_size_per_gpu": 2})
        return memory_plan(planned(config), setting(config, 1, Bucket(512, 512)), tmp_path / f"plans-{link}")

    again, fast, slow = plan(False, 10_000), plan("some", 10_000), plan("some", 1e-6)
    assert again.chosen and fast.chosen and slow.chosen and again.chosen.again_share > 0.15
    assert fast.chosen.again_share < 0.01 and fast.chosen.fits and len(fast.moved) == fast.chosen.moved > 40
    assert not {*fast.moved} & {*fast.recompute}
    assert slow.recompute == again.recompute and not slow.moved


@pytest.mark.slow
def test_of_sdxl_some_move_in_place_of_recomputing_others(sdxl: Path, tmp_path: Path) -> None:
    """As docs/performance.md says of `configs/4x3090.yaml`."""
    config = make_config(
        sdxl,
        memory={"budget": "23GiB", "offload_activations": "some", "strategy": "zero2"},
        trainable=BOTH_ENCODERS,
        captions={"max_tokens": 225},
        train={"batch_size_per_gpu": 4},
    )
    plan = memory_plan(planned(config), setting(config, 4, SQUARE), tmp_path)
    assert plan.chosen and plan.chosen.needed <= 23 * GIB and plan.chosen.moved
    without = [rung for rung in plan.looked_at if rung.fits and not rung.moved]
    assert plan.chosen.extra_s < min(rung.extra_s for rung in without)
    assert plan.chosen.again_share < min(rung.again_share for rung in without)
