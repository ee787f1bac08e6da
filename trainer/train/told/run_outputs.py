"""What rank 0 shows and writes down of every step: the progress line, records, and where the time goes."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from trainer.config.schema import Config
from trainer.data.loader import StepBatches
from trainer.measure.card_peak import known_peak
from trainer.measure.progress import ProgressLine
from trainer.measure.run_times import Row, RunTimes
from trainer.measure.step_clock import PHASES
from trainer.measure.stragglers import Stragglers
from trainer.measure.telemetry import MetricsWriter, StepMetrics
from trainer.optim.optimizers import Rates
from trainer.optim.precision import precision_of
from trainer.train.build import Run
from trainer.train.saved.state import TrainState
from trainer.train.step import StepResult
from trainer.train.told.run_records import open_records
from trainer.train.told.step_messages import StepMessages

_log = logging.getLogger(__name__)
_SHOW_EVERY_S, _RECORD_EVERY_S, _TELL_EVERY_S = 3.0, 10.0, 600.0
_FEW = 60  # records at that rate; then one a minute
_FIRST_TOLD_S = 60.0
_EXCHANGES = {"ddp": "all-reduce"}


@dataclass
class TimesTold:
    """Where the time of a run goes: on the bar every few seconds, as a record every ten and later sixty, in the log.

    Attributes:
        flops_per_px: of an image's passes; None: not counted.
        peak_flops: what all cards together can do in a second; None: not known.
    """

    times: RunTimes
    stragglers: Stragglers
    flops_per_px: float | None = None
    peak_flops: float | None = None
    clock: Callable[[], float] = time.monotonic
    _steps: int = field(default=0, init=False)
    _images: float = field(default=0.0, init=False)
    _pixels: float = field(default=0.0, init=False)
    _records: int = field(default=0, init=False)
    _shown_s: float = field(default=0.0, init=False)
    _recorded_s: float = field(default=0.0, init=False)
    _told_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._shown_s = self._recorded_s = self.clock()
        self._told_s = self.clock() + _FIRST_TOLD_S - _TELL_EVERY_S

    @staticmethod
    def of(config: Config, run: Run, stragglers: Stragglers) -> "TimesTold":
        """A run's, on rank 0."""
        parts, device = run.parts, run.parts.comm.device
        exchange = _EXCHANGES.get(parts.strategy.sharing.kind, "exchange")
        times = RunTimes(PHASES, exchange, is_known=parts.exchange_is_timed)
        peak = None
        if device.type == "cuda":
            dtype = precision_of(config.train.precision).compute
            peak = known_peak(torch.cuda.get_device_name(device), dtype)
        return TimesTold(times, stragglers, run.flops_per_px, peak.flops_per_s * parts.comm.world if peak else None)

    def after_step(
        self, rows: Sequence[Row], images: float, pixels: float, step: int, metrics: MetricsWriter, *, done: bool
    ) -> str | None:
        """Take in a step.

        Args:
            rows: of the workers; none where several steps are told together, later.
            images, pixels: of the step, over all workers.
            done: it is the last.

        Returns:
            What the bar shall say is waited for, if it is time to say something else.
        """
        if self.times.is_warm:
            self._steps += 1
            self._images += images
            self._pixels += images * pixels
        if rows:
            self.times.note(rows)
        now_s, waiting = self.clock(), None
        if now_s - self._shown_s >= _SHOW_EVERY_S and (latest := self.times.latest()):
            self._shown_s = now_s
            waiting = self.times.waiting(latest)
            if now_s - self._told_s >= _TELL_EVERY_S:
                self._told_s = now_s
                _log.info("%s", self.times.told(latest))
        if done or now_s - self._recorded_s >= _RECORD_EVERY_S * (6 if self._records >= _FEW else 1):
            self._record(step, metrics, now_s)
        return waiting

    def _record(self, step: int, metrics: MetricsWriter, now_s: float) -> None:
        shares = self.times.take()
        if shares is None:
            return
        seconds = shares.period_s * self._steps
        found = self.times.record(shares) | {"images_per_s": self._images / seconds}
        if self.flops_per_px and self.peak_flops:
            found["mfu"] = self._pixels * self.flops_per_px / (self.peak_flops * seconds)
        if (slow := self.stragglers.slowest()) is not None:
            found |= {"straggler": slow[0], "straggler_score": slow[1]}
        metrics.write("phases", step, found)
        self._steps, self._images, self._pixels, self._recorded_s = 0, 0.0, 0.0, now_s
        self._records += 1


@dataclass(frozen=True)
class RunOutputs:
    """What rank 0 writes while the run goes on."""

    metrics: MetricsWriter
    progress: ProgressLine
    messages: StepMessages
    times: TimesTold
    log_every: int

    @staticmethod
    def open(
        stack: ExitStack, config: Config, run: Run, stragglers: Stragglers, step: int, total_steps: int
    ) -> "RunOutputs":
        """Of a run that goes on after `step`; closed with the stack."""
        metrics = stack.enter_context(open_records(config, None if run.state is None else step))
        progress = stack.enter_context(ProgressLine(total_steps, step))
        messages = StepMessages(config)
        stack.callback(messages.close)
        times = TimesTold.of(config, run, stragglers)
        return RunOutputs(metrics, progress, messages, times, config.log.every_steps)

    def record(
        self,
        state: TrainState,
        result: StepResult,
        rates: Rates,
        seconds: float,
        waited: float,
        epoch: float,
        bad_rows: int,
    ) -> None:
        """Show a step, and write it down if it is time to."""
        metrics = StepMetrics(
            step=state.step,
            epoch=epoch,
            loss=result.loss,
            lr=rates.first,
            grad_norm=result.grad_norm,
            images=round(result.num_images),
            images_seen=state.images_seen,
            data_wait_s=waited,
            step_s=seconds,
            bad_rows=bad_rows,
            block_norms=result.block_norms,
            part_lrs=rates.by_part,
            found_lr=rates.found,
        )
        self.progress.update(metrics)
        self.messages.after_step(state.step, result, bad_rows)
        self.metrics.seen(result.by_timestep)
        if state.step % self.log_every == 0:
            self.metrics.step(metrics)

    def record_times(
        self, rows: Sequence[Row], run: Run, batches: StepBatches, result: StepResult, step: int, *, done: bool
    ) -> None:
        """Show and write down where the time goes, if it is time to."""
        bucket = run.prepared.buckets("train")[batches.bucket]
        pixels = bucket.height_px * bucket.width_px
        waiting = self.times.after_step(rows, result.num_images, pixels, step, self.metrics, done=done)
        if waiting is not None:
            self.progress.waiting = waiting
