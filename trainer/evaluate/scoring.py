"""Validation loss and sample grids: what is done with a UNet now and then, in training and by `eval`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from trainer.config.schema import SamplesConfig, ValidationConfig
from trainer.config.sections.ema_config import LIVE
from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules, compose
from trainer.data.loader import Batch, BatchReader
from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import PreparedSet
from trainer.evaluate.pictures import GridRow, image_grid
from trainer.evaluate.sampling import decoded_images, sample_images
from trainer.evaluate.validating.scored_rows import Row, held_out_rows, training_rows
from trainer.evaluate.validating.validation_clock import ValidationClock
from trainer.evaluate.validating.validation_result import ValidationResult, record_values, told_loss
from trainer.evaluate.validation import ValidationLoss, validation_batches, validation_loss
from trainer.measure.telemetry import MetricsWriter
from trainer.model.denoiser import Denoiser
from trainer.model.latents import encoded_batches
from trainer.model.text import CaptionTokenizer, TextEncoders
from trainer.parallel.comm import Comm, broadcast_object, failing_together
from trainer.raster import open_image

_log = logging.getLogger(__name__)
_RESCALE = 0.7  # Lin et al. 2023, section 3.4
_WAYS = {"empty_text": "the empty text", "zeros": "zeros"}


@dataclass(frozen=True)
class Picture:
    """One image to draw: its prompt and size, and the prepared image it is to be compared with, if any."""

    prompt: str
    bucket: Bucket
    latents: np.ndarray | None  # [4, h, w] float16, unscaled
    pixels: np.ndarray | None = None  # [3, H, W] uint8, where the data are images


@dataclass(frozen=True)
class Scorer:
    """Scores `denoiser` on the run's data; what only this needs is loaded when first used.

    Attributes:
        captions: the run's rules without what is random in them.
        seed: of the run.
        images_per_pass: of validation, on each worker.
        resolution_px: side of a sample of which nothing else is said.
        folder: where samples of the run go.
        cached_text: the prepared data hold what the text encoders give.
        masked: the loss is masked.
        weights: what `score_when_due` looks at, by name, each with what puts it into the model for forward passes that
            workers run each by itself.
        failures: what could not be done beside the training, so far.
        clock: of what validation costs.
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
    cached_text: bool
    masked: bool
    load_tokenizer: Callable[[], CaptionTokenizer]
    load_text_encoders: Callable[[], TextEncoders]
    load_vae: Callable[[], AutoencoderKL]
    weights: Mapping[str, Callable[[], AbstractContextManager[None]]]
    failures: list[str] = field(default_factory=list)
    clock: ValidationClock = field(default_factory=ValidationClock)

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
        training = None
        if held_out.images and self._scores_training(step, spent.seconds):
            with self.clock.validating() as more:
                training = self.validate_training()
            spent.seconds += more.seconds
        result = ValidationResult(self.validation.timesteps, held_out, training)
        _log.info("step %d  %s, %.1f s", step, told_loss(result, "" if name == LIVE else f" of {name}"), spent.seconds)
        if metrics:
            values = {**record_values(result), "seconds": spent.seconds}
            metrics.validation(step, held_out.loss, held_out.at_timestep, "" if name == LIVE else name, values)

    def _scores_training(self, step: int, seconds: float) -> bool:
        """Whether images that are trained on are scored, on each worker alike; held-out ones have taken `seconds`.

        Before the first step always, for that is what later gaps are compared with.
        """
        settings = self.validation
        if settings.train_images != "auto":
            return settings.train_images > 0
        if self.clock.affords is None:
            share = self.clock.share(2 * seconds * len(self.weights), settings.every_steps)
            affords = step == 0 or share is None or share <= settings.max_time_share
            self.clock.affords = broadcast_object(self.comm, affords)
            told = "" if self.clock.affords else self.clock.left_out(share, settings.max_time_share)
            if told and self.comm.rank == 0:
                _log.warning("step %d: %s", step, told)
        return bool(self.clock.affords)

    def _draw_at(self, step: int, name: str) -> None:
        of = "" if name == LIVE else f" of {name}"
        folder = self.folder / (f"step-{step:08d}" + (f"-{name}" if of else ""))
        _log.info("step %d  samples%s: %s", step, of, self.draw(folder, f"step {step:,}{of}"))

    def validate(self) -> ValidationLoss:
        """The loss on the held-out images; every worker takes its share.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        return self._loss_on("validation", held_out_rows(self.prepared, self.validation.max_images))

    def validate_training(self) -> ValidationLoss:
        """The loss on images that are trained on, as held-out ones are scored; as many of them, or as the
        configuration says.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        return self._loss_on("train", self._training_rows)

    def validate_fully(self) -> ValidationResult:
        """Both, the latter unless `validation.train_images` is 0.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        held_out = self.validate()
        training = self.validate_training() if self.validation.train_images and held_out.images else None
        return ValidationResult(self.validation.timesteps, held_out, training)

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

    def draw(self, folder: Path, title: str) -> Path:
        """Draw one image per prompt into `folder`, and all of them beside the data into `folder`.png.

        Every worker draws its share. Returns the path of the grid.

        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        grid = folder.with_suffix(".png")
        with failing_together(self.comm):
            pictures = self._pictures()
            self._draw_share(pictures, folder)
        with failing_together(self.comm):
            if self.comm.rank == 0:
                self._draw_grid(pictures, folder, grid, title)
        return grid

    @property
    def _ways(self) -> tuple[str, ...]:
        wish = self.samples.unconditional
        return ("empty_text", "zeros") if wish == "both" else (wish,)

    def _draw_share(self, pictures: Sequence[Picture], folder: Path) -> None:
        """This worker's images."""
        comm, settings, ways, vae = self.comm, self.samples, self._ways, self._vae()
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(comm.rank, len(pictures) * len(ways), comm.world):
            index, way = number % len(pictures), ways[number // len(pictures)]
            picture = pictures[index]
            (image,) = sample_images(
                unet=self.denoiser.unet,
                vae=vae,
                text_encoders=self._text_encoders,
                tokenizer=self._tokenizer,
                prompts=[picture.prompt],
                negative_prompt=settings.negative_prompt,
                width_px=picture.bucket.width_px,
                height_px=picture.bucket.height_px,
                num_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                seeds=[settings.seed + index],
                device=comm.device,
                prediction=self.denoiser.objective.prediction,
                scaling_factor=self.denoiser.scaling_factor,
                latent_shift=self.denoiser.latent_shift,
                guidance_rescale=self._guidance_rescale,
                zeros_for_no_text=way == "zeros",
                input_dtype=self.denoiser.input_dtype,
                autocast_dtype=self.denoiser.autocast_dtype,
            )
            image.save(folder / _image_name(index, way, ways))

    def _draw_grid(self, pictures: Sequence[Picture], folder: Path, grid: Path, title: str) -> None:
        """All images, below each other by what they are guided away from, above the data."""
        prompts, rows, ways = [picture.prompt for picture in pictures], [], self._ways
        for way in ways:
            drawn = [_read_image(folder / _image_name(index, way, ways)) for index in range(len(pictures))]
            against = f", guided away from {_WAYS[way]}" if len(ways) > 1 else ""
            rows.append(GridRow(f"generated{against}", drawn, prompts))
        data = [torch.from_numpy(picture.latents)[None] for picture in pictures if picture.latents is not None]
        if data:
            vae = self._vae()
            rows.append(GridRow("data, through the VAE", [decoded_images(vae, latents)[0] for latents in data]))
        photos = [Image.fromarray(p.pixels.transpose(1, 2, 0)) for p in pictures if p.pixels is not None]
        if photos:
            rows.append(GridRow("data", photos))
        image_grid(rows, grid, title)

    @property
    def _guidance_rescale(self) -> float:
        wish = self.samples.guidance_rescale
        if wish == "auto":
            return _RESCALE if self.denoiser.objective.prediction.zero_terminal_snr else 0.0
        return wish

    def _vae(self) -> AutoencoderKL:
        if self.denoiser.image_encoder:
            return self.denoiser.image_encoder.vae
        return self.load_vae()

    def _pictures(self) -> list[Picture]:
        settings, side = self.samples, self.resolution_px
        if settings.prompts:
            bucket = Bucket(settings.height_px or side, settings.width_px or side)
            return [Picture(prompt, bucket, None) for prompt in settings.prompts]
        pictures = []
        buckets = self.prepared.buckets("train")
        for bucket_index, row in pick_rows(self.prepared.rows_per_bucket("train"), settings.count):
            rows = self.prepared.read("train", bucket_index, np.array([row]))
            of_row = buckets[bucket_index]
            bucket = Bucket(settings.height_px or of_row.height_px, settings.width_px or of_row.width_px)
            if rows.ok[0]:
                latents, pixels = (None if stack is None else stack[0] for stack in (rows.latents, rows.pixels))
                pictures.append(Picture(compose(rows.captions[0], self.captions, 0, 0), bucket, latents, pixels))
        return pictures


def _with_warnings(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, telling what could not be read of them."""
    for batch in batches:
        for problem in batch.problems:
            _log.warning("validation leaves out %s", problem)
        yield batch


def _image_name(index: int, way: str, ways: Sequence[str]) -> str:
    return f"{index:02d}{f'-{way}' if len(ways) > 1 else ''}.png"


def _read_image(path: Path) -> Image.Image:
    with open_image(path) as image:
        return image.convert("RGB")
