"""A real run of the training loop in the test's own process, watched step by step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from trainer.config.schema import Config
from trainer.data.loader import Batch
from trainer.model_files.run_model import RunModel, open_model
from trainer.parallel.comm import Comm
from trainer.train import loop
from trainer.train.saved.state import TrainState
from trainer.train.step import StepParts, StepResult, train_step

ALONE = Comm(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def model_of(config: Config) -> RunModel:
    """The run's model, opened as its worker does."""
    model = config.model
    return open_model(model.path, model.vae, model.tokenizer, model.text_projection)


def run_config(model: Path, prepared: Path, run_dir: Path, data: dict | None = None, **train: int) -> Config:
    """Batches of 4 in fp32, read by threads; `data` and `train` go into these sections."""
    return Config.model_validate(
        {
            "run": {"dir": str(run_dir), "seed": 5},
            "model": {"path": str(model)},
            "data": {"sources": [{"path": "."}], "prepared": str(prepared), "workers": 0, **(data or {})},
            "train": {"batch_size_per_gpu": 4, "precision": "fp32", **train},
            "optimizer": {"lr": 1e-3},
        }
    )


@dataclass
class Watched:
    """What a run trained on: for each step the keys with weight, and what came of it."""

    keys: list[list[str]] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    state: TrainState | None = None


def watched_run(
    config: Config,
    before_step: Callable[[int], None] = lambda step: None,
    stop_after: int | None = None,
    before_parts: Callable[[int, StepParts], None] = lambda step, parts: None,
) -> Watched:
    """Train as the command does.

    `before_step` and `before_parts` are called with the number of steps that this call has done; the latter with what
    the step works on too, to change it.
    """
    watched = Watched()

    def step(parts: StepParts, batches: object, *rest: object, **named: object) -> StepResult:
        before_step(len(watched.results))
        before_parts(len(watched.results), parts)
        taken: list[Batch] = []
        watched.keys.append([])
        watched.results.append(train_step(parts, (taken.append(b) or b for b in batches), *rest, **named))  # type: ignore
        for batch in taken:
            weighted = zip(batch.keys, batch.weights.tolist(), strict=True)
            watched.keys[-1] += [key for key, weight in weighted if weight]
        return watched.results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        watched.state = loop.train(config, model_of(config), ALONE, lambda: len(watched.results) + 1 == stop_after)
    return watched
