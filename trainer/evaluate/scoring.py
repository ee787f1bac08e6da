"""Validation loss and sample grids: what is done with a UNet now and then, in training and by `eval`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from trainer.config.schema import ValidationConfig
from trainer.config.sections.ema_config import LIVE
from trainer.config.sections.samples_config import SamplesConfig
from trainer.data.captions import CaptionRules
from trainer.data.loader import Batch, BatchReader
from trainer.data.store.snapshot import PreparedSet
from trainer.disks.run_disks import Disks, one_disk
from trainer.evaluate.drawing.draw import Drawer
from trainer.evaluate.drawing.places import folder_at
from trainer.evaluate.validating.scored_rows import Row, held_out_rows, rows_elsewhere, training_rows
from trainer.evaluate.validating.validation_clock import ValidationClock
from trainer.evaluate.validating.validation_result import ValidationResult, record_values, told_loss
from trainer.evaluate.validation import ValidationLoss, validation_batches, validation_loss
from trainer.measure.telemetry import MetricsWriter
from trainer.model.denoiser import Denoiser
from trainer.model.latents import encoded_batches
from trainer.model.text import CaptionTokenizer, TextEncoders
from trainer.parallel.comm import Comm, broadcast_object, failing_together

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scorer:
    """Scores `denoiser` on the run's data; what only this needs is loaded when first used.

    Attributes:
        captions: the run's rules without what is random in them.
        seed: of the run.
        images_per_pass: of validation, on each worker.
        resolution_px: side of a sample of which nothing else is said.
        folder: where samples of the run go.
        run_name: stands in what their files say of how they were drawn.
        cached_text: the prepared data hold what the text encoders give.
        masked: the loss is masked.
        weights: what `score_when_due` looks at, by name, each with what puts it into the model for forward passes that
            workers run each by itself.
        failures: what could not be done beside the training, so far.
        clock: of what validation costs.
        disks: of the run; None: there is one.
    """

    comm: Comm
    denoiser: Denoiser
    prepared: PreparedSet
    validation: ValidationConfig
    samples: SamplesConfig
    captions: CaptionRules
    seed: int
    images_per_pass: int
    resolution_px: int
    folder: Path
    run_name: str
    cached_text: bool
    masked: bool
    load_tokenizer: Callable[[], CaptionTokenizer]
    load_text_encoders: Callable[[], TextEncoders]
    load_vae: Callable[[], AutoencoderKL]
    weights: Mapping[str, Callable[[], AbstractContextManager[None]]]
    failures: list[str] = field(default_factory=list)
    clock: ValidationClock = field(default_factory=ValidationClock)
    disks: Disks | None = None

    @cached_property
    def _tokenizer(self) -> CaptionTokenizer:
        return self.load_tokenizer()

    @cached_property
    def _text_encoders(self) -> TextEncoders:
        return self.denoiser.text_encoders or self.load_text_encoders()

    def due(self, step: int, *, at_end: bool) -> tuple[str, ...]:
        """What `validation.every_steps` and `samples.every_steps` ask for at this step: `validation`, `samples`."""
        found, every = list[str](), self.validation.every_steps
        if every and (at_end or step % every == 0):
            found.append("validation")
        every = self.samples.every_steps
        if every and step and (at_end or step % every == 0):
            found.append("samples")
        return tuple(found)

    def score_when_due(self, step: int, metrics: MetricsWriter | None, *, at_end: bool) -> None:
        """Do what is `due`; nothing that fails there ends the run."""
        due = self.due(step, at_end=at_end)
        validates, draws = "validation" in due, "samples" in due
        self.clock.step_ends(validates=validates)
        for name, in_model in self.weights.items() if validates or draws else ():
            with in_model():
                if validates:
                    self._beside_training(step, "validation", partial(self._validate_at, step, name, metrics))
                if draws:
                    self._beside_training(step, "samples", partial(self._draw_at, step, name))
        if validates and self.comm.rank == 0:
            told = self.clock.too_much(self.validation.every_steps, self.validation.max_time_share)
            if told:
                _log.warning("step %d: %s", step, told)
        self.clock.step_begins()

    def _beside_training(self, step: int, what: str, work: Callable[[], None]) -> None:
        """Nothing that fails here ends the run; all workers come through, for `validate` and `draw` fail on all."""
        try:
            work()
        except Exception as error:
            self.failures.append(what)
            reason = " ".join(str(error).split()) or type(error).__name__
            again = f", {self.failures.count(what)} times by now" if self.failures.count(what) > 1 else ""
            _log.warning(
                "step %d: no %s (%s)%s; training goes on, the next are tried as usual", step, what, reason, again
            )

    def _validate_at(self, step: int, name: str, metrics: MetricsWriter | None) -> None:
        with self.clock.validating() as spent:
            held_out = self.validate()
        of_main = spent.seconds
        with self.clock.validating() as more:
            further = self.validate_elsewhere()
        spent.seconds += more.seconds
        training = None
        if held_out.images and self._scores_training(step, spent.seconds + of_main):
            with self.clock.validating() as more:
                training = self.validate_training()
            spent.seconds += more.seconds
        result = ValidationResult(self.validation.timesteps, held_out, training, further)
        _log.info("step %d  %s, %.1f s", step, told_loss(result, "" if name == LIVE else f" of {name}"), spent.seconds)
        if metrics:
            values = {**record_values(result), "seconds": spent.seconds}
            metrics.validation(step, held_out.loss, held_out.at_timestep, "" if name == LIVE else name, values)

    def _scores_training(self, step: int, seconds: float) -> bool:
        """Whether images that are trained on are scored, on each worker alike; with held-out ones it takes `seconds`.

        Before the first step always, for that is what later gaps are compared with.
        """
        settings = self.validation
        if settings.train_images != "auto":
            return settings.train_images > 0
        if self.clock.affords is None:
            share = self.clock.share(seconds * len(self.weights), settings.every_steps)
            affords = step == 0 or share is None or share <= settings.max_time_share
            self.clock.affords = broadcast_object(self.comm, affords)
            told = "" if self.clock.affords else self.clock.left_out(share, settings.max_time_share)
            if told and self.comm.rank == 0:
                _log.warning("step %d: %s", step, told)
        return bool(self.clock.affords)

    def _draw_at(self, step: int, name: str) -> None:
        of = "" if name == LIVE else f" of {name}"
        folder = folder_at(self.folder, step, name if of else "")
        _log.info("step %d  samples%s: %s", step, of, self.draw(folder, folder.name))

    def validate(self) -> ValidationLoss:
        """The loss on the held-out images; every worker takes its share.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        return self._loss_on("validation", held_out_rows(self.prepared, self.validation.max_images))

    def validate_elsewhere(self) -> dict[int, ValidationLoss]:
        """The loss on the same images, with noise by the same keys, at each further resolution at which they are held.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        rows = rows_elsewhere(self.prepared, held_out_rows(self.prepared, self.validation.max_images))
        return {resolution: self._loss_on("validation", there) for resolution, there in rows.items()}

    def validate_training(self) -> ValidationLoss:
        """The loss on images that are trained on, as held-out ones are scored; as many of them, or as the
        configuration says.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        return self._loss_on("train", self._training_rows)

    def validate_fully(self) -> ValidationResult:
        """All three, the last unless `validation.train_images` is 0.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        held_out, further = self.validate(), self.validate_elsewhere()
        training = self.validate_training() if self.validation.train_images and held_out.images else None
        return ValidationResult(self.validation.timesteps, held_out, training, further)

    @cached_property
    def _training_rows(self) -> Sequence[Row]:
        """Chosen by rank 0 for all, who might fail to read another record."""
        wish, rows = self.validation.train_images, []
        with failing_together(self.comm):
            if self.comm.rank == 0:
                held_out = len(held_out_rows(self.prepared, self.validation.max_images))
                rows = training_rows(self.prepared, held_out if wish == "auto" else wish)
        return [(bucket, row) for bucket, row in broadcast_object(self.comm, rows)]

    def _loss_on(self, split: str, rows: Sequence[Row]) -> ValidationLoss:
        tokenizer = None if self.cached_text else self._tokenizer
        reader = BatchReader(self.prepared, split, self.seed, tokenizer, captions=self.captions, with_masks=self.masked)
        batches = validation_batches(reader, rows, self.images_per_pass, self.comm)
        encoded = encoded_batches(self.denoiser.image_encoder, batches)
        return validation_loss(self.denoiser, _with_warnings(encoded), self.validation.timesteps, self.comm)

    def draw(self, folder: Path, weights: str, *, keep_older: bool = False) -> Path:
        """Draw as `Drawer.draw` does, every worker its share; returns the path of the sheet.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        drawer = Drawer(
            comm=self.comm,
            disks=self.disks or one_disk(self.comm),
            denoiser=self.denoiser,
            prepared=self.prepared,
            samples=self.samples,
            captions=self.captions,
            resolution_px=self.resolution_px,
            run_name=self.run_name,
            tokenizer=lambda: self._tokenizer,
            text_encoders=lambda: self._text_encoders,
            load_vae=self.load_vae,
        )
        return drawer.draw(folder, weights, keep_older=keep_older)


def _with_warnings(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, telling what could not be read of them."""
    for batch in batches:
        for problem in batch.problems:
            _log.warning("validation leaves out %s", problem)
        yield batch
