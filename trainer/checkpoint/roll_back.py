"""Going back to an earlier checkpoint: ordered by a run that ends, done by the start after it. Free of torch.

The order is a file in the run directory, so that it does not matter who starts the workers again: this command, a later
one, torchrun or SLURM. Nothing is deleted: later checkpoints are moved to `checkpoints/rolled-back-DATE/`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.checkpoint.manifest import find_damage
from trainer.checkpoint.resume_point import move_aside
from trainer.checkpoint.run_dir import checkpoint_step, fallback_run_dir, list_checkpoints
from trainer.errors import UserError
from trainer.model_files.tensor_file import sync_to_disk

ORDER = "roll_back.json"


def checkpoint_places(run_dir: Path, fallback_dir: Path | None) -> tuple[Path, ...]:
    """The run directory, and its stand-in on another disk if there may be one."""
    return (run_dir, fallback_run_dir(fallback_dir, run_dir)) if fallback_dir else (run_dir,)


def newest_up_to(places: Sequence[Path], step: int) -> Path | None:
    """The newest checkpoint of this step or an earlier one that has all its files in their sizes."""
    found = [path for place in places for path in list_checkpoints(place) if checkpoint_step(path) <= step]
    found.sort(key=checkpoint_step, reverse=True)
    return next((path for path in found if find_damage(path, contents=False) is None), None)


def order_roll_back(run_dir: Path, last_step: int) -> None:
    """Have the next start go on from a checkpoint of this step or an earlier one.

    Raises:
        OSError: the order cannot be written.
    """
    write_record(run_dir / ORDER, {"last_step": last_step})


def obey_roll_back(places: Sequence[Path], log: Callable[[str], None]) -> None:
    """Do what was ordered, if anything was; of those who start the run, the one that chooses its checkpoint calls it.

    Args:
        places: where its checkpoints are, the run directory first.

    Raises:
        UserError: the order cannot be read.
    """
    if (last_step := ordered_step(places[0])) is None:
        return
    go_back_to(places, last_step, log)
    (places[0] / ORDER).unlink()


def ordered_step(run_dir: Path) -> int | None:
    """The step from which the next start goes on at the latest, if that was ordered.

    Raises:
        UserError: the order cannot be read.
    """
    order = run_dir / ORDER
    if not order.exists():
        return None
    try:
        return int(json.loads(order.read_text())["last_step"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{order}: not what was written; delete it to go on from the newest checkpoint") from None


def go_back_to(places: Sequence[Path], last_step: int, log: Callable[[str], None]) -> None:
    """Move the checkpoints of later steps; `places` as in `obey_roll_back`."""
    for place in places:
        later = [path for path in list_checkpoints(place) if checkpoint_step(path) > last_step]
        if later:
            aside, moved = move_aside(place, later, "rolled-back")
            log(f"{moved}: the run goes back to before step {last_step + 1}; moved to {aside}")


def write_record(path: Path, record: object) -> None:
    """JSON that is there as a whole or not at all, also after a power cut."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(record) + "\n")
    sync_to_disk(partial)
    partial.replace(path)
    sync_to_disk(path.parent)
