"""From a checked configuration to running workers: launched here, or joined where torchrun or SLURM did it."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from trainer.cli.crew import first_crew
from trainer.cli.keep_running import keep_running
from trainer.config.rules_sources import is_needed_to_train
from trainer.config.schema import Config
from trainer.config.sections.sources import HfSource
from trainer.data.catalog.scan import Removed
from trainer.data.prepare.commit import commit
from trainer.data.prepare.stages import (
    PrepareCounts,
    forget_plan,
    is_current,
    plan_prepare,
    plan_repack,
    progress,
)
from trainer.data.sources.listing import is_there, main_path
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.caption_survey import planned_records
from trainer.data.survey.image_weights import counted, describe_tags
from trainer.errors import UserError
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.train.caption_rules import describe_captions, require_captions, survey_of, tag_separators
from trainer.train.workers.prepare_worker import needs_workers, note_references, prepare_settings

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


def ensure_prepared(config: Config, model: RunModel) -> int:
    """Prepare the data set if it is not there yet; returns an exit code. New images are not looked for."""
    if not is_current(prepare_settings(config, model)):
        return prepare(config, model)
    for source in config.data.sources:
        place = main_path(source)
        if not is_needed_to_train(config, source) and not isinstance(source, HfSource) and not is_there(place):
            print(f"{place} is not there; training on what was prepared from it")
    return 0


def await_prepared(config: Config, model: RunModel) -> None:
    """Wait until another process has prepared the data set."""
    settings = prepare_settings(config, model)
    while not is_current(settings):
        time.sleep(_POLL_S)


def prepare(
    config: Config, model: RunModel, repack: bool = False, limit: int | None = None, removed: Removed = "ask"
) -> int:
    """Find what is new or has changed, encode new images on all workers, and make all that a new snapshot.

    Returns an exit code.

    Args:
        removed: what becomes of images that are not there any more.
        repack: store latents that are used where they lie in the data set's own shards, on all workers.
        limit: look at no more than the first so many images that each source lists.
    """
    prepared = config.data.prepared
    print(f"preparing {prepared}")
    counts = plan_prepare(prepare_settings(config, model), limit=limit, removed=removed)
    for line in describe_plan(counts):
        print(line)
    captions = survey_of(config, planned_records(prepared))
    for line in describe_captions(config, model, captions):
        print(line)
    if counts.pending_rows:
        try:
            require_captions(config, captions)
        except UserError:
            forget_plan(prepared)
            raise
        if code := _write_shards(config):
            return code
    done = commit(prepared)
    if repack and plan_repack(prepared)[0]:
        if code := _write_shards(config):
            return code
        done = commit(prepared)
        if config.data.augment.flip_probability:
            print("repacked latents are not mirrored: data.augment.flip_probability has no effect on them")
        print("repacked: the files that held the latents are still read by runs that stopped in the middle of an epoch")
    if done.masks:
        print(done.masks)
    left_out = f"; {done.left_out} left out, with the reason in {prepared / 'bad.jsonl'}" if done.left_out else ""
    print(f"prepared {done.images:,} images{left_out}")
    return 0


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


def _write_shards(config: Config) -> int:
    """Write what is planned, on all workers if it takes a model or the reading of much; returns an exit code."""
    with _bar(config.data.prepared):
        if not needs_workers(config):
            note_references(config)
            return 0
        notice = "ending; the same command goes on with what is missing"
        return start_workers("prepare", config, config.data.prepared, {}, stop_notice=notice)


def describe_plan(counts: PrepareCounts) -> list[str]:
    """What a scan of the sources found."""
    scan = counts.scan
    lines = [f"{scan.listed:,} images found: {scan.new:,} new, {scan.known:,} prepared before, {scan.bad:,} unusable"]
    changes = {
        "new captions": scan.captions,
        "seen more or less often": scan.repeats,
        "renamed": scan.renamed,
        "moved": scan.moved,
        "back": scan.back,
        "changed, to be encoded anew": scan.changed,
        "removed": scan.removed,
        "not there any more, but kept": scan.kept,
    }
    if any(changes.values()):
        lines.append("changes: " + ", ".join(f"{number:,} {what}" for what, number in changes.items() if number))
    if counts.empty_captions:
        lines.append(f"{counts.empty_captions:,} of {counts.new_rows:,} new images have no caption")
    for encoding, (number, example) in sorted(scan.foreign.items()):
        are = "captions are" if number > 1 else "caption is"
        lines.append(f"{number:,} {are} not UTF-8, read as {encoding}, such as {example}")
    number, example = scan.lossy
    if number:
        hold = "captions hold" if number > 1 else "caption holds"
        lines.append(f"{number:,} {hold} U+FFFD, in place of characters that were lost before, such as {example}'s")
    if counts.masks is not None and counts.new_rows:
        lines.append(f"{counts.masks:,} of {counts.new_rows:,} new images have a mask, the others are trained in full")
    if scan.ignored:
        kinds = ", ".join(f"{number:,} x {ending}" for ending, number in scan.ignored.most_common(5))
        lines.append(f"ignored other files: {kinds}")
    return lines


@contextmanager
def _bar(prepared: Path) -> Iterator[None]:
    """Show how far all workers are together."""
    done, total = progress(prepared)
    ended = threading.Event()

    def watch(bar: "tqdm[None]") -> None:
        while not ended.wait(_POLL_S):
            bar.update(progress(prepared)[0] - bar.n)

    with tqdm(desc="encoding", total=total, initial=done, unit="img", disable=None) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            bar.update(progress(prepared)[0] - bar.n)
