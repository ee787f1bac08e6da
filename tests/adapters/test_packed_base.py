"""Real runs with an adapter, or new tokens alone, over a base that is held in 8 or 4 bits."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.adapter_config_of import KINDS, adapted
from tests.adapters.test_shared_adapter import SCRIPT
from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, watched_run
from tests.train.test_averages import assert_same_checkpoints
from tests.train.test_new_token_runs import TOKENS
from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.cli.main import main
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.model.frozen.packed_layers import packed_layers
from trainer.train.build import load_denoiser
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("packed") / "prepared", {Bucket(64, 64): 8})


def held_in(held: str, model: Path, prepared: Path, run_dir: Path, kind: str = "lora", **sections: Any) -> Config:
    """A run of 6 steps, as `sections` say; a `lora` is on the text encoders as well."""
    adapter = KINDS.get(kind, {}) | ({"text_encoders": True} if kind == "lora" else {})
    config = adapted(model, prepared, run_dir, adapter | sections.pop("adapter", {}), **sections)
    fields = json.loads(config.model_dump_json(exclude_unset=True))
    fields["model"]["frozen_weights"] = held
    return Config.model_validate(fields)


@pytest.mark.parametrize(("held", "kind"), [("nf4", "lora"), ("int8", "dora"), ("int8", "locon")])
def test_an_interruption_changes_no_bit_and_the_base_is_the_packed_model(
    model_folder: Path, prepared: Path, tmp_path: Path, held: str, kind: str
) -> None:
    seen: list[StepParts] = []
    more = {"train": {"precision": "bf16"}}
    straight = held_in(held, model_folder, prepared, tmp_path / "straight", kind, **more)
    interrupted = held_in(held, model_folder, prepared, tmp_path / "interrupted", kind, **more)
    watched_run(straight, before_parts=lambda _, parts: seen.append(parts))
    watched_run(interrupted, stop_after=3)
    watched_run(interrupted)
    last = checkpoint_dir(straight.run.dir, 6)
    assert_same_checkpoints(last, checkpoint_dir(interrupted.run.dir, 6))
    model = seen[-1].denoiser.model
    layers = packed_layers(model)
    assert len(layers) > 80 and any("text_encoder_2" in name for name in layers) == (kind == "lora")
    original = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, layer in layers.items():
        if name.startswith("unet."):
            exact = original[name.removeprefix("unet.").replace(".base_layer", "")]
            error = (layer.weight.float() - exact).norm() / exact.norm()
            assert layer.weight.dtype == torch.bfloat16 and float(error) < (0.11 if held == "nf4" else 0.008), name
    denoiser = load_denoiser(straight, model_of(straight), last, "live", PreparedSet.open(prepared), ALONE.device)
    again = packed_layers(denoiser.model)
    assert again.keys() == layers.keys()
    assert all(torch.equal(layers[name].weight, again[name].weight) for name in layers)
    assert len(load_file(last / ADAPTER)) == len(seen[-1].strategy.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_the_bases(
    model_folder: Path, prepared: Path, tmp_path: Path, kind: str, first_losses: dict[str, float]
) -> None:
    """Every kind starts from the packed base as it is."""
    for held in ("int8", "nf4"):
        config = held_in(held, model_folder, prepared, tmp_path / held, kind, adapter={"text_encoders": False})
        assert watched_run(config, stop_after=1).results[0].loss == pytest.approx(first_losses[held], rel=1e-6), held


@pytest.fixture(scope="module")
def first_losses(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The loss of the frozen model on the first batch, with its weights held in each way."""
    folder, found = tmp_path_factory.mktemp("first"), {}
    for held in ("compute", "int8", "nf4"):
        config = held_in(held, model_folder, prepared, folder / held, adapter={"text_encoders": False})
        found[held] = watched_run(config, stop_after=1).results[0].loss
    assert abs(found["int8"] / found["compute"] - 1) < 2e-4 and abs(found["nf4"] / found["compute"] - 1) < 2e-2
    assert len({*found.values()}) == 3
    return found


def test_new_tokens_train_alone_over_a_packed_model(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    seen: list[StepParts] = []
    own = {"captions": {"prefix": "<my-cat> by sks"}, "new_tokens": {"tokens": TOKENS}}
    own |= {"trainable": {"unet": {"train": False}}}
    straight, interrupted = (
        held_in("nf4", model_folder, prepared, tmp_path / name, "", **own) for name in ("straight", "interrupted")
    )
    watched_run(straight, before_parts=lambda _, parts: seen.append(parts))
    watched_run(interrupted, stop_after=3)
    watched_run(interrupted)
    assert_same_checkpoints(checkpoint_dir(straight.run.dir, 6), checkpoint_dir(interrupted.run.dir, 6))
    names = packed_layers(seen[-1].denoiser.model)
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder_1", "text_encoder_2"}
    assert set(seen[-1].strategy.parameters) == {"new_tokens.clip_l", "new_tokens.clip_g"}


def test_a_run_goes_on_in_the_bits_that_it_began_with(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    watched_run(held_in("int8", model_folder, prepared, tmp_path / "run"), stop_after=2)
    for other in ("nf4", "compute"):
        with pytest.raises(UserError, match=rf"^model.frozen_weights = {other}: .* was trained with int8; give that"):
            watched_run(held_in(other, model_folder, prepared, tmp_path / "run"))
    plain = tmp_path / "plain"
    watched_run(held_in("compute", model_folder, prepared, plain), stop_after=2)
    with pytest.raises(UserError, match=r"^model.frozen_weights = nf4: .* was trained with compute"):
        watched_run(held_in("nf4", model_folder, prepared, plain))


def test_what_is_exported_and_merged_knows_nothing_of_it(
    model_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter goes into the model in its own precision."""
    config = held_in("nf4", model_folder, prepared, tmp_path / "run", "lora")
    watched_run(config)
    file, merged = tmp_path / "one.safetensors", tmp_path / "merged.safetensors"
    assert main(["export", str(config.run.dir), "--model", str(model_folder), "-o", str(file)]) == 0
    assert main(["adapter", "merge", str(model_folder), str(file), "-o", str(merged), "--dtype", "fp32"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    stored = load_file(checkpoint_dir(config.run.dir, 6) / ADAPTER)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = (next(t for key, t in stored.items() if name in key and part in key) for part in ("lora_A", "lora_B"))
    base = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    found = load_file(merged)["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    wanted = base + 0.5 * up @ down
    assert float((found - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())  # exported in fp16


def test_two_workers_take_the_steps_of_one(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    found = []
    for world in (1, 2):
        files = []
        for held in ("int8", "nf4"):
            train = {"steps": 3, "batch_size_per_gpu": 4 // world}
            place = tmp_path / str(world) / held
            config = held_in(held, model_folder, prepared, place, train=train, optimizer={"lr": 1e-4})
            place.parent.mkdir(exist_ok=True)
            files.append(place.with_suffix(".yaml"))
            files[-1].write_text(to_yaml(config))
        _run_workers(files, world)
        found.append([load_file(checkpoint_dir(file.with_suffix(""), 3) / ADAPTER) for file in files])
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


def _run_workers(files: list[Path], world: int) -> None:
    run_group([[sys.executable, str(SCRIPT), *map(str, files)]] * world, worker_environments(world), files[0].parent)
