"""The section `ema`: running averages of the weights that train; documented as those of `schema.py` are."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from trainer.config.values import Count, Flag, PositiveInt, Section

LIVE = "live"
"""What the weights that train are called where averages go by name."""
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")  # part of a folder's name: `unet_ema`, beside `text_encoder_2`


def _name(value: object) -> object:
    if isinstance(value, str) and value != LIVE and _NAME.fullmatch(value):
        return value
    rule = "must be a small letter and up to 30 small letters, digits, `-` and `_`, and not `live`"
    raise PydanticCustomError("rule", rule)


class AverageConfig(Section):
    name: Annotated[str, BeforeValidator(_name, json_schema_input_type=str)] = "ema"
    """What it is called, by `ema.score`, `checkpoint.export.weights` and the commands' `--weights`."""
    kind: Literal["plain", "power"] = "plain"
    """`plain`: average = decay x average + (1 - decay) x weights, at each step. `power`: its length is a fixed share of
    the run so far, and lengths can still be chosen after the run, by `sdxl-train ema` (Karras et al. 2024)."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Of `kind: plain`: the share that is kept at each step; 0.9999 looks back over some 10,000 steps."""
    warm_up: Flag = True
    """Of `kind: plain`: the decay of step n is at most n / (9 + n), so that the first weights are soon forgotten.
    Otherwise the average begins as the weights that the run starts from, and keeps decay^n of them."""
    length: Annotated[float, Field(gt=0, lt=0.288)] = 0.10
    """Of `kind: power`: standard deviation of the profile as a share of the run so far (Karras' sigma_rel); 0.05 to
    0.10 is usual."""

    def told(self) -> str:
        """In a few words."""
        profile = f"decay {self.decay:g}" if self.kind == "plain" else f"length {self.length:g}"
        return f"{self.name} ({self.kind}, {profile})"


class SnapshotsConfig(Section):
    every_steps: Count = 0
    """Optimizer steps between snapshots of all power averages, in `ema` in `run.dir`; 0 for never. Some 10 to 30 over a
    run are enough; without any, `sdxl-train ema` has the checkpoints' alone."""
    keep: PositiveInt | None = None
    """How many of the newest snapshots are kept. Default: all."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the snapshots. fp16 takes half the disk, and its rounding (2e-4 of a weight) can exceed what a
    fine-tune changes."""


class EmaConfig(Section):
    averages: list[AverageConfig] = []
    """Averages to keep, such as `averages: [{kind: plain}]`. Each holds an fp32 copy of what trains."""
    place: Literal["device", "host"] = "device"
    """Where they are held: beside the weights, spread over the workers as those are, or in the host's memory."""
    update_every: PositiveInt = 1
    """Optimizer steps between updates; weights count for all steps since the last one, so that lengths stay."""
    score: Annotated[list[str], Field(min_length=1)] = [LIVE]
    """What validation and samples of the run look at, one after the other: `live` for the weights that train, or
    averages by name, such as `[live, ema]`."""
    snapshots: SnapshotsConfig = SnapshotsConfig()
    """What is kept of power averages on the way, so that one of any length can be computed afterwards."""

    def told(self) -> str:
        """Which averages are kept, and where, in one line."""
        place = "in the host's memory" if self.place == "host" else "beside the weights"
        return f"averages: {', '.join(average.told() for average in self.averages)}, {place}"
