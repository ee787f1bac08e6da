"""From a checked configuration to running workers: launched here, or joined where torchrun or SLURM did it."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from trainer.checkpoint.run_dir import RESOLVED_CONFIG, list_checkpoints
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.prepare.caption_survey import planned_records
from trainer.data.prepare.image_weights import counted, describe_tags
from trainer.data.prepare.stages import (
    PrepareCounts,
    commit,
    forget_plan,
    is_current,
    plan_prepare,
    plan_repack,
    progress,
)
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError, printable_lines
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.parallel.launch import run_workers
from trainer.parallel.supervise import Attempts, judge
from trainer.parallel.worker import MEMORY_ATTEMPT, RESTARTS
from trainer.train.caption_rules import describe_captions, require_captions, survey_of, tag_separators
from trainer.train.workers.prepare_worker import needs_workers, note_references, prepare_settings

_POLL_S = 1.0
EVENTS = "events.txt"
_TASKS_WITH_A_PLAN = ("train", "bench")  # which plan with less when they are started again
# Not `-m`: each reader process of a worker would import that module once more, as its main module. The first place of
# the path is the current directory's, where a folder of somebody else's may be called `trainer`.
_OURS = str(Path(__file__).parents[2])
_WORKER = f"import sys; sys.path[0] = {_OURS!r}; from trainer.cli.tasks import main; main()"


def start_workers(task: str, config: Config, out_dir: Path, options: Mapping[str, object], **launch: str) -> int:
    """Run a task of `trainer.cli.tasks` on this host's workers; returns the command's exit code.

    Args:
        out_dir: where the resolved configuration and the workers' logs go.
        options: JSON-able arguments of the task.
        launch: passed on to `run_workers`.
    """
    workers, gpu = choose_workers(config.launch.workers, detect_gpus())
    resolved = write_resolved(config, out_dir)
    attempts = Attempts(checkpoint=_newest_name(config))
    while True:
        result = run_workers(
            [sys.executable, "-c", _WORKER, task, str(resolved), json.dumps(options)],
            workers=workers,
            log_dir=out_dir / "logs",
            env={**os.environ, MEMORY_ATTEMPT: str(attempts.memory), RESTARTS: str(attempts.restarts)},
            threads=config.launch.threads_per_worker,
            gpu=gpu,
            **launch,
        )
        verdict = judge(
            result,
            attempts,
            _newest_name(config),
            most_fruitless=config.launch.restarts if task == "train" else 0,
            plans=task in _TASKS_WITH_A_PLAN,
        )
        if verdict.attempts is None:
            break
        _tell(out_dir, verdict.line)
        time.sleep(verdict.pause_s)
        attempts = verdict.attempts
    if verdict.line:
        _tell(out_dir, verdict.line)
    if result.failure is not None:
        for line in printable_lines(result.failure.message()).split("\n"):
            known = result.failure.kind in ("user", "memory")
            print(f"sdxl-train: {line}" if known else line, file=sys.stderr)
    return result.exit_code


def _newest_name(config: Config) -> str | None:
    found = list_checkpoints(config.run.dir)
    return found[-1].name if found else None


def _tell(out_dir: Path, line: str) -> None:
    """On the screen and in `events.txt`, which says what happened to a run in one line each."""
    print(f"sdxl-train: {line}", file=sys.stderr, flush=True)
    with suppress(OSError), (out_dir / EVENTS).open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def write_resolved(config: Config, out_dir: Path) -> Path:
    """The configuration with every key written out and absolute paths, as `config.resolved.yaml`.

    Raises:
        UserError: the disk is full, or nobody may write there.
    """
    path = out_dir / RESOLVED_CONFIG
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_yaml(config), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{out_dir}: cannot be written to: {error.strerror}") from None
    return path


def worker_count(config: Config) -> int:
    """Workers of the whole run: those of torchrun or SLURM where they started us, else this host's."""
    joined = joined_environment(os.environ)
    return int(joined["WORLD_SIZE"]) if joined else choose_workers(config.launch.workers, detect_gpus())[0]


def ensure_prepared(config: Config, model: RunModel) -> int:
    """Prepare the data set if it is not there yet; returns an exit code. New images are not looked for."""
    return 0 if is_current(prepare_settings(config, model)) else prepare(config, model)


def await_prepared(config: Config, model: RunModel) -> None:
    """Wait until another process has prepared the data set."""
    settings = prepare_settings(config, model)
    while not is_current(settings):
        time.sleep(_POLL_S)


def prepare(config: Config, model: RunModel, repack: bool = False, limit: int | None = None) -> int:
    """Find new images, encode them on all workers, and make them part of the data set; returns an exit code.

    Args:
        repack: store latents that are used where they lie in the data set's own shards, on all workers.
        limit: look at no more than the first so many images that each source lists.
    """
    prepared = config.data.prepared
    print(f"preparing {prepared}")
    counts = plan_prepare(prepare_settings(config, model), limit=limit)
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
    if scan.changed or scan.removed:
        lines.append(f"{scan.changed:,} changed and {scan.removed:,} removed ones stay as they were prepared")
    if counts.empty_captions:
        lines.append(f"{counts.empty_captions:,} of {counts.new_rows:,} new images have no caption")
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
