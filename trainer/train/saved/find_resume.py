"""Which checkpoint a run goes on from, by `run.resume` and by what its command has written before."""

import logging
import os
from pathlib import Path

from trainer.checkpoint.resume_point import resume_from, resume_newest
from trainer.checkpoint.roll_back import checkpoint_places, obey_roll_back
from trainer.checkpoint.run_dir import RESOLVED_CONFIG
from trainer.config.schema import Config
from trainer.disks.run_disks import disks_of
from trainer.memory.run_choice import memory_attempt
from trainer.parallel.comm import Comm, done_by_first
from trainer.parallel.worker import RESTARTS
from trainer.train.saved.resume_across_disks import resume_across_disks

_log = logging.getLogger(__name__)


def find_resume_point(config: Config, comm: Comm) -> Path | None:
    """The checkpoint to go on from, by `run.resume`; rank 0 looks, all workers agree.

    Where each host has a disk of its own, one worker of each looks. Workers that were started again, after a fault or
    because memory did not suffice, go on from what their command has written before.
    """
    disks = disks_of(comm, local=config.run.on_local_disks)
    if disks.count > 1:
        return resume_across_disks(disks, _places(config), config.run.resume)

    def find() -> str | None:
        obey_roll_back(_places(config), _log.warning)
        found, started = None, config.run.dir / RESOLVED_CONFIG
        if (memory_attempt() or os.environ.get(RESTARTS, "0") != "0") and started.is_file():
            found = resume_newest(config.run.dir, _log.warning, started, _stand_in(config))
        found = found or _wished_checkpoint(config)
        return str(found) if found else None

    # Reading a checkpoint of 40 GB to compare it takes minutes; so long the others do not wait in one exchange.
    agreed = done_by_first(comm, find)
    return Path(agreed) if agreed else None


def _wished_checkpoint(config: Config) -> Path | None:
    wish = config.run.resume
    if wish is False:
        return None
    if wish is True or wish == "auto":
        return resume_newest(config.run.dir, _log.warning, stand_in=_stand_in(config))
    return resume_from(config.run.dir, Path(wish), _log.warning)


def _places(config: Config) -> tuple[Path, ...]:
    return checkpoint_places(config.run.dir, config.checkpoint.fallback_dir)


def _stand_in(config: Config) -> Path | None:
    return next(iter(_places(config)[1:]), None)
