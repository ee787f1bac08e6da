"""The process beside the training that shows one tracker what is new in `metrics.jsonl`; not for people.

Its queue is the file: it holds a few hundred records at a time, and what could not be shown is shown later. It ends
when its standard input does, after a last look at the file. Free of torch.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import printable, without_secrets
from trainer.measure.trackers.tracked_run import OpenTracker, Record, TrackedRun, read_mark, write_mark

_AT_ONCE = 500  # records
_LOOK_S = 1.0
_NICENESS = 10
_OPENERS = {
    "csv": ("trainer.measure.trackers.csv_table", "open_csv"),
    "wandb": ("trainer.measure.trackers.wandb_run", "open_wandb"),
    "mlflow": ("trainer.measure.trackers.mlflow_run", "open_mlflow"),
}


def main() -> None:
    """Follow a run. Arguments: a pipe for what is told; the file of records. Standard input: the run, on a line."""
    status = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    with suppress(OSError):
        os.nice(_NICENESS)
    run = TrackedRun.from_json(sys.stdin.readline())
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    code = 1
    try:
        follow(run, run.run_dir / sys.argv[2], ended, lambda **said: print(json.dumps(said), file=status))
        code = 0
    except Exception as error:
        with suppress(OSError):
            print(json.dumps({"failed": reason_of(error)}), file=status)
    os._exit(code)  # what a library does at its end may take for ever


def follow(run: TrackedRun, records: Path, ended: threading.Event, tell: Any) -> None:
    """Show what is there, and what comes, until `ended`.

    Args:
        tell: called with `busy=True` before the tracker is asked for anything, and `busy=False` with `records` after.
    """
    tell(busy=True)
    tracker, mark = opener_of(run.kind)(run, read_mark(run.run_dir, run.kind))
    mark = replace(mark, replaces=False, id=tracker.id)
    write_mark(run.run_dir, run.kind, mark)
    tell(busy=False, records=mark.records)
    with records.open("rb") as file:
        source = new_records(file)
        for _ in range(mark.records):
            next(source)
        while True:
            is_last = ended.is_set()  # before the look, so that nothing is left
            while batch := _up_to(_AT_ONCE, source):
                tell(busy=True)
                tracker.add(batch)
                steps = (record["step"] for record in batch)
                mark = replace(mark, records=mark.records + len(batch), step=max(mark.step, *steps))
                write_mark(run.run_dir, run.kind, mark)
                tell(busy=False, records=mark.records)
            if is_last:
                break
            ended.wait(_LOOK_S)
    tell(busy=True)
    tracker.close()


def opener_of(kind: str) -> OpenTracker:
    """What opens a tracker of this kind; imported only here, for its library may be missing, or slow."""
    module, name = _OPENERS[kind]
    return getattr(import_module(module), name)


def new_records(file: BinaryIO) -> Iterator[Record | None]:
    """The records of a file that grows; None whenever there is no further one yet."""
    rest = b""
    while True:
        data = file.read(1 << 16)
        if not data:
            yield None
            continue
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
                    yield record


def _up_to(most: int, source: Iterator[Record | None]) -> list[Record]:
    found: list[Record] = []
    while len(found) < most and (record := next(source)) is not None:
        found.append(record)
    return found


def reason_of(error: BaseException) -> str:
    """What failed, on one line, without what is secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(without_secrets(text), 300)
