"""What rank 0 has to say to whoever is away: skipped steps, images that cannot be read, samples."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.sections.notify_config import Event
from trainer.notify.messenger import Messenger
from trainer.train.bad_rows import BAD_FILE
from trainer.train.guard.skipped_steps import SKIPPED_FILE
from trainer.train.step import StepResult

_log = logging.getLogger(__name__)
_SELDOM_S = 3600.0  # of what may happen in every step


class StepMessages(Messenger):
    """Of one start of a run."""

    END_S = 10.0

    def __init__(self, config: Config) -> None:
        run_dir = config.run.dir.absolute()
        super().__init__(config.notify, config.log.name or run_dir.name, _log.warning)
        self._told_s: dict[Event, float] = {}

    def after_step(self, step: int, result: StepResult, bad_rows: int) -> None:
        """Tell what was wrong with a step, once an hour at most; `bad_rows`: of all steps so far."""
        if result.verdict.is_fault:
            self._seldom("nan", f"step {step} is skipped: {result.verdict.reason}; see {SKIPPED_FILE}", step)
        if result.bad_rows:
            self._seldom("bad_data", f"{bad_rows} rows could not be read by now; see {BAD_FILE}", step)

    def drawn(self, step: int, grids: Iterable[Path]) -> None:
        """Tell of samples, which of these pictures are there."""
        if found := [str(grid) for grid in grids if grid.is_file()]:
            self.tell(("samples",), f"step {step}: samples in {', '.join(found)}", step)

    def _seldom(self, event: Event, text: str, step: int) -> None:
        now = time.monotonic()
        if now - self._told_s.get(event, -_SELDOM_S) >= _SELDOM_S:
            self._told_s[event] = now
            self.tell((event,), text, step)
