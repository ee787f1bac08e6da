"""What the launcher has to say of a run, and of the preparing of its data, to whoever is away."""

import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trainer.config.schema import Config
from trainer.config.sections.notify_config import Event
from trainer.data.prepare.commit import Committed
from trainer.data.prepare.stages import PrepareCounts, progress, unusable_so_far
from trainer.data.store.shards import ShardError
from trainer.data.survey.stats import BAD_FILE
from trainer.errors import UserError
from trainer.measure.run_arithmetic import format_duration
from trainer.notify.messenger import Messenger
from trainer.parallel.failure import Failure
from trainer.parallel.launch import WorkersResult

_KINDS: dict[str, tuple[Event, ...]] = {"hang": ("stall", "fault"), "numerics": ("nan", "fault")}

_LOOK_EVERY_S = 60.0
_JUDGED_FROM = 1000  # images, of those that are being encoded


def messenger_of(config: Config, warn: Callable[[str], None]) -> Messenger:
    """Of the run; silent unless `notify` says otherwise."""
    return Messenger(config.notify, run_name(config), warn)


def run_name(config: Config) -> str:
    """What it is called, in messages and at trackers."""
    return config.log.name or config.run.dir.absolute().name


def tell_start(messenger: Messenger, workers: int, newest: str | None) -> None:
    """The command has begun to train."""
    many = f"{workers} worker{'s' if workers > 1 else ''}"
    messenger.tell(("start",), f"training {f'goes on from {newest}' if newest else 'begins'} with {many}")


def tell_restart(messenger: Messenger, result: WorkersResult, line: str) -> None:
    """The workers are started again, for what `line` says."""
    messenger.tell((*_events(result.failure), "restart"), line)


def tell_end(messenger: Messenger, result: WorkersResult, newest: str | None) -> None:
    """They are not."""
    failure, at = result.failure, f"; newest checkpoint: {newest or 'none'}"
    if failure is not None:
        cause = failure.message().splitlines()[0].removesuffix(":")
        messenger.tell((*_events(failure), "finish"), f"given up: {cause}{at}")
    elif result.stopped_by is not None:
        messenger.tell(("finish",), f"stopped by {result.stopped_by.name}{at}")
    elif result.exit_code == 0:
        messenger.tell(("finish",), f"done{at}")
    else:
        messenger.tell(("fault", "finish"), f"ended with exit code {result.exit_code}{at}")


def _events(failure: Failure | None) -> tuple[Event, ...]:
    return () if failure is None else _KINDS.get(failure.kind, ("fault",))


class PrepareMessages(Messenger):
    """Of one `prepare`, or of what a training prepares first; for the one process that plans and commits.

    Args:
        alone: it is `prepare` itself, which tells its start and finish also where nothing is to be encoded.
    """

    def __init__(self, config: Config, alone: bool) -> None:
        super().__init__(config.notify, run_name(config), _say)
        self._prepared, self._most_bad = config.data.prepared, config.data.max_bad_fraction
        self._alone, self._begun, self._told_bad, self._begin_s = alone, False, False, time.monotonic()

    def planned(self, counts: PrepareCounts) -> None:
        """The sources have been looked at; what is new of them is going to be encoded."""
        self._begun = self._alone or counts.pending_rows > 0
        if self._begun:
            found = f"{counts.scan.listed:,} images found, {counts.pending_rows:,} to be encoded"
            self.tell(("start",), f"preparing {self._prepared} begins: {found}")
            self._judge(counts.reasons.total, counts.reasons.total + sum(counts.rows.values()))

    def finished(self, done: Committed) -> None:
        """All of it is a new snapshot."""
        if self._begun:
            self._judge(done.left_out, done.left_out + done.images)
            took = format_duration(time.monotonic() - self._begin_s)
            left_out = f", {done.left_out:,} unusable" if done.left_out else ""
            self.tell(("finish",), f"prepared {done.images:,} images{left_out} in {took}; {self._prepared}")

    def part_finished(self, line: str) -> None:
        """This host's part is encoded, which `line` says."""
        if self._begun:
            self.tell(("finish",), line)

    def workers_ended(self, result: WorkersResult) -> None:
        """The encoding is over; tells of an end that was not its own."""
        if result.failure is not None:
            self.failed(result.failure.message().splitlines()[0].removesuffix(":"), _events(result.failure))
        elif result.exit_code and result.stopped_by is not None:
            self.stopped(result.stopped_by)
        elif result.exit_code:
            self.failed(f"ended with exit code {result.exit_code}")

    def failed(self, cause: str, events: tuple[Event, ...] = ("fault",)) -> None:
        """It is given up."""
        self.tell((*events, "finish"), f"preparing is given up: {cause}{self._at()}")

    def stopped(self, by: signal.Signals) -> None:
        """Somebody asked for the end."""
        self.tell(("finish",), f"preparing is stopped by {by.name}{self._at()}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look now and then at the shards that are being written, for images that cannot be encoded."""
        if not self.is_on:
            yield
            return
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), name="unusable images", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, ended: threading.Event) -> None:
        known: dict[str, tuple[int, int]] = {}
        while not self._told_bad and not ended.wait(_LOOK_EVERY_S):
            with suppress(OSError, sqlite3.Error, ShardError, UserError):  # looked at again in a minute
                unusable, tried = unusable_so_far(self._prepared, known)
                if tried >= _JUDGED_FROM:
                    self._judge(unusable, tried, encoding=True)

    def _judge(self, bad: int, images: int, *, encoding: bool = False) -> None:
        """Once in a command; while images are encoded, the list of them is not written yet."""
        if bad > self._most_bad * images and not self._told_bad:
            self._told_bad = True
            which, listed = (" tried so far", "at the end they are in") if encoding else ("", "see")
            limit = f"more than data.max_bad_fraction = {self._most_bad:g}; {listed} {self._prepared / BAD_FILE}"
            self.tell(("bad_data",), f"{bad:,} of {images:,} images{which} cannot be used, {limit}")

    def _at(self) -> str:
        with suppress(OSError, sqlite3.Error, UserError):
            done, total = progress(self._prepared)
            if total:
                return f"; {done:,} of {total:,} images are encoded, the same command goes on"
        return ""


class Ended(BaseException):
    """SIGTERM or SIGHUP has come while no workers were there to be told."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by


@contextmanager
def telling_of_prepare(config: Config, *, alone: bool, catches_signals: bool = True) -> Iterator[PrepareMessages]:
    """Messages of a `prepare`, which end with it: also of what it raises, and of signals, which end it as before.

    Args:
        alone: as of `PrepareMessages`.
        catches_signals: not of a worker that others wait for: it has to end at once.
    """
    messages = PrepareMessages(config, alone)
    if not messages.is_on:
        yield messages
        return
    with signals_raise(wanted=catches_signals), messages:
        try:
            yield messages
        except Ended as end:
            messages.stopped(end.by)
            raise
        except KeyboardInterrupt:
            messages.stopped(signal.SIGINT)
            raise
        except Exception as error:
            text = str(error).partition("\n")[0]
            messages.failed(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
            raise


@contextmanager
def signals_raise(*, wanted: bool = True) -> Iterator[None]:
    """Raise `Ended` at the first SIGTERM or SIGHUP, so that what is open here is closed; the process then ends by that
    signal, as it would without us, and at once by a second one. A signal that is not by default is left alone."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        be_default()
        raise Ended(signal.Signals(number))

    def be_default() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, end)
    ended = None
    try:
        yield
    except Ended as error:
        ended = error.by
    finally:
        be_default()
    if ended is not None:
        os.kill(os.getpid(), ended)


def _say(line: str) -> None:
    with suppress(OSError):
        print(f"sdxl-train: {line}", file=sys.stderr, flush=True)
