"""A model of SDXL's architecture with random weights as one single file; of full size, or narrower to save space.

    python benchmarks/random_model.py --out random.safetensors [--gb 1.5] [--dtype bf16]

Without `--gb` it has SDXL's own size: 3.47 billion weights, 6.9 GB in bf16. Memory stays below 1 GB.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.model_files.components import CONFIGS_KEY
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE, POSITION_IDS, single_file_keys
from trainer.model_files.presets import preset
from trainer.model_files.single_file import logit_scale, position_ids, to_file
from trainer.model_files.tensor_file import TensorSpec, aligned, write_tensor_file

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FULL_WEIGHTS = 3_468_000_000  # about; the scale need not be exact
HEAD_WIDTH = 64


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gb", type=float, help="size of the file, about; default: SDXL's own")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    write_random_model(arguments.out, arguments.gb, DTYPES[arguments.dtype])


def write_random_model(path: Path, gb: float | None, dtype: torch.dtype) -> None:
    """Write a single file of about `gb` * 10^9 bytes, or of SDXL's own size; its weights have the scale of a fresh
    model's, so that a training step stays finite."""
    scale = 1.0 if gb is None else math.sqrt(gb * 1e9 / dtype.itemsize / FULL_WEIGHTS)
    configs = {name: preset(name) for name in COMPONENTS} if gb is None else narrowed(scale)
    states = {name: module.state_dict() for name, module in empty_modules(configs).items()}
    keys = {key.file_name: key for key in single_file_keys(configs)}
    specs = []
    for name, key in keys.items():
        like = to_file(key, [states[key.component][own] for own in key.names])
        specs.append(TensorSpec(name, dtype, tuple(like.shape)))
    constants = {POSITION_IDS: position_ids(), LOGIT_SCALE: logit_scale(dtype)}
    specs += [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in constants.items()]
    specs = aligned(specs)

    def tensors() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for spec in specs:
            yield constants[spec.name] if spec.name in constants else random_tensor(spec, generator)

    metadata = {} if gb is None else {CONFIGS_KEY: json.dumps(configs)}
    with tqdm(desc=str(path), total=sum(s.num_bytes for s in specs), unit="B", unit_scale=True, disable=None) as bar:
        write_tensor_file(path, specs, tensors(), metadata, on_written=bar.update)


def random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Norms are the identity, biases zero, matrices of variance 1 / inputs."""
    if len(spec.shape) < 2:
        return torch.full(spec.shape, 0.0 if spec.name.endswith("bias") else 1.0).to(spec.dtype)
    inputs = math.prod(spec.shape[1:])
    return torch.randn(spec.shape, generator=generator).mul_(inputs**-0.5).to(spec.dtype)


def narrowed(scale: float) -> dict[str, dict[str, Any]]:
    """SDXL's configurations with all widths of UNet and text encoders times `scale`, rounded to whole heads."""
    configs = {name: preset(name) for name in COMPONENTS}
    width = HEAD_WIDTH * max(1, round(scale * 320 / HEAD_WIDTH))
    for name in ("text_encoder", "text_encoder_2"):
        heads = max(1, round(scale * configs[name]["hidden_size"] / HEAD_WIDTH))
        hidden = heads * HEAD_WIDTH
        configs[name] |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
        configs[name]["projection_dim"] = hidden
    one, two = configs["text_encoder"], configs["text_encoder_2"]
    configs["unet"] |= {
        "block_out_channels": [width, 2 * width, 4 * width],
        "attention_head_dim": [n * width // HEAD_WIDTH for n in (1, 2, 4)],
        "cross_attention_dim": one["hidden_size"] + two["hidden_size"],
        "projection_class_embeddings_input_dim": two["projection_dim"] + 6 * 256,
    }
    return configs


def empty_modules(configs: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """The components' modules without memory."""
    with init_empty_weights():
        unet, vae = UNet2DConditionModel.from_config(configs["unet"]), AutoencoderKL.from_config(configs["vae"])
        assert isinstance(unet, nn.Module) and isinstance(vae, nn.Module)
        return {
            "unet": unet,
            "vae": vae,
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder_2"])),
        }


if __name__ == "__main__":
    main()
