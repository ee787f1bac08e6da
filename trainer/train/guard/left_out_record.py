"""`left_out.json` in the run directory: what data the run goes past, and which faults led to that."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.checkpoint.roll_back import write_record
from trainer.data.left_out import Stretch
from trainer.errors import UserError
from trainer.parallel.comm import Comm, broadcast_object

LEFT_OUT = "left_out.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PastFault:
    """Steps in a row that were skipped.

    Attributes:
        step: of the run, when the last of them was.
        place: step that the run has reached when it comes to what was left out for it.
    """

    step: int
    place: int


@dataclass(frozen=True)
class LeftOutRecord:
    """All of the file."""

    stretches: tuple[Stretch, ...] = ()
    faults: tuple[PastFault, ...] = ()

    def write(self, run_dir: Path) -> None:
        """Raises OSError where the disk is full."""
        stretches, faults = [part.to_json() for part in self.stretches], [asdict(fault) for fault in self.faults]
        write_record(run_dir / LEFT_OUT, {"left_out": stretches, "faults": faults})


def read_left_out(run_dir: Path) -> LeftOutRecord:
    """What is recorded; nothing where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    file = run_dir / LEFT_OUT
    if not file.exists():
        return LeftOutRecord()
    try:
        record = json.loads(file.read_text())
        stretches = tuple(Stretch.from_json(part) for part in record["left_out"])
        return LeftOutRecord(stretches, tuple(PastFault(**fault) for fault in record["faults"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not what was written; delete it to leave no data out") from None


def agreed_left_out(run_dir: Path, comm: Comm) -> tuple[Stretch, ...]:
    """As rank 0 finds it, on all workers."""
    found = [part.to_json() for part in read_left_out(run_dir).stretches] if comm.rank == 0 else None
    if found:
        _log.info("the run goes past the data of %s, because of its numbers there", run_dir / LEFT_OUT)
    return tuple(Stretch.from_json(part) for part in broadcast_object(comm, found))


def merged(one: Sequence[Stretch], other: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """Each stretch once."""
    return tuple(dict.fromkeys([*one, *other]))
