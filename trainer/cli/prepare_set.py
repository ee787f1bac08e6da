"""`prepare` from its plan to the snapshot: on this host's workers, or as one worker of torchrun's or SLURM's job."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainer.cli.prepare_messages import describe_plan, describe_pruned, describe_work
from trainer.cli.run_messages import PrepareMessages, signals_raise, telling_of_prepare
from trainer.cli.start_workers import start_workers, worker_count
from trainer.config.schema import Config
from trainer.config.section_rules.rules_sources import is_needed_to_train
from trainer.config.sections.data.sources import HfSource
from trainer.data.catalog.scan import Removed
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import pending_payloads
from trainer.data.prepare.merge_parts import take_shards
from trainer.data.prepare.prune import delete_unused, plan_prune
from trainer.data.prepare.rehearsal import known_speed, note_speed, rehearsed
from trainer.data.prepare.stages import PrepareCounts, forget_plan, is_current, plan_prepare, plan_repack, progress
from trainer.data.sources.listing import is_there, main_path
from trainer.data.survey.caption_survey import planned_records
from trainer.data.survey.stats import BAD_FILE
from trainer.errors import UserError
from trainer.measure.run_arithmetic import format_duration
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import joined_environment
from trainer.train.caption_rules import describe_captions, require_captions, survey_of
from trainer.train.workers.prepare_worker import needs_workers, note_references, prepare_settings

_POLL_S = 1.0
_SILENT_S = 15.0
_ENCODED = {"encode"}  # what shards hold whose speed is worth knowing: others are copied, or only listed
_PATIENCE_S = 30 * 86400.0  # with which workers of other hosts wait for the plan, and for the last shard


@dataclass(frozen=True)
class PrepareWish:
    """What `prepare` is asked for.

    Attributes:
        repack: store latents that are used where they lie in the data set's own shards, on all workers.
        limit: look at no more than the first so many images that each source lists.
        removed: what becomes of images that are not there any more.
        prune: give back the disk space of images that are gone, and of older snapshots.
        part: (k, n): write only the k-th of n parts of the shards, k from 1, and leave the rest to `merge`.
        merge: prepared folders, whose shards are taken in place of encoding.
        look_again: look at the sources even if nothing of them seems to have changed.
    """

    repack: bool = False
    limit: int | None = None
    removed: Removed = "ask"
    prune: bool = False
    part: tuple[int, int] | None = None
    merge: tuple[Path, ...] = ()
    look_again: bool = False


def ensure_prepared(config: Config, model: RunModel) -> int:
    """Prepare the data set if it is not there yet, or changes are to be looked for; returns an exit code."""
    looks = config.data.look_at_start and joined_environment(os.environ) is None
    if not is_current(prepare_settings(config, model)) or looks:
        return prepare(config, model, alone=False)
    for source in config.data.sources:
        place = main_path(source)
        if not is_needed_to_train(config, source) and not isinstance(source, HfSource) and not is_there(place):
            print(f"{place} is not there; training on what was prepared from it")
    return 0


def await_prepared(config: Config, model: RunModel) -> None:
    """Wait until another process has prepared the data set; one worker of each host says so if that takes long."""
    settings, begin, told = prepare_settings(config, model), time.monotonic(), os.environ.get("LOCAL_RANK") != "0"
    while not is_current(settings):
        if not told and time.monotonic() - begin > _SILENT_S:
            told = True
            print(
                f"{settings.prepared}: {socket.gethostname()} waits until the data are prepared; a host with a copy of "
                "its own needs it at this path",
                file=sys.stderr,
            )
        time.sleep(_POLL_S)


def prepare(config: Config, model: RunModel, wish: PrepareWish = PrepareWish(), *, alone: bool = True) -> int:
    """Find what is new or has changed, encode new images on all workers, and make all that a new snapshot.

    Returns an exit code.

    Args:
        alone: nothing else follows; else messages tell of it only if something is encoded.
    """
    with telling_of_prepare(config, alone=alone) as messages:
        for _ in _stages(config, model, wish, messages):
            with messages.watching():
                code = _write_shards(config, wish, messages)
            if code:
                return code
    return 0


def tell_plan(config: Config, model: RunModel, wish: PrepareWish) -> int:
    """Print what `prepare` would do, and write nothing into the prepared folder; returns an exit code."""
    prepared = config.data.prepared
    print(f"dry run: what preparing {prepared} would do")
    already = progress(prepared)[0] if (prepared / "catalog.sqlite").is_file() else 0
    with signals_raise(), rehearsed(prepare_settings(config, model)) as settings:
        counts = plan_prepare(settings, limit=wish.limit, removed=wish.removed, look_again=wish.look_again)
        captions = survey_of(config, planned_records(settings.prepared))
        payloads = pending_payloads(settings.prepared)
    encodes = config.data.cache_text or bool(payloads & {"encode", "repack", "copy"})
    speed = known_speed(prepared) if payloads == _ENCODED else None
    lines = describe_plan(counts, None) + describe_captions(config, model, captions)
    for line in [*lines, describe_work(counts.pending_rows - already, encodes, speed)]:
        print(line)
    if counts.pending_rows:
        require_captions(config, captions)
    return 0


def prepare_joined(config: Config, model: RunModel, wish: PrepareWish, joined: dict[str, str]) -> None:
    """Be one worker of a job that torchrun or SLURM has started, all of which see the same folder.

    Worker 0 plans and commits; all encode, each the shards that no other has begun. Ends the process.
    """
    from trainer.parallel.worker import run_worker

    os.environ.update(joined)
    run_worker(lambda stop_requested: _join(config, model, wish))


def _join(config: Config, model: RunModel, wish: PrepareWish) -> None:
    from trainer.parallel.comm import barrier, broadcast_object, close, init_comm
    from trainer.train.workers.prepare_worker import encode_share

    comm = init_comm(_PATIENCE_S)
    with ExitStack() as stack:
        messages, stages = None, iter(())
        if comm.rank == 0:
            messages = stack.enter_context(telling_of_prepare(config, alone=True, catches_signals=False))
            stages = _stages(config, model, wish, messages)
        while True:
            said = broadcast_object(comm, _next_stage(stages) if comm.rank == 0 else None)
            if isinstance(said, list):
                raise UserError(*said)
            if said == "done":
                break
            with _bar(config, quiet=comm.rank != 0), messages.watching() if messages else nullcontext():
                encode_share(config, model, wish.part)
                barrier(comm)
    close(comm)


def _next_stage(stages: Iterator[None]) -> "str | list[str]":
    """What all workers are to do now; the lines of a mistake."""
    try:
        next(stages)
        return "encode"
    except StopIteration:
        return "done"
    except UserError as error:
        return list(error.lines)


def _stages(config: Config, model: RunModel, wish: PrepareWish, messages: PrepareMessages) -> Iterator[None]:
    """Plans, and what follows on it; the caller writes what is planned whenever it is given the turn."""
    prepared = config.data.prepared
    print(f"preparing {prepared}")
    counts = plan_prepare(
        prepare_settings(config, model), limit=wish.limit, removed=wish.removed, look_again=wish.look_again
    )
    for line in describe_plan(counts, prepared):
        print(line)
    messages.planned(counts)
    captions = survey_of(config, planned_records(prepared))
    for line in describe_captions(config, model, captions):
        print(line)
    if counts.pending_rows:
        try:
            require_captions(config, captions)
        except UserError:
            forget_plan(prepared)
            raise
        if wish.merge:
            print(take_shards(prepared, wish.merge))
        else:
            yield
    if wish.part is not None:
        line = _part_done(prepared, *wish.part)
        print(line)
        messages.part_finished(line)
        return
    done = commit(prepared)
    if wish.repack and plan_repack(prepared)[0]:
        yield
        done = commit(prepared)
        if config.data.augment.flip_probability:
            print("repacked latents are not mirrored: data.augment.flip_probability has no effect on them")
        print("repacked: the files that held the latents are still read by runs that stopped in the middle of an epoch")
    if wish.prune:
        if plan_prune(prepared):
            yield
        done = commit(prepared)
        print(describe_pruned(delete_unused(prepared)))
    for line in _describe_done(prepared, counts, done):
        print(line)
    messages.finished(done)


def _part_done(prepared: Path, part: int, parts: int) -> str:
    done, total = progress(prepared)
    return (
        f"part {part} of {parts}: {done:,} of {total:,} images are encoded in {prepared}; when all parts are there, "
        "`sdxl-train prepare CONFIG.yaml --merge FOLDER...` makes them one set"
    )


def _describe_done(prepared: Path, counts: PrepareCounts, done: Committed) -> list[str]:
    left_out = ""
    if done.left_out:
        # Those that were found while encoding have not been told yet.
        reasons = f": {done.reasons}; all in" if done.left_out != counts.reasons.total else ", with the reason in"
        left_out = f"; {done.left_out:,} unusable{reasons} {prepared / BAD_FILE}"
    return [*([str(done.masks)] if done.masks else []), f"prepared {done.images:,} images{left_out}"]


def _write_shards(config: Config, wish: PrepareWish, messages: PrepareMessages) -> int:
    """Write what is planned, on all workers if it takes a model or the reading of much; returns an exit code."""
    with _bar(config):
        if not needs_workers(config):
            note_references(config)
            return 0
        notice = "ending; the same command goes on with what is missing"
        options, ended = {"part": wish.part}, messages.workers_ended
        return start_workers("prepare", config, config.data.prepared, options, ended, stop_notice=notice)


@contextmanager
def _bar(config: Config, quiet: bool = False) -> Iterator[None]:
    """Show how far all workers are together, how fast, and at the end how fast they were."""
    prepared, cards = config.data.prepared, worker_count(config)
    (done, total), begin = progress(prepared), time.monotonic()
    encodes = pending_payloads(prepared) == _ENCODED
    ended, going = threading.Event(), [(done, begin)]  # and when the first were seen: before, models are loaded

    def watch(bar: "tqdm[None]") -> None:
        while not ended.wait(_POLL_S):
            if bar.n > done and len(going) == 1:
                going.append((bar.n, time.monotonic()))
            bar.set_postfix_str(
                f"{(bar.n - done) / (time.monotonic() - begin) / cards:.2f} img/s a worker", refresh=False
            )
            bar.update(progress(prepared)[0] - bar.n)

    with tqdm(desc="encoding", total=total, initial=done, unit="img", disable=True if quiet else None) as bar:
        watcher = threading.Thread(target=watch, args=(bar,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            now = progress(prepared)[0]
            bar.update(now - bar.n)
    seconds = time.monotonic() - begin
    if now > done and not quiet:
        rate = (now - done) / seconds
        if encodes:
            since, then = going[-1] if now > going[-1][0] else going[0]
            note_speed(prepared, (now - since) / (begin + seconds - then), cards)
        print(
            f"encoded {now - done:,} images in {format_duration(seconds)}: {rate:,.1f} img/s, {rate / cards:,.2f} each "
            f"of {cards} worker{'s' * (cards > 1)}"
        )
