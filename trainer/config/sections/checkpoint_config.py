"""When weights and training state are saved, and published: the section `checkpoint`."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Duration, PathField, PositiveInt, Section, Size


class ExportConfig(Section):
    when: Literal["never", "end", "checkpoints"] = "never"
    """`end`: when the run is done, write the model as one file for A1111, ComfyUI, Forge, InvokeAI and diffusers, as
    `sdxl-train export` does. `checkpoints`: also for each checkpoint of `every_steps` and `keep_every_steps`, while
    training goes on."""
    dir: PathField | None = None
    """Where the files go; default: `exports` in `run.dir`. They are named like `RUN-step-00001000.safetensors`."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the weights."""
    weights: str = "live"
    """`live`: the weights that train, or one of `ema.averages` by its name."""
    keep: PositiveInt | None = None
    """How many of the newest files are kept. Default: all."""
    title: str = ""
    """Title in the file's metadata; default: the file's name."""
    author: str = ""
    """Author in the file's metadata."""
    license: str = ""
    """License in the file's metadata."""


class CheckpointConfig(Section):
    every: Duration = "15min"
    """Time between checkpoints, such as `15min` or `2h`, or `never`. They are written while training goes on; one is
    always written at the end and when interrupted."""
    every_steps: PositiveInt | None = None
    """Also after every so many optimizer steps. Default: by time alone."""
    keep: Annotated[int, Field(ge=2)] = 3
    """How many of the newest checkpoints are kept; at least 2, so that a damaged one has a forerunner."""
    keep_every_steps: PositiveInt | None = None
    """The checkpoints of every so many steps are written too, and are never deleted."""
    fallback_dir: PathField | None = None
    """Where a checkpoint goes if `run.dir` cannot be written to: a folder on another disk. The next start finds it
    there."""
    staging: Size = "auto"
    """What a worker may hold in copies while a checkpoint is written, such as `2GiB`. `auto`: all of its share, but at
    most a quarter of the host's free memory over all workers. With less, a step may wait for the disk."""
    export: ExportConfig = ExportConfig()
    """Files to publish, written by the run itself."""
