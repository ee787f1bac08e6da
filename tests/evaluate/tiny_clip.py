"""A tiny CLIP model in a folder as transformers writes it: random weights, the tests' tokenizer."""

import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel


def write_tiny_clip(folder: Path, tokenizer: Path) -> Path:
    """Images of 32 pixels, features of 24 numbers; `tokenizer` is a folder with vocab.json and merges.txt."""
    torch.manual_seed(3)
    tokens = {"vocab_size": 518, "max_position_embeddings": 77, "bos_token_id": 516, "eos_token_id": 517}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_factor": 5.0}
    config = CLIPConfig(text_config={**sizes, **tokens}, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder
