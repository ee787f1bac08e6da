"""The section `log`: records of the run, and what shows them elsewhere; documented as those of `schema.py` are."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Flag, PositiveInt, Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "csv"]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class WandbConfig(Section):
    project: Name = "sdxl-train"
    """The project that the run is shown in."""
    entity: Name | None = None
    """The user or team that it belongs to. Default: as W&B knows you."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`offline`: files in `wandb` in `run.dir`, for `wandb sync`. `auto`: as `WANDB_MODE` says, else online. The key
    comes from `wandb login` or `WANDB_API_KEY`."""


class MlflowConfig(Section):
    uri: Name | None = None
    """Address of the tracking server or store. Default: `MLFLOW_TRACKING_URI`, else the folder `mlflow` in `run.dir`.
    A password belongs into `MLFLOW_TRACKING_PASSWORD`."""
    experiment: Name = "sdxl-train"
    """The experiment that the run is shown in; made if it is missing."""


class LogConfig(Section):
    every_steps: PositiveInt = 1
    """Optimizer steps between lines in `metrics.jsonl` and TensorBoard."""
    block_norms: Flag = False
    """Also the gradient norm of each block, before clipping: `grad_norm/unet.down_blocks.1`, ..."""
    trackers: list[TrackerName] = ["tensorboard"]
    """What mirrors `metrics.jsonl`: `tensorboard` (files in `run.dir`), `wandb` (Weights & Biases), `mlflow`, `csv`
    (`metrics.csv`). `wandb` and `mlflow` need the extras of these names. See `docs/tracking.md`."""
    name: Name | None = None
    """What the run is called there. Default: the last part of `run.dir`."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    mlflow: MlflowConfig = MlflowConfig()
    """MLflow."""
