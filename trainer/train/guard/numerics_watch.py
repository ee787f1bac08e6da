"""What a run does about steps that its guard skips: writes them down, goes back after three in a row, or ends."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.checkpoint.roll_back import checkpoint_places, newest_up_to, order_roll_back
from trainer.checkpoint.run_dir import read_state
from trainer.config.schema import Config
from trainer.data.left_out import stretch_before
from trainer.data.sampler import RowsOfEpoch
from trainer.errors import NumbersGoneWrong, UserError
from trainer.parallel.comm import Comm, broadcast_object
from trainer.train.guard.left_out_record import LEFT_OUT, LeftOutRecord, PastFault, merged, read_left_out
from trainer.train.guard.numerics_guard import IN_A_ROW, GuardRules, Judge
from trainer.train.guard.skipped_steps import SKIPPED_FILE, record_skipped_step
from trainer.train.saved.state import TrainState
from trainer.train.step import StepResult

_log = logging.getLogger(__name__)
_MOST_OVERFLOWS = 30  # in a row; fp16 begins with a few


@dataclass
class NumericsWatch:
    """One worker's.

    Attributes:
        places: where checkpoints are, the run directory first.
        begin: where this start of the run began.
        overflows: steps in a row that fp16 could not hold.
    """

    rules: GuardRules
    rolls_back: bool
    places: Sequence[Path]
    comm: Comm
    begin: TrainState
    overflows: int = 0

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.places[0]

    @staticmethod
    def of(config: Config, comm: Comm, begin: TrainState) -> "NumericsWatch":
        """The run's."""
        places = checkpoint_places(config.run.dir, config.checkpoint.fallback_dir)
        return NumericsWatch(rules_of(config), config.guard.rollback, places, comm, begin)

    def judge(self, state: TrainState) -> Judge:
        """Of the step that follows `state`."""
        return partial(state.guard.judge, self.rules)

    def react(self, state: TrainState, result: StepResult, rows_of: RowsOfEpoch, settle: Callable[[], None]) -> None:
        """After a step, on all workers; `state` is the one with it.

        Args:
            settle: waits for a save that is under way, before the run ends.

        Raises:
            NumbersGoneWrong: it was the third in a row, and the next start goes back.
            UserError: going back has not helped, or is not wished; or fp16 finds no loss scale.
        """
        verdict = result.verdict
        if not verdict.reason:
            self.overflows = 0
            return
        if not verdict.is_fault:
            self._note_overflow()
            return
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm}
        limits = {"loss_limit": verdict.loss_limit, "grad_norm_limit": verdict.norm_limit}
        record_skipped_step(self.run_dir, state.step, self.comm.rank, verdict.reason, numbers | limits, result.keys)
        if self.comm.rank == 0:
            _log.warning("step %d is skipped: %s; its images are in %s", state.step, verdict.reason, SKIPPED_FILE)
        if state.guard.in_a_row >= IN_A_ROW:
            settle()
            self._end(state, verdict.reason, rows_of)

    def _note_overflow(self) -> None:
        _log.warning("the gradients are not finite; this step changes nothing")
        self.overflows += 1
        if self.overflows == _MOST_OVERFLOWS:
            raise UserError(
                f"the gradients of {_MOST_OVERFLOWS} steps in a row were not finite in fp16, with ever smaller loss "
                "scales: the run has diverged; go on from an earlier checkpoint with a lower optimizer.lr, or with "
                "train.precision=bf16"
            )

    def _end(self, state: TrainState, reason: str, rows_of: RowsOfEpoch) -> None:
        """All workers together, with the words of rank 0, which looks at the disk."""
        told = self._go_back(state, reason, rows_of) if self.comm.rank == 0 else None
        goes_back, text = broadcast_object(self.comm, told)
        raise NumbersGoneWrong(text) if goes_back else UserError(text)

    def _go_back(self, state: TrainState, reason: str, rows_of: RowsOfEpoch) -> tuple[bool, str]:
        """Order the roll-back, if there is to be one; and what is said."""
        what = f"{IN_A_ROW} steps in a row were skipped, the last of them step {state.step} ({reason})"
        mend = (
            f"{self.run_dir / SKIPPED_FILE} has their images; go on from an earlier checkpoint with a lower "
            "optimizer.lr, or with guard.spike_sigma=0 if such losses are as they should be"
        )
        if not self.rolls_back:
            return False, f"{what}; {mend}"
        try:
            record = read_left_out(self.run_dir)
            if record.faults and state.guard.sound_step < record.faults[-1].place + self.rules.window:
                return False, f"{what}, and going back {_times(record)} has not helped; {mend}"
            goal, steps = self._leave_out(state, record, rows_of)
            order_roll_back(self.run_dir, state.guard.sound_step)
        except OSError as error:
            return False, f"{what}, and {error.filename or self.run_dir} cannot be written: {error.strerror}; {mend}"
        data = f", without the data of the {steps} steps that ended with it ({LEFT_OUT})" if steps else ""
        return True, f"{what}; the next start goes on from {goal}{data}"

    def _leave_out(self, state: TrainState, record: LeftOutRecord, rows_of: RowsOfEpoch) -> tuple[str, int]:
        """Write down the data between the checkpoint and here; the checkpoint in words, and how many steps it was."""
        checkpoint = newest_up_to(self.places, state.guard.sound_step)
        start = TrainState.from_json(read_state(checkpoint), checkpoint) if checkpoint else self.begin
        steps = min(self.rules.window, state.step - start.step)
        stretches = []
        if start.snapshot == state.snapshot:
            begin, end = start.position, state.position
            stretches = stretch_before(rows_of, state.seed, end, begin, steps, state.snapshot)
        fault = PastFault(state.step, state.step - steps)
        LeftOutRecord(merged(merged(record.stretches, state.left_out), stretches), (*record.faults, fault)).write(
            self.run_dir
        )
        return checkpoint.name if checkpoint else "where this one began", steps if stretches else 0


def _times(record: LeftOutRecord) -> str:
    return "once" if len(record.faults) == 1 else f"{len(record.faults)} times"


def rules_of(config: Config) -> GuardRules:
    """How the run's steps are judged."""
    return GuardRules(config.guard.spike_sigma, config.guard.window, config.train.precision == "fp16")
