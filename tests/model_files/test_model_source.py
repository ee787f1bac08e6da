"""The kinds of models that can be given, against diffusers' own reading of single files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model_files.single_files import component_tensors, rewrite, single_file_tensors, write_single_file
from trainer.errors import UserError
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.model.text import load_tokenizers
from trainer.model_files.diffusers_folder import read_config
from trainer.model_files.examine.check import check_model
from trainer.model_files.hub import needed_files
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE, POSITION_IDS, TEXT_PROJECTION, VAE_PREFIX
from trainer.model_files.model_source import (
    component_config,
    count_weights,
    find_source,
    open_component,
    weights_fingerprint,
)
from trainer.model_files.presets import preset
from trainer.model_files.run_model import open_model

F32 = torch.float32


@pytest.fixture(scope="module")
def single_file(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(model_folder, tmp_path_factory.mktemp("single") / "small.safetensors")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Path:
    return model_folder


def states(model: Path, **options: str) -> dict[str, Tensor]:
    encoders = load_text_encoders(open_model(model, **options), F32, "cpu")  # type: ignore[arg-type]
    modules = {
        "unet": load_unet(open_model(model), F32, "cpu"),
        "vae": load_vae(open_model(model), F32, "cpu"),
        "text_encoder": encoders.one,
        "text_encoder_2": encoders.two,
    }
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def line_of(model: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        check_model(model, **options)  # type: ignore[arg-type]
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_a_single_file_gives_the_folders_weights(model_folder: Path, single_file: Path) -> None:
    check_model(single_file, tokenizer=model_folder)
    assert_equal(states(single_file), states(model_folder))
    folder, file = find_source(model_folder), find_source(single_file)
    assert (folder.kind, file.kind) == ("folder", "file")
    for name in COMPONENTS:
        assert component_config(file, name) == read_config(model_folder / name)
        assert count_weights(file, name) == count_weights(folder, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_constants", [True, False])
def test_values_survive_in_every_dtype(model_folder: Path, tmp_path: Path, dtype: torch.dtype, with_constants: bool):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if with_constants else {k: v for k, v in tensors.items() if k not in (POSITION_IDS, LOGIT_SCALE)}

    file = write_single_file(model_folder, tmp_path / "half.safetensors", dtype, change)
    check_model(file, tokenizer=model_folder)
    for name in COMPONENTS:
        for key, tensor in component_tensors(find_source(file), name).items():
            assert tensor.dtype == dtype, key
    # Single file, loaded, written as a folder, and as a single file again: the same bits.
    folder = tmp_path / "folder"
    shutil.copytree(model_folder, folder)
    for name in COMPONENTS:
        (weights,) = (folder / name).glob("*.safetensors")
        tensors = {key: tensor.contiguous() for key, tensor in component_tensors(find_source(file), name).items()}
        save_file(tensors, weights)
    again, before = single_file_tensors(folder, dtype), load_file(file)
    assert_equal(before, {name: again[name] for name in before})
    assert len(again) - len(before) == (0 if with_constants else 2)


def test_outputs_are_those_of_diffusers_from_single_file(model_folder: Path, single_file: Path, tmp_path: Path) -> None:
    configs = Path(shutil.copytree(model_folder, tmp_path / "configs", ignore=lambda *_: ["*.safetensors"]))
    (configs / "model_index.json").write_text(json.dumps(preset("model_index")))
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(single_file), config=str(configs), local_files_only=True, torch_dtype=F32, add_watermarker=False
    )
    encoders, unet = (
        load_text_encoders(open_model(single_file), F32, "cpu"),
        load_unet(open_model(single_file), F32, "cpu"),
    )
    vae = load_vae(open_model(single_file), F32, "cpu")
    ids = torch.from_numpy(load_tokenizers(open_model(single_file, tokenizer=model_folder).tokenizers)(["the cat"]))
    with torch.no_grad():
        text = encoders.encode(ids)
        hidden, _, pooled, _ = pipeline.encode_prompt("the cat", do_classifier_free_guidance=False)
        torch.testing.assert_close(text.hidden, hidden, atol=1e-6, rtol=0)
        torch.testing.assert_close(text.pooled, pooled, atol=1e-6, rtol=0)
        sample, sizes = torch.randn(1, 4, 16, 16), torch.tensor([[128.0, 128, 0, 0, 128, 128]])
        inputs = {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        ours, theirs = (net(sample, 500, **inputs).sample for net in (unet, pipeline.unet))
        # The last bits hang on how the weights are aligned in memory; the weights themselves are equal.
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        images = vae.decode(sample).sample, pipeline.vae.decode(sample).sample
        torch.testing.assert_close(*images, atol=1e-5, rtol=0)
    for module, other in ((unet, pipeline.unet), (vae, pipeline.vae), (encoders.two, pipeline.text_encoder_2)):
        assert_equal(module.state_dict(), other.state_dict())


@pytest.mark.e2e
def test_every_form_of_the_text_projection(single_file: Path, model_folder: Path, tmp_path: Path) -> None:
    right = states(model_folder)["text_encoder_2.text_projection.weight"]
    assert not torch.equal(right, right.T)

    def renamed(ending: str) -> Path:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            matrix = tensors.pop(TEXT_PROJECTION)
            return {**tensors, TEXT_PROJECTION + ending: matrix.T.contiguous()}

        return rewrite(single_file, tmp_path / f"linear{ending}.safetensors", change)

    def loaded(file: Path, **options: str) -> Tensor:
        return states(file, **options)["text_encoder_2.text_projection.weight"]

    assert torch.equal(loaded(single_file), right)
    assert torch.equal(loaded(single_file, text_projection="kohya"), right.T)
    check_model(single_file, tokenizer=model_folder, text_projection="kohya")
    told = rewrite(single_file, tmp_path / "told.safetensors", dict, {"sdxl_train.text_projection": "kohya"})
    assert line_of(told, tokenizer=model_folder).endswith("write `model.text_projection: kohya`")
    check_model(told, tokenizer=model_folder, text_projection="kohya")
    for ending in (".weight", ".weight.weight"):
        file = renamed(ending)
        check_model(file, tokenizer=model_folder)
        assert torch.equal(loaded(file), right)
        line = line_of(file, tokenizer=model_folder, text_projection="kohya")
        assert line.startswith(f"model.text_projection = kohya: has no effect on {file}")
    assert "has no effect on a folder" in line_of(model_folder, text_projection="kohya")


def test_a_vae_of_ones_own_in_one_file(single_file: Path, model_folder: Path, tmp_path: Path) -> None:
    expected = AutoencoderKL.from_pretrained(model_folder / "vae").state_dict()
    whole = {n: t for n, t in load_file(single_file).items() if n.startswith(VAE_PREFIX)}
    bare = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in whole.items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old_names = dict(expected)
    for new_name, old_name in old.items():
        old_names = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in old_names.items()}
    metadata = {"sdxl_train.configs": json.dumps({"vae": read_config(model_folder / "vae")})}
    for number, tensors in enumerate((whole, bare, expected, old_names)):
        file = tmp_path / f"vae{number}.safetensors"
        save_file(tensors, file, metadata=metadata)
        check_model(model_folder, file)
        vae = load_vae(open_model(model_folder, file), F32, "cpu")
        assert_equal(vae.state_dict(), expected)
    # A model without a VAE wants one.
    without = rewrite(
        single_file, tmp_path / "bare.safetensors", lambda ts: {n: t for n, t in ts.items() if n not in whole}
    )
    assert line_of(without, tokenizer=model_folder).endswith("without its VAE; give one by model.vae")
    check_model(without, tmp_path / "vae0.safetensors", model_folder)
    assert_equal(load_vae(open_model(without, tmp_path / "vae1.safetensors"), F32, "cpu").state_dict(), expected)
    assert "is the UNet alone" in line_of(without, vae=_unet_file(single_file, tmp_path), tokenizer=model_folder)
    del bare["decoder.conv_in.bias"]
    save_file(bare, tmp_path / "cut.safetensors", metadata=metadata)
    assert "lacks 1 of the vae's" in line_of(model_folder, vae=tmp_path / "cut.safetensors")


def _unet_file(single_file: Path, folder: Path) -> Path:
    return rewrite(
        single_file,
        folder / "unet.safetensors",
        lambda ts: {n: t for n, t in ts.items() if n.startswith("model.diffusion_model.")},
    )


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.file,))


@pytest.mark.e2e
def test_pickled_checkpoints(single_file: Path, model_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(single_file)
    checkpoint, victim = tmp_path / "small.ckpt", tmp_path / "victim"
    configured = {name: read_config(model_folder / name) for name in COMPONENTS}
    torch.save({"state_dict": tensors, "global_step": 7}, checkpoint)
    # A pickle has no metadata, so that only SDXL's own size can be told from it.
    assert "of another size (first width 16 instead of 320)" in line_of(checkpoint, tokenizer=model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.model_files.components.preset", configured.__getitem__)
        check_model(checkpoint, tokenizer=model_folder)
        assert find_source(checkpoint).kind == "pickle"
        assert_equal(states(checkpoint), states(model_folder))
        assert count_weights(find_source(checkpoint), "unet") == count_weights(find_source(model_folder), "unet")
        assert weights_fingerprint(find_source(checkpoint), "vae")
    torch.save({"state_dict": tensors, "callback": Hostile(victim)}, checkpoint)
    assert "holds more than tensors" in line_of(checkpoint)
    torch.save(tensors, checkpoint, _use_new_zipfile_serialization=False)
    assert "is a pickle of torch's old format, which is not read; convert it to safetensors" in line_of(checkpoint)
    torch.save(Hostile(victim), checkpoint, _use_new_zipfile_serialization=False)
    assert line_of(checkpoint).startswith(str(checkpoint))
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, checkpoint)
    assert "of no model known here" in line_of(checkpoint)
    torch.save([1, 2], checkpoint)
    assert "is a pickle of a list, not of named tensors" in line_of(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    assert "cannot be read as a checkpoint" in line_of(checkpoint) or "zip archive" in line_of(checkpoint)
    assert not victim.exists()


def test_wrong_files_are_refused_in_one_line(single_file: Path, model_folder: Path, tmp_path: Path) -> None:
    def refused(words: str, change=lambda ts: ts, metadata: dict[str, str] | None = None) -> None:
        file = rewrite(single_file, tmp_path / "wrong.safetensors", change, metadata)
        line = line_of(file, tokenizer=model_folder)
        assert line.startswith(f"model.path: {file}") and words in line, line

    unet = "model.diffusion_model."
    refused("lacks 1 of the unet's", lambda ts: {n: t for n, t in ts.items() if n != f"{unet}out.2.bias"})
    refused("holds 1 tensors that SDXL's UNet has not", lambda ts: {**ts, f"{unet}adapter.weight": torch.zeros(1)})
    for told in ("{", "[1]", '{"unet": {"a": 1}}', '{"unet": 1}', '{"vae": {"block_out_channels": 3}}'):
        refused("the configurations in its metadata cannot be used", metadata={"sdxl_train.configs": told})
        with pytest.raises(UserError, match="metadata cannot be used"):
            [open_component(find_source(tmp_path / "wrong.safetensors"), component) for component in ("unet", "vae")]
    out = "model.diffusion_model.out.2.weight"
    refused(f"{out} as I8; wanted fp32", lambda ts: ts | {out: ts[out].to(torch.int8)})
    refused("without its second text encoder", lambda ts: {n: t for n, t in ts.items() if "embedders.1" not in n})
    refused("of another size (first width 16 instead of 320)", metadata={"sdxl_train.configs": "{}"})
    whole = single_file.read_bytes()
    for content, words in [
        (whole[:-100], "is a safetensors file cut short"),
        (b"<!DOCTYPE html><title>Sign in</title>", 'is an HTML page ("Sign in") saved under a model\'s name'),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-lfs pointer"),
    ]:
        (tmp_path / "wrong.safetensors").write_bytes(content)
        assert words in line_of(tmp_path / "wrong.safetensors")


def test_weights_that_do_not_fit(single_file: Path, tmp_path: Path) -> None:
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    for shape, words in [((71,), "wanted 3 equal parts"), ((69,), "asks for [24]")]:
        file = rewrite(single_file, tmp_path / "odd.safetensors", lambda ts, s=shape: {**ts, name: torch.zeros(s)})
        with pytest.raises(UserError) as caught:
            load_text_encoders(open_model(file), F32, "cpu")
        assert words in caught.value.lines[0]


def test_fingerprints_heed_weights_and_configuration_alone(single_file: Path, tmp_path: Path) -> None:
    def fingerprint(file: Path, component: str = "vae", **options: str) -> str:
        return weights_fingerprint(find_source(file), component, **options)  # type: ignore[arg-type]

    original = fingerprint(single_file)
    assert len(original) == 32
    moved = rewrite(single_file, tmp_path / "moved.safetensors", lambda ts: {**ts, "model.x": torch.zeros(1)})
    assert fingerprint(moved) == original
    name = VAE_PREFIX + "decoder.conv_in.bias"
    changed = rewrite(single_file, tmp_path / "changed.safetensors", lambda ts: {**ts, name: ts[name] + 1})
    assert fingerprint(changed) != original
    assert fingerprint(changed, "text_encoder_2") == fingerprint(single_file, "text_encoder_2")
    assert fingerprint(single_file, "text_encoder_2", text_projection="kohya") != fingerprint(
        single_file, "text_encoder_2"
    )


def test_tokenizers(single_file: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["the cat", "cat! the", ""]
    expected = load_tokenizers(open_model(model_folder).tokenizers)(captions)
    assert (load_tokenizers(open_model(single_file, tokenizer=model_folder).tokenizers)(captions) == expected).all()
    # One folder is enough: the second tokenizer is the first with another padding.
    one = tmp_path / "clip"
    shutil.copytree(model_folder / "tokenizer", one)
    assert (load_tokenizers(open_model(single_file, tokenizer=one).tokenizers)(captions) == expected).all()
    (one / "tokenizer_config.json").unlink()
    assert (load_tokenizers(open_model(single_file, tokenizer=one).tokenizers)(captions) == expected).all()
    # The hub's cache, as the hub's client lays it out.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "run `hf download openai/clip-vit-large-patch14 vocab.json" in line_of(single_file)
    _cache(tmp_path / "cache", "openai/clip-vit-large-patch14", one)
    assert (load_tokenizers(open_model(single_file).tokenizers)(captions) == expected).all()
    assert isinstance(expected, np.ndarray)
    (one / "vocab.json").unlink()
    assert line_of(single_file, tokenizer=one).startswith(f"model.tokenizer = {one}: holds no tokenizer")


def _cache(root: Path, hub_id: str, files: Path) -> None:
    folder = root / ("models--" + hub_id.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, folder / "snapshots" / ("0" * 40))


def test_a_model_in_the_hubs_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_model("someone/small-xl")
    (line,) = caught.value.lines
    assert line.startswith(
        "model.path = someone/small-xl: no such file or folder here, and as a hub id it is not in the"
    )
    assert "HF_HUB_OFFLINE" in line
    with pytest.raises(UserError, match="not in the hub's cache"):
        find_source("someone/small-xl")
    _cache(tmp_path, "someone/small-xl", model_folder)
    check_model("someone/small-xl")
    assert find_source("someone/small-xl").kind == "folder"
    ours, theirs = (load_tokenizers(open_model(model).tokenizers) for model in ("someone/small-xl", model_folder))
    assert (ours(["the cat"]) == theirs(["the cat"])).all()
    next(tmp_path.rglob("text_encoder/model.safetensors")).unlink()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):  # what is not whole is loaded again
        check_model("someone/small-xl")


def test_only_the_needed_files_are_downloaded() -> None:
    needed = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer_2/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    others = [
        "sd_xl_base_1.0.safetensors",
        "text_encoder/model.onnx",
        "text_encoder/pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "vae_decoder/config.json",
        "README.md",
    ]
    assert sorted(needed_files([*others, *needed])) == sorted(needed)
