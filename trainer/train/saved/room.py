"""Whether a run's disk has room for the checkpoints that it is going to keep."""

import math
import os

from trainer.checkpoint.run_dir import list_checkpoints
from trainer.config.schema import Config
from trainer.config.values import seconds_of
from trainer.host.disk_room import require_room
from trainer.parallel.worker import RESTARTS
from trainer.train.saved.checkpoint_contents import checkpoint_files
from trainer.train.step import StepParts


def require_checkpoint_room(config: Config, parts: StepParts, step: int, total_steps: int) -> None:
    """Refuse a run whose checkpoints find no room, before the first step is taken; on rank 0.

    A run that is under way goes on, also if its workers were started again: each save sees for itself.

    Raises:
        UserError: the disk is too full.
    """
    if os.environ.get(RESTARTS, "0") != "0":
        return
    places = [config.run.dir, *([config.checkpoint.fallback_dir] if config.checkpoint.fallback_dir else [])]
    to_write = _to_write(config, total_steps - step)
    require_room(
        places, checkpoint_bytes(parts), len(list_checkpoints(config.run.dir)), config.checkpoint.keep, to_write
    )


def checkpoint_bytes(parts: StepParts) -> int:
    """The size of the tensors of one checkpoint, over all workers."""
    tensors = [tensor for file in checkpoint_files(parts) for tensor in file.tensors.values()]
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)


def _to_write(config: Config, steps_left: int) -> int:
    """Checkpoints until the end, at most; by time, one each step."""
    wish = config.checkpoint
    if steps_left <= 0 or seconds_of(wish.every) is not None:
        return max(0, steps_left)
    return 1 + sum(steps_left // every for every in (wish.every_steps, wish.keep_every_steps) if every)
