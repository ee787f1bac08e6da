"""From a checked configuration to running workers: launched here, or joined where torchrun or SLURM did it."""

import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from trainer.cli.crew import first_crew
from trainer.cli.keep_running import keep_running
from trainer.config.schema import Config
from trainer.data.prepare.prune import Pruned
from trainer.data.prepare.stages import (
    PrepareCounts,
)
from trainer.data.prepare.working_folder import LEFT_OUT
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import counted, describe_tags
from trainer.data.survey.stats import BAD_FILE
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.train.caption_rules import tag_separators

_POLL_S = 1.0


def start_workers(task: str, config: Config, out_dir: Path, options: Mapping[str, object], **launch: str) -> int:
    """Run a task of `trainer.cli.tasks` on this host's workers; returns the command's exit code.

    Args:
        out_dir: where the resolved configuration and the workers' logs go.
        options: JSON-able arguments of the task.
        launch: passed on to `run_workers`.
    """
    return keep_running(task, config, first_crew(config, task), out_dir, options, **launch)


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


def describe_pruned(pruned: Pruned) -> str:
    """What a pruning has given back."""
    text = f"pruned: {pruned.files:,} files deleted, {pruned.num_bytes / 1e9:,.2f} GB given back"
    if pruned.snapshots:
        text += "; a run that stopped within an epoch goes on with the next one, for older snapshots are deleted too"
    return text


def describe_plan(counts: PrepareCounts, prepared: Path) -> list[str]:
    """What a scan of the sources found."""
    scan = counts.scan
    lines = [f"{scan.listed:,} images found: {scan.new:,} new, {scan.known:,} prepared before, {scan.bad:,} unusable"]
    changes = {
        "captions changed" if scan.captions != 1 else "caption changed": scan.captions,
        "seen more or less often": scan.repeats,
        "renamed": scan.renamed,
        "moved": scan.moved,
        "back": scan.back,
        "changed images": scan.changed,
        "removed": scan.removed,
        "not there any more, but kept": scan.kept,
    }
    if counts.reasons.total:
        lines.append(f"{counts.reasons.total:,} unusable: {counts.reasons.describe()}; all in {prepared / BAD_FILE}")
    if scan.filtered:
        kinds = ", ".join(f"{number:,} {what}" for what, number in scan.filtered.most_common())
        lines.append(f"filters leave out {scan.filtered.total():,}: {kinds}; all in {prepared / LEFT_OUT}")
    if any(changes.values()):
        lines.append("changes: " + ", ".join(f"{number:,} {what}" for what, number in changes.items() if number))
    if counts.empty_captions:
        lines.append(f"{counts.empty_captions:,} of {counts.new_rows:,} new images have no caption")
    if counts.masks is not None and counts.new_rows:
        lines.append(f"{counts.masks:,} of {counts.new_rows:,} new images have a mask, the others are trained in full")
    if scan.ignored:
        kinds = ", ".join(f"{number:,} x {ending}" for ending, number in scan.ignored.most_common(5))
        lines.append(f"ignored other files: {kinds}")
    return lines
