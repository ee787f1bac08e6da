"""A run that is there to draw: the tiny model, and five images of different cost."""

from pathlib import Path
from typing import Any

from tests.train.real_run import run_config
from trainer.config.schema import Config

IMAGES: list[dict[str, Any]] = [
    {"prompt": "a cat", "seed": 1},
    {"prompt": "the hat", "seed": 2, "sampler": "euler_a", "steps": 4},
    {"prompt": "a rat", "seed": 3, "width_px": 96, "negative_prompt": "the cat"},
    {"prompt": "that bat", "seed": 4, "sampler": "dpmpp_2m", "schedule": "karras"},
    {"prompt": "a mat", "sampler": "ddim", "guidance_scale": 1.0},
]


def drawn_config(model: Path, prepared: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    """Images of 64 px in two steps, in fp32; sections are changed by keyword."""
    config = run_config(model, prepared, run_dir, steps=1)
    samples = {"images": IMAGES, "steps": 2, "width_px": 64, "height_px": 64, "seed": 20}
    fields = config.model_dump(mode="json", exclude_unset=True) | {"samples": samples}
    for section, values in sections.items():
        fields[section] = fields.get(section, {}) | values
    return Config.model_validate(fields)
