"""Validation loss and sample grids: what is done with a UNet now and then, in training and by `eval`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from trainer.evaluate.drawing.draw import Drawer
from trainer.evaluate.drawing.places import folder_at
from trainer.evaluate.validation import ValidationLoss, validation_batches, validation_loss
from trainer.measure.telemetry import MetricsWriter
from trainer.model.denoiser import Denoiser
from trainer.model.latents import encoded_batches
from trainer.model.text import CaptionTokenizer, TextEncoders
from trainer.parallel.comm import Comm

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
        for name, in_model in self.weights.items() if validates or draws else ():
            with in_model():
                if validates:
                    self._beside_training(step, "validation", partial(self._validate_at, step, name, metrics))
                if draws:
                    self._beside_training(step, "samples", partial(self._draw_at, step, name))

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
        result, of = self.validate(), "" if name == LIVE else f" of {name}"
        _log.info("step %d  validation loss%s %.4f (%d images)", step, of, result.loss, result.num_images)
        if metrics:
            metrics.validation(step, result.loss, result.at_timestep, "" if name == LIVE else name)

    def _draw_at(self, step: int, name: str) -> None:
        of = "" if name == LIVE else f" of {name}"
        folder = folder_at(self.folder, step, name if of else "")
        _log.info("step %d  samples%s: %s", step, of, self.draw(folder, folder.name))

    def validate(self) -> ValidationLoss:
        """The loss on the held-out images; every worker takes its share.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        tokenizer, settings = None if self.cached_text else self._tokenizer, self.validation
        reader = BatchReader(
            self.prepared, "validation", self.seed, tokenizer, captions=self.captions, with_masks=self.masked
        )
        batches = validation_batches(reader, settings.max_images, self.images_per_pass, self.comm)
        encoded = encoded_batches(self.denoiser.image_encoder, batches)
        return validation_loss(self.denoiser, _with_warnings(encoded), settings.timesteps, self.comm)

    def draw(self, folder: Path, weights: str, *, keep_older: bool = False) -> Path:
        """Draw as `Drawer.draw` does, every worker its share; returns the path of the sheet.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        drawer = Drawer(
            comm=self.comm,
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
