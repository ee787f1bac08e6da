"""A small SDXL folder as diffusers writes it: random weights, and a tokenizer of single bytes and a few merges."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # while the libraries are imported, which leaves little garbage and a million objects

_NVIDIA_SMI = """#!/bin/sh
case "$1" in
-L)
    echo 'GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-aaaa1111)'
    echo 'GPU 1: NVIDIA GeForce RTX 3060 (UUID: GPU-bbbb2222)'
    echo 'GPU 2: NVIDIA GB10 (UUID: GPU-cccc3333)' ;;
--query-gpu=uuid,memory.total)
    echo 'GPU-aaaa1111, 24576'
    echo 'GPU-bbbb2222, 12288'
    echo 'GPU-cccc3333, [N/A]' ;;
esac
"""


# Begun at the end, one of these would keep one process at work while the others have nothing left.
_LONGEST = (
    "tests/test_end_to_end.py", "tests/notify/", "tests/hosts/", "tests/test_prepare_commands.py",
    "tests/test_host_faults.py", "tests/wire/", "tests/train/test_shared_runs.py", "tests/train/test_grouped_runs.py",
    "tests/adapters/", "tests/train/guard/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


def pytest_collection_finish() -> None:
    """From here on garbage is collected again, without a look at what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def warm_templates(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers that this process starts, as a command does, do not import everything anew."""
    if not any(item.get_closest_marker("e2e") or item.get_closest_marker("slow") for item in request.session.items):
        yield
        return
    from tests.warm_processes import WarmTemplate
    from trainer.cli import keep_running

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_running, "WorkerTemplate", WarmTemplate)
        yield


def _byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in the order of its vocabulary: "!" is id 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _write_tokenizer_files(folder: Path, pad_token: str) -> None:
    merges = ["a t</w>", "c at</w>", "t h", "th e</w>"]
    symbols = _byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings |= {"pad_token": pad_token, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("sdxl")
    _write_tokenizer_files(folder / "tokenizer", "<|endoftext|>")
    _write_tokenizer_files(folder / "tokenizer_2", "!")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    vae.save_pretrained(folder / "vae")
    # eos_token_id 2 is what SDXL's configurations say, though the tokenizer's end token is another.
    tokens = {"vocab_size": 518, "max_position_embeddings": 77, "bos_token_id": 516, "eos_token_id": 2}
    one = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, **tokens)
    two = CLIPTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, projection_dim=24, **tokens
    )
    two.hidden_act = "gelu"
    CLIPTextModel(one).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(two).save_pretrained(folder / "text_encoder_2")
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's tool, and nothing else, in PATH: two cards, and one that does not tell its memory."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(_NVIDIA_SMI, encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tool
