"""What others make of an exported adapter: diffusers' own loader, PEFT's, and our formulas on merged weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.adapter_config_of import KINDS, adapted
from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, watched_run
from trainer.adapters.adapter_file import open_adapter, placed_layers
from trainer.adapters.deltas import changed_weight
from trainer.adapters.initial_values import AdapterStart
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.cli.main import main
from trainer.config.load import to_yaml
from trainer.config.schema import Config, TrainableConfig
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.model.adapted import fill_adapted, lay_out_run
from trainer.parallel.sharding import materialize
from trainer.train.build import load_denoiser

pytestmark = pytest.mark.e2e
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("exported") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture(scope="module")
def runs(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """A run of each kind, with its configuration beside it as the command writes it."""
    found = {}
    for kind, settings in KINDS.items():
        settings = settings | {"text_encoders": kind != "oft"}
        checkpoint = {"export": {"when": "end", "dtype": "fp32"}}
        more: dict[str, Any] = {"train": {"steps": 3}, "ema": {"averages": [{"decay": 0.5}]}, "checkpoint": checkpoint}
        config = adapted(model_folder, prepared, tmp_path_factory.mktemp(kind) / "run", settings, **more)
        watched_run(config)
        (config.run.dir / "config.resolved.yaml").write_text(to_yaml(config))
        found[kind] = config
    return found


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    added = {"text_embeds": torch.randn(2, 24, generator=generator), "time_ids": torch.full((2, 6), 64.0)}
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 40, generator=generator),
        "added_cond_kwargs": added,
    }


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    return unet.eval()(**inputs())[0]


def ours(config: Config, prepared: Path) -> Any:
    place = checkpoint_dir(config.run.dir, 3)
    return load_denoiser(config, model_of(config), place, "live", PreparedSet.open(prepared), ALONE.device).model


def base_unet(folder: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def exported(config: Config, out: Path, *more: str) -> Path:
    assert main(["export", str(config.run.dir), "-o", str(out), "--dtype", "fp32", *more]) == 0
    return out


@pytest.mark.parametrize("kind", ["lora", "locon"])
def test_diffusers_reads_the_file_with_its_own_converter(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path, kind: str
) -> None:
    """The UNet's output at strengths 0 and 1, and the text encoders' names."""
    file = exported(runs[kind], tmp_path / "fox.safetensors")
    unet, plain = base_unet(model_folder), output(base_unet(model_folder))
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="fox")
    expected = output(ours(runs[kind], prepared).unet)
    assert (expected - plain).abs().max() > 1e-2
    assert (output(unet) - expected).abs().max() < 1e-5
    unet.set_adapters("fox", 0.0)
    assert (output(unet) - plain).abs().max() < 1e-5
    of_texts = {name.split(".")[0] for name in state if not name.startswith("unet.")}
    assert of_texts == {"text_encoder", "text_encoder_2"}


def test_diffusers_pipeline_gives_the_same_text(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    file = exported(runs["lora"], tmp_path / "fox.safetensors")
    one = CLIPTextModel.from_pretrained(model_folder / "text_encoder")
    two = CLIPTextModelWithProjection.from_pretrained(model_folder / "text_encoder_2")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=base_unet(model_folder).config)
    for encoder, prefix in ((one, "text_encoder"), (two, "text_encoder_2")):
        StableDiffusionXLPipeline.load_lora_into_text_encoder(state, alphas, encoder, prefix=prefix, adapter_name="fox")
    model, ids = ours(runs["lora"], prepared), torch.arange(77).view(1, 77)
    with torch.no_grad():
        for theirs, encoder in ((one, model.text_encoder_1), (two, model.text_encoder_2)):
            found, expected = (e.eval()(ids, output_hidden_states=True).hidden_states[-2] for e in (theirs, encoder))
            assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_folder(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path, kind: str
) -> None:
    folder = exported(runs[kind], tmp_path / "fox", "--layout", "peft")
    parts = {"unet"} if kind == "oft" else {"unet", "text_encoder", "text_encoder_2"}
    assert {path.name for path in folder.iterdir()} == parts
    theirs: Any = PeftModel.from_pretrained(base_unet(model_folder), folder / "unet")  # pyright: ignore[reportArgumentType]
    expected = output(ours(runs[kind], prepared).unet)
    assert (output(theirs) - expected).abs().max() < 1e-5
    assert (expected - output(base_unet(model_folder))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_our_formulas_give_what_the_layers_give(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path, kind: str
) -> None:
    """Of the file as it is exported: merged is unmerged."""
    file = exported(runs[kind], tmp_path / "fox.safetensors")
    unet = base_unet(model_folder)
    weights, configs = dict(unet.named_parameters()), {"unet": dict(unet.config)}
    layers = {p: layer for p, layer in placed(file, model_folder, configs).items() if p.part == "unet"}
    for place, layer in layers.items():
        weight = weights[f"{place.module}.weight"]
        weight.data = changed_weight(layer.kind, layer.read(), layer.scale(), weight.data)
    assert (output(unet) - output(ours(runs[kind], prepared).unet)).abs().max() < 1e-5


def placed(file: Path, model_folder: Path, configs: dict[str, Any]) -> Any:
    import json

    for name in ("text_encoder", "text_encoder_2"):
        configs[name] = json.loads((model_folder / name / "config.json").read_text())
    return placed_layers(open_adapter(file), configs)


def test_names_and_metadata_are_kohyas(runs: dict[str, Config], tmp_path: Path) -> None:
    file = exported(runs["lora"], tmp_path / "fox.safetensors", "--title", "Fox")
    tensors = load_file(file)
    block = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    assert {name for name in tensors if name.startswith(f"{block}.")} == {
        f"{block}.alpha", f"{block}.lora_down.weight", f"{block}.lora_up.weight",
    }  # fmt: skip
    assert tensors[f"{block}.alpha"].item() == 2.0
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    assert "lora_te2_text_model_encoder_layers_3_mlp_fc1.alpha" in tensors
    assert not any("encoder_layers_2" in name for name in tensors if name.startswith("lora_te1_"))  # never used
    with safe_open(file, framework="pt") as stream:
        told = stream.metadata()
    assert told["ss_network_module"] == "networks.lora" and told["ss_network_dim"] == "4"
    assert told["ss_network_alpha"] == "2.0" and told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora" and told["modelspec.title"] == "Fox"


def test_a_run_with_an_adapter_is_no_model(
    runs: dict[str, Config], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(runs["lora"].run.dir)
    assert main(["export", place, "-o", str(tmp_path / "fox"), "--layout", "diffusers"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sdxl-train: --layout diffusers: an adapter is written as one file")
    assert main(["merge", place, place, "--alpha", "0.5", "-o", str(tmp_path / "sum.safetensors")]) == 2
    assert "holds an adapter, and no model; `sdxl-train adapter merge" in capsys.readouterr().err
    assert main(["export", str(model_folder), "-o", str(tmp_path / "fox"), "--layout", "peft"]) == 2
    assert "is no run or checkpoint with an adapter" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_a_file(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path, kind: str
) -> None:
    """With another alpha than the file's, which changes nothing at the start."""
    file = exported(runs[kind], tmp_path / "fox.safetensors")
    settings = KINDS[kind] | {"initial": str(file), "text_encoders": kind != "oft"}
    settings |= {"alpha": 7.0} if kind != "oft" else {}
    config = adapted(model_folder, prepared, tmp_path / "next", settings)
    files = model_of(config)
    model = lay_out_run(files, TrainableConfig(), AdapterStart(config.adapter, 5), torch.float32, torch.float32)
    materialize(model, torch.device("cpu"))
    fill_adapted(files, None, model)
    assert (output(model.unet) - output(ours(runs[kind], prepared).unet)).abs().max() < 1e-5


def test_a_run_starts_from_no_other_file(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    file = exported(runs["lora"], tmp_path / "fox.safetensors")
    for settings, line in (
        ({"rank": 8}, r"holds lora_A.weight \[4, .* set adapter.rank and adapter.conv_rank as the file is"),
        ({"text_encoders": False}, r"is no layer of the model|other kind of model"),
        ({"kind": "loha", "rank": 4}, r"holds lora_.* for which the run's adapter has no place; set adapter.kind"),
        ({"targets": ["mid_block.attentions"]}, r"for which the run's adapter has no place; set adapter.kind"),
    ):
        wish = KINDS["lora"] | {"initial": str(file), "text_encoders": True, **settings}
        with pytest.raises(UserError, match=line):
            watched_run(adapted(model_folder, prepared, tmp_path / "next", wish))


def test_an_average_and_the_export_of_the_runs_end(runs: dict[str, Config], tmp_path: Path) -> None:
    live = load_file(exported(runs["lora"], tmp_path / "live.safetensors"))
    ema = load_file(exported(runs["lora"], tmp_path / "ema.safetensors", "--weights", "ema"))
    assert live.keys() == ema.keys() and any(not torch.equal(live[name], ema[name]) for name in live)
    (own,) = (runs["lora"].run.dir / "exports").iterdir()
    assert own.name == "run-step-00000003.safetensors"
    at_end = load_file(own)
    assert all(torch.equal(at_end[name], live[name]) for name in live)


def test_a_run_merged_is_the_run_unmerged(
    runs: dict[str, Config], model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    """By the command, of the run itself."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "model_index.json").write_text("{}")
    for kind in ("dora", "oft"):
        out = tmp_path / kind
        arguments = [str(base), str(runs[kind].run.dir), "--layout", "diffusers", "--dtype", "fp32", "-o", str(out)]
        assert main(["adapter", "merge", *arguments]) == 0
        assert (output(base_unet(out)) - output(ours(runs[kind], prepared).unet)).abs().max() < 1e-5
