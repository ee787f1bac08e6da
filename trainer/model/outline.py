"""SDXL 1.0 as a folder without weights: its published configurations, and headers of files whose data are holes."""

import json
from pathlib import Path

import torch

from trainer.model.load_weights import empty_text_encoders, empty_unet
from trainer.model_files.presets import preset
from trainer.model_files.run_model import RunModel, open_model
from trainer.model_files.tensor_file import TensorSpec, header_of

_WEIGHTS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}


def published_outline(folder: Path) -> RunModel:
    """Write it into an empty folder (some 300 KB on the disk, 6.8 GB by the files' sizes), and open it.

    Enough for whatever asks for configurations, names and shapes, as a plan does.
    """
    for name in (*_WEIGHTS, "vae"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(preset(name)))
    model = open_model(folder)
    encoders = empty_text_encoders(model)
    parts = {"unet": empty_unet(model), "text_encoder": encoders.one, "text_encoder_2": encoders.two}
    for name, part in parts.items():
        specs = [TensorSpec(key, torch.float16, tuple(p.shape)) for key, p in part.named_parameters()]
        header = header_of(specs, {})
        with (folder / name / f"{_WEIGHTS[name]}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.num_bytes for spec in specs))
    return open_model(folder)
