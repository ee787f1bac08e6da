"""From a checked configuration to running workers: launched here, or joined where torchrun or SLURM did it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from trainer.cli.crew import first_crew
from trainer.cli.keep_running import keep_running
from trainer.config.schema import Config
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import counted, describe_tags
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.parallel.launch import WorkersResult
from trainer.train.caption_rules import tag_separators

_POLL_S = 1.0


def start_workers(
    task: str,
    config: Config,
    out_dir: Path,
    options: Mapping[str, object],
    on_end: Callable[[WorkersResult], None] | None = None,
    **launch: str,
) -> int:
    """Run a task of `trainer.cli.tasks` on this host's workers; returns the command's exit code.

    Args:
        out_dir: where the resolved configuration and the workers' logs go.
        options: JSON-able arguments of the task.
        on_end: is told how the workers ended.
        launch: passed on to `run_workers`.
    """
    return keep_running(task, config, first_crew(config, task), out_dir, options, on_end, **launch)


def worker_count(config: Config) -> int:
    """Workers of the whole run: those of torchrun or SLURM where they started us, else this host's."""
    joined = joined_environment(os.environ)
    return int(joined["WORLD_SIZE"]) if joined else choose_workers(config.launch.workers, detect_gpus())[0]


def count_run_tags(config: Config) -> None:
    """Where the run weighs images by their tags: count those of the prepared set, if that is not done, and say so."""
    section, separators = config.objective.loss_weights, tag_separators(config)
    if not section.weighs_tags:
        return
    prepared = PreparedSet.open(config.data.prepared)
    with tqdm(desc="counting tags", total=prepared.images("train"), unit="img", disable=None, leave=False) as bar:
        counts = counted(prepared, separators, bar.update)
    for line in describe_tags(section, counts, prepared):
        print(line)
