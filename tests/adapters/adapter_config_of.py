"""Configurations of small runs with an adapter."""

import json
from pathlib import Path
from typing import Any

from tests.train.real_run import run_config
from trainer.config.schema import Config

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 2.0},
    "locon": {"kind": "locon", "rank": 4, "conv_rank": 3, "rank_stabilized": True},
    "loha": {"kind": "loha", "rank": 3, "alpha": 1.5, "conv_rank": 2},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "conv_rank": 2},
    "dora": {"kind": "dora", "rank": 4, "conv_rank": 2},
    "oft": {"kind": "oft", "rank": 8},
}


def adapted(model: Path, prepared: Path, run_dir: Path, adapter: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """A run of 6 steps, or as `sections` say."""
    fields = json.loads(run_config(model, prepared, run_dir, steps=6).model_dump_json(exclude_unset=True))
    for section, values in {"optimizer": {"lr": 0.01}, "adapter": adapter, **sections}.items():
        fields[section] = fields.get(section, {}) | values
    return Config.model_validate(fields)
