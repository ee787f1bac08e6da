"""SDXL 1.0's configurations as package data: a single file holds weights alone."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

NAMES = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")


def preset(name: str) -> dict[str, Any]:
    """The published configuration of one component; `name` is one of `NAMES`."""
    return json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
