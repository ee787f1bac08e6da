"""When a run's checkpoints and snapshots are due, where they go, and what is said of them."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.run_dir import (
    checkpoint_dir,
    fallback_run_dir,
    hand_over_config,
    prune_checkpoints,
)
from trainer.checkpoint.saver import FLAGS, Folder, Saver, missing_room
from trainer.checkpoint.share_of_save import NotFinite
from trainer.config.schema import Config
from trainer.config.values import seconds_of
from trainer.disks.run_disks import Disks, disks_of
from trainer.errors import UserError
from trainer.host.process_memory import read_memory
from trainer.memory.choice import parse_size
from trainer.parallel.comm import broadcast_object, gather_objects, sum_floats
from trainer.parallel.heartbeat import WRITING, Heartbeat
from trainer.train.build import Run
from trainer.train.saved.averages import averages_record, snapshot_folder, snapshot_is_due
from trainer.train.saved.base_model import RECORD as FROZEN
from trainer.train.saved.checkpoint_contents import checkpoint_files
from trainer.train.saved.objective_state import objective_record
from trainer.train.saved.part_times import times_record
from trainer.train.saved.state import TrainState

_log = logging.getLogger(__name__)
_HOST_SHARE = 1 / 4  # of its free memory, for the copies of all workers
_LONG = 4.0  # intervals
TOLD = FLAGS + 1
"""Numbers that `Saving.tell` gives."""


class Saving:
    """A run's saves, which all workers begin and end together.

    In each step: `tell` before the exchange, `after_step` behind it with the sums; `wait_copied` before weights change.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        heartbeat: Heartbeat,
        in_use: Callable[[], Path | None],
        before: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`in_use`: a checkpoint that is to stay although it is old; `before`: called before one is written."""
        self._config, self._run, self._comm = config, run, run.parts.comm
        self._heartbeat, self._in_use, self._before = heartbeat, in_use, before
        token = broadcast_object(self._comm, secrets.token_hex(3))
        staging = _staging_bytes(config)
        self.disks: Disks = disks_of(self._comm, local=config.run.on_local_disks)
        self._saver = Saver(self._comm.rank, self._comm.world, token, self._comm.device, staging, self.disks)
        self._interval_s = seconds_of(config.checkpoint.every)
        self._begun_s, self._begun_step, self._waited_s = time.monotonic(), -1, 0.0
        self._to_fallback = self._again = self._told_late = False
        self._published: list[int] = []

    def tell(self) -> list[float]:
        """The saver's flags, and whether one is due by rank 0's clock: to be summed over all workers."""
        since_s = time.monotonic() - self._begun_s
        due = self._comm.rank == 0 and self._interval_s is not None and since_s >= self._interval_s
        return [*self._saver.flags(), float(due)]

    def wait_copied(self) -> None:
        """Until weights may change."""
        begin, part = time.perf_counter(), self._heartbeat.part
        self._saver.wait_copied(self._beat)
        if self._heartbeat.part != part:
            self._heartbeat.begin(part)
        self._waited_s += time.perf_counter() - begin

    def _beat(self) -> None:
        """A disk is slow, and goes on: this is no hang."""
        self._heartbeat.begin(WRITING)

    def _finish(self) -> Exception | None:
        """Until no save is under way."""
        return self._saver.finish(self._sums, self._beat)

    def published(self) -> list[int]:
        """Steps whose checkpoints have become whole since the last call; on rank 0."""
        found, self._published = self._published, []
        return found

    def settle(self) -> None:
        """Until no save is under way, before the run ends for a reason of its own; all workers call it."""
        self._ended(self._finish())

    def after_step(self, run: Run, state: TrainState, told: Sequence[float], *, done: bool) -> None:
        """Go on with a save under way, and begin one if it is time.

        Args:
            run: as it is now; its data may be others than at the start.
            told: sums of `tell`.
            done: the run ends here, with a checkpoint.

        Raises:
            UserError: it could not be written at the run's end.
        """
        self._run = run
        run.parts.clock.mark("save")
        self._go_on(state, told, done=done)
        run.parts.clock.mark("other")

    def _go_on(self, state: TrainState, told: Sequence[float], *, done: bool) -> None:
        *flags, due_by_clock = told
        self._ended(self._saver.after_exchange(*flags))
        wish, step = self._config.checkpoint, state.step
        due_by_step = any(every and step % every == 0 for every in (wish.every_steps, wish.keep_every_steps))
        snapshot = snapshot_is_due(self._config.ema, step)
        if due_by_clock and self._saver.phase != "idle":
            self._tell_late()
        if not (done or due_by_step or snapshot or ((due_by_clock or self._again) and self._saver.phase == "idle")):
            return
        self._heartbeat.begin("a checkpoint", step)
        begin = time.perf_counter()
        if self._saver.phase != "idle":  # else what was said of the last one stands: where this one goes
            self._ended(self._finish())
        checkpoint = done or due_by_step or due_by_clock > 0 or self._again
        if folders := self._folders(state, checkpoint=checkpoint, snapshot=snapshot):
            self._begin(folders, step)
        self._waited_s += time.perf_counter() - begin
        if done:
            self._finish_run(state)

    def _begin(self, folders: list[Folder], step: int) -> None:
        self._again, self._begun_s, self._begun_step, self._waited_s = False, time.monotonic(), step, 0.0
        self._told_late = False
        self._before(step)
        room = missing_room(folders) if self.disks.is_first else ""
        self._saver.begin(folders, step, next(filter(None, gather_objects(self._comm, room)), ""))

    def _finish_run(self, state: TrainState) -> None:
        """Wait for the last checkpoint; if it fails, try the fallback folder."""
        reason = self._finish()
        if reason is not None and self._helps_elsewhere(reason):
            self._ended(reason)
            self._begin(self._folders(state, checkpoint=True, snapshot=False), state.step)
            reason = self._finish()
        reasons = [said for said in gather_objects(self._comm, reason and _said(reason)) if said]
        if reasons:
            raise UserError(f"{self.path(state.step)}: the checkpoint could not be written: {reasons[0]}")

    def _helps_elsewhere(self, reason: Exception) -> bool:
        """Whether another disk may take what this one did not."""
        is_the_disk = not isinstance(reason, NotFinite)
        return is_the_disk and self._config.checkpoint.fallback_dir is not None and not self._to_fallback

    def _sums(self, values: list[float]) -> list[float]:
        return sum_floats(self._comm, values)

    def _ended(self, reason: Exception | None) -> None:
        """If a save was given up, say so, and where it is tried again. The one after that tries the run's own disk."""
        if reason is None:
            self._to_fallback = self._to_fallback and self._saver.phase != "idle"
            return
        path = self.path(self._begun_step)
        again = "training goes on, the next one is tried as usual"
        self._again = self._to_fallback = self._helps_elsewhere(reason)
        if self._again:
            again = f"trying again in {self._config.checkpoint.fallback_dir}"
        _log.warning("%s: not written (%s); %s", path, _said(reason), again)

    def _tell_late(self) -> None:
        """Once for each save."""
        since_s = time.monotonic() - self._begun_s
        if not self._told_late and self._interval_s and since_s > _LONG * self._interval_s and self._comm.rank == 0:
            self._told_late = True
            _log.warning("%s: still being written after %.0f s", self.path(self._begun_step), since_s)

    def path(self, step: int) -> Path:
        """Of the checkpoint after so many steps, in the run's directory or, if that failed, its stand-in."""
        return checkpoint_dir(self._place(), step)

    def _place(self) -> Path:
        """The run's directory, or its stand-in on another disk."""
        fallback, own = self._config.checkpoint.fallback_dir, self._config.run.dir
        return fallback_run_dir(fallback, own) if fallback and self._to_fallback else own

    def _folders(self, state: TrainState, *, checkpoint: bool, snapshot: bool) -> list[Folder]:
        """What is to be written now and is not there, on all workers alike."""
        folders, parts = [], self._run.parts
        if checkpoint:
            record = state.to_json() | averages_record(parts)
            record |= objective_record(self._config.objective, parts.denoiser.objective)
            record |= {FROZEN: dict(self._run.frozen)} | times_record(self._run.times)
            path = self.path(state.step)
            published = partial(self._on_published, path, state.step)
            folders.append(Folder(path, checkpoint_files(parts), record, published))
        if snapshot:
            folders.append(snapshot_folder(self._config.ema, self._place(), parts, state.step))
        found = gather_objects(self._comm, [(folder.path / MANIFEST).is_file() for folder in folders])
        there = found[:: self.disks.workers_each]  # on each disk by one worker: a network's may show others the past
        return [folder for folder, *is_there in zip(folders, *there, strict=True) if not all(is_there)]

    def _on_published(self, path: Path, step: int) -> None:
        """A thread that has published a checkpoint, on each disk: delete what is old, and say so."""
        wish, own = self._config.checkpoint, self._config.run.dir
        seconds = time.monotonic() - self._begun_s
        _log.info("saved %s in %.1f s, for which training waited %.2f s", path, seconds, self._waited_s)
        self._published.append(step)
        prune_checkpoints(path.parent.parent, wish.keep, self._in_use(), always=wish.keep_every_steps)
        if not wish.fallback_dir:
            return
        stand_in = fallback_run_dir(wish.fallback_dir, own)
        if path.parent.parent == stand_in:
            hand_over_config(own, stand_in)
        else:  # the run's own disk is well again
            prune_checkpoints(stand_in, 0, always=wish.keep_every_steps)


def _said(reason: Exception) -> str:
    return (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)


def _staging_bytes(config: Config) -> int | None:
    """What this worker may hold in copies."""
    if config.checkpoint.staging != "auto":
        return parse_size(config.checkpoint.staging)
    memory = read_memory(())
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if memory is None else int(memory.available * _HOST_SHARE) // workers_here
