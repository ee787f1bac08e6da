"""Real runs with new tokens: alone, beside all else and beside an adapter; and what diffusers makes of their files."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tests.adapters.adapter_config_of import adapted
from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, watched_run
from tests.train.test_averages import assert_same_checkpoints
from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.cli.main import main
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.train.build import load_denoiser
from trainer.train.caption_rules import caption_tokenizer
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e
TOKENS: list[dict[str, Any]] = [{"token": "<my-cat>", "vectors": 3, "initial": "the cat"}, {"token": "sks"}]
SCRIPT = Path(__file__).parents[1] / "adapters" / "shared_adapter_script.py"
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"trainable": {"unet": {"train": False}}},
    "with all": {"trainable": {"text_encoder_1": {"train": True}, "text_encoder_2": {"train": True, "lr": 1e-4}}},
    "with an adapter": {"adapter": {"kind": "lora", "rank": 2}},
}


def config_of(model: Path, prepared: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    own = {"captions": {"prefix": "<my-cat> by sks"}, "new_tokens": {"tokens": TOKENS}}
    return adapted(model, prepared, run_dir, sections.pop("adapter", {}), **own, **sections)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("tokens") / "prepared", {Bucket(64, 64): 8})


@pytest.mark.parametrize("way", WAYS)
def test_an_interruption_changes_no_bit_and_the_vocabulary_stays(
    model_folder: Path, prepared: Path, tmp_path: Path, way: str
) -> None:
    seen: list[StepParts] = []
    more = WAYS[way] | {"ema": {"averages": [{"name": "ema", "decay": 0.9}]}}
    straight = config_of(model_folder, prepared, tmp_path / "straight", **more)
    interrupted = config_of(model_folder, prepared, tmp_path / "interrupted", **more)
    watched_run(straight, before_parts=lambda _, parts: seen.append(parts))
    watched_run(interrupted, stop_after=3)
    watched_run(interrupted)
    place = checkpoint_dir(straight.run.dir, 6)
    assert_same_checkpoints(place, checkpoint_dir(interrupted.run.dir, 6))
    trained = {"alone": set(), "with all": {"unet", "text_encoder", "text_encoder_2"}, "with an adapter": {"adapter"}}
    weights = {"new_tokens", *trained[way]}
    folders = {*weights, *(f"{name}_ema" for name in weights), "training_state", "manifest.json"}
    assert {path.name for path in place.iterdir()} == folders
    assert json.loads((place / "new_tokens" / "words.json").read_text()) == {"words": [["<my-cat>", 3], ["sks", 1]]}
    stored = load_file(place / "new_tokens" / "new_tokens.safetensors")
    assert {name: len(tensor) for name, tensor in stored.items()} == {"clip_l": 4, "clip_g": 4}
    assert torch.equal(stored["clip_l"], seen[-1].strategy.parameters["new_tokens.clip_l"])
    groups = {group["name"]: (group["peak_lr"], group["weight_decay"]) for group in seen[-1].optimizer.param_groups}
    assert groups["new_tokens"] == (1e-3, 0.0)
    if way != "with all":
        encoders, model = load_text_encoders(model_of(straight), torch.float32, "cpu"), seen[-1].denoiser.model
        assert model.text_encoders is not None
        for now, before in ((model.text_encoders.one, encoders.one), (model.text_encoders.two, encoders.two)):
            for name, tensor in before.state_dict().items():
                assert torch.equal(now.state_dict()[name], tensor), name
    denoiser = load_denoiser(straight, model_of(straight), place, "live", PreparedSet.open(prepared), ALONE.device)
    for name, tensor in denoiser.model.named_parameters():
        assert torch.equal(tensor, dict(seen[-1].denoiser.model.named_parameters())[name]), name


def test_alone_in_bf16_the_model_is_held_in_bf16(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    seen: list[StepParts] = []
    config = config_of(model_folder, prepared, tmp_path / "run", **WAYS["alone"], train={"precision": "bf16"})
    watched_run(config, stop_after=1, before_parts=lambda _, parts: seen.append(parts))
    by_name = {name: parameter.dtype for name, parameter in seen[-1].denoiser.model.named_parameters()}
    trained = {name for name in by_name if name.startswith("new_tokens.")}
    assert {by_name[name] for name in trained} == {torch.float32} and trained == {*seen[-1].strategy.parameters}
    assert {by_name[name] for name in by_name.keys() - trained} == {torch.bfloat16}


def test_other_words_do_not_go_on(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    watched_run(config_of(model_folder, prepared, tmp_path / "run", **WAYS["alone"]), stop_after=1)
    changed = json.loads(config_of(model_folder, prepared, tmp_path / "run", **WAYS["alone"]).model_dump_json())
    changed["new_tokens"]["tokens"][0]["vectors"] = 2
    said = r"^new_tokens.tokens = <my-cat> \(2\), sks \(1\): .* was trained with <my-cat> \(3\), sks \(1\); give those"
    with pytest.raises(UserError, match=said):
        watched_run(Config.model_validate(changed))


@pytest.mark.parametrize(("way", "strategy"), [("with all", "zero2"), ("alone", "ddp")])
def test_three_workers_take_the_steps_of_one(
    model_folder: Path, prepared: Path, tmp_path: Path, way: str, strategy: str
) -> None:
    ends = []
    for world in (1, 3):
        train = {"steps": 4, "batch_size_per_gpu": 6 // world}
        memory = {"strategy": strategy if world > 1 else "auto"}
        more = WAYS[way] | {"train": train, "memory": memory, "optimizer": {"lr": 1e-4, "eps": 1e-4}}
        config = config_of(model_folder, prepared, tmp_path / str(world) / "run", **more)
        (tmp_path / str(world)).mkdir()
        file = tmp_path / str(world) / "run.yaml"
        file.write_text(to_yaml(config))
        run_group([[sys.executable, str(SCRIPT), str(file)]] * world, worker_environments(world), tmp_path / str(world))
        ends.append(checkpoint_dir(config.run.dir, 4))
    one, three = (load_file(place / "new_tokens" / "new_tokens.safetensors") for place in ends)
    assert one.keys() == three.keys()
    assert max(float((one[name] - three[name]).abs().max()) for name in one) < 1e-6


def exported(config: Config, out: Path, *arguments: str) -> None:
    (config.run.dir / "config.resolved.yaml").write_text(to_yaml(config))
    assert main(["export", str(config.run.dir), "-o", str(out), "--overwrite", *arguments]) == 0


def test_diffusers_reads_the_files_and_conditions_as_the_run_did(
    model_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(model_folder, prepared, tmp_path / "run", **WAYS["alone"])
    watched_run(config)
    exported(config, tmp_path / "tokens.safetensors")
    folder = tmp_path / "tokens-embeddings"
    assert f"wrote {folder}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"my-cat.safetensors", "sks.safetensors"}
    assert not (tmp_path / "tokens.safetensors").exists()
    encoders = load_text_encoders(model_of(config), torch.float32, "cpu")
    pipeline = StableDiffusionXLPipeline(
        vae=load_vae(model_of(config), torch.float32, "cpu"),
        text_encoder=encoders.one,
        text_encoder_2=encoders.two,
        tokenizer=CLIPTokenizer.from_pretrained(model_folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(model_folder / "tokenizer_2"),
        unet=load_unet(model_of(config), torch.float32, "cpu"),
        scheduler=None,  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )
    for file, token in (("my-cat", "<my-cat>"), ("sks", "sks")):
        tensors = load_file(folder / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        for name, encoder, tokenizer in (
            ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
            ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
        ):
            pipeline.load_textual_inversion(tensors[name], token=token, text_encoder=encoder, tokenizer=tokenizer)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        getattr(encoder, "text_model", encoder).eos_token_id = 517  # where texts end, and not their largest id
    place = checkpoint_dir(config.run.dir, 6)
    denoiser = load_denoiser(config, model_of(config), place, "live", PreparedSet.open(prepared), ALONE.device)
    text = "a photo of <my-cat> by sks, the end"
    assert denoiser.text_encoders is not None
    with torch.no_grad():
        theirs = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        ours = denoiser.text_encoders.encode(torch.from_numpy(caption_tokenizer(config, model_of(config))([text])))
    torch.testing.assert_close(ours.hidden, theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, theirs[2], rtol=0, atol=1e-5)
    with safe_open(folder / "my-cat.safetensors", "pt") as opened:
        told = opened.metadata()
    assert told["modelspec.trigger_phrase"] == "my-cat" and told["sdxl_train.token"] == "<my-cat>"
    assert told["modelspec.architecture"].endswith("/textual-inversion")
    assert main(["inspect", str(folder / "my-cat.safetensors")]) == 0
    assert "a textual inversion for SDXL (3 tokens)" in capsys.readouterr().out


def test_files_beside_a_model_or_an_adapter_and_of_a_single_word(
    model_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = {"checkpoint": {"export": {"when": "end", "dtype": "fp32"}}}
    for way in ("with all", "with an adapter"):
        config = config_of(model_folder, prepared, tmp_path / way, **WAYS[way], **export, train={"steps": 1})
        watched_run(config)
        exports = config.run.dir / "exports"
        assert (exports / f"{way}-step-00000001.safetensors").is_file()
        written = {path.name for path in (exports / f"{way}-step-00000001-embeddings").iterdir()}
        assert written == {"my-cat.safetensors", "sks.safetensors"}
    one = {"new_tokens": {"tokens": TOKENS[:1]}, "train": {"steps": 2}, "ema": {"averages": [{"decay": 0.5}]}}
    config = adapted(
        model_folder, prepared, tmp_path / "one", {}, captions={"prefix": "<my-cat>"}, **WAYS["alone"], **one
    )
    watched_run(config)
    for weights in ("live", "ema"):
        exported(config, tmp_path / f"{weights}.safetensors", "--weights", weights)
        suffix = "" if weights == "live" else "_ema"
        stored = load_file(checkpoint_dir(config.run.dir, 2) / f"new_tokens{suffix}" / "new_tokens.safetensors")
        found = load_file(tmp_path / f"{weights}.safetensors")
        assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in found)
    capsys.readouterr()
    assert main(["export", str(config.run.dir), "-o", str(tmp_path / "folder"), "--layout", "diffusers"]) == 2
    assert "holds new tokens alone; each word is written as one file" in capsys.readouterr().err
