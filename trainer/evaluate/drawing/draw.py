"""Drawing with a set of weights: every worker its share of the images, then one sheet of all, beside the data."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from trainer.config.sections.samples_config import SamplesConfig
from trainer.data.captions import CaptionRules
from trainer.data.store.snapshot import PreparedSet
from trainer.disks.carry import collect_files
from trainer.disks.run_disks import Disks
from trainer.evaluate.drawing.infotext import infotext, png_text, sampler_title, schedule_title
from trainer.evaluate.drawing.places import begin_drawing, fresh_folder, partial_of, publish_drawing, sheet_of
from trainer.evaluate.drawing.wanted_pictures import Picture, dealt_out, wanted_pictures
from trainer.evaluate.pictures import GridRow, image_grid, read_small
from trainer.evaluate.sampling import decoded_images, sample_images
from trainer.model.denoiser import Denoiser
from trainer.model.text import CaptionTokenizer, TextEncoders
from trainer.parallel.comm import Comm, broadcast_object, failing_together

_log = logging.getLogger(__name__)
_RESCALE = 0.7  # Lin et al. 2023, section 3.4
_WAYS = {"empty_text": "the empty text", "zeros": "zeros"}


@dataclass(frozen=True)
class Drawer:
    """Draws with `denoiser`; text encoders, VAE and tokenizers are loaded when they are first needed.

    Attributes:
        captions: the run's rules without what is random in them.
        resolution_px: side of an image of which nothing else is said.
        run_name: stands before the name of the weights in the images' texts.
        disks: those of the folders into which is drawn; the images end on the first.
    """

    comm: Comm
    disks: Disks
    denoiser: Denoiser
    prepared: PreparedSet
    samples: SamplesConfig
    captions: CaptionRules
    resolution_px: int
    run_name: str
    tokenizer: Callable[[], CaptionTokenizer]
    text_encoders: Callable[[], TextEncoders]
    load_vae: Callable[[], AutoencoderKL]

    def draw(self, folder: Path, weights: str, *, keep_older: bool = False) -> Path:
        """Draw every image into `folder`, and all of them beside the data on a sheet next to it.

        Every worker draws its share; none waits for another before its own images are done, and what they say to one
        another goes over the host's network alone.

        Args:
            weights: what draws, such as `step-00000120-ema`.
            keep_older: where a drawing is already, a folder of another name is taken; else it is replaced.
        Returns:
            The path of the sheet.
        Raises:
            FailedBeside: (on every worker) one of them could not.
        """
        with failing_together(self.comm):
            if self.comm.rank == 0:
                folder = fresh_folder(folder) if keep_older else folder
            if self.disks.is_first:
                begin_drawing(folder)
        if keep_older:
            folder = Path(broadcast_object(self.comm, str(folder)))
        with failing_together(self.comm):
            pictures = wanted_pictures(self.samples, self.resolution_px, self.prepared, self.captions)
            drawn = self._draw_share(pictures, partial_of(folder), weights)
        with failing_together(self.comm):
            collect_files(self.disks, partial_of(folder), drawn)
        with failing_together(self.comm):
            if self.disks.is_first and self.comm.rank:
                shutil.rmtree(partial_of(folder), ignore_errors=True)
            if self.comm.rank == 0:
                publish_drawing(folder)
                self._tell_cut_prompts(pictures)
                self._draw_sheet(pictures, folder, weights)
        return sheet_of(folder)

    @property
    def _ways(self) -> tuple[str, ...]:
        wish = self.samples.unconditional
        return ("empty_text", "zeros") if wish == "both" else (wish,)

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

    def _draw_share(self, pictures: Sequence[Picture], folder: Path, weights: str) -> list[str]:
        """This worker's images; returns their names."""
        ways = self._ways
        drawn_by = dealt_out([picture.cost for _ in ways for picture in pictures], self.comm.world)
        own = [number for number, rank in enumerate(drawn_by) if rank == self.comm.rank]
        if not own:
            return []
        names = list[str]()
        vae, tokenizer, text_encoders = self._vae(), self.tokenizer(), self.text_encoders()
        for number in own:
            index, way = number % len(pictures), ways[number // len(pictures)]
            picture = pictures[index]
            (image,) = sample_images(
                unet=self.denoiser.unet,
                vae=vae,
                text_encoders=text_encoders,
                tokenizer=tokenizer,
                prompts=[picture.prompt],
                negative_prompt=picture.negative_prompt,
                width_px=picture.bucket.width_px,
                height_px=picture.bucket.height_px,
                num_steps=picture.steps,
                guidance_scale=picture.guidance_scale,
                seeds=[picture.seed],
                device=self.comm.device,
                prediction=self.denoiser.objective.prediction,
                scaling_factor=self.denoiser.scaling_factor,
                latent_shift=self.denoiser.latent_shift,
                guidance_rescale=self._guidance_rescale,
                zeros_for_no_text=way == "zeros",
                input_dtype=self.denoiser.input_dtype,
                autocast_dtype=self.denoiser.autocast_dtype,
                sampler=picture.sampler,
                schedule=picture.schedule,
            )
            text = png_text(self._text(picture, weights, way))
            names.append(image_name(index, len(pictures), way, ways))
            image.save(folder / names[-1], pnginfo=text)
        return names

    def _text(self, picture: Picture, weights: str, way: str) -> str:
        guided = picture.guidance_scale > 1
        zeros = guided and way == "zeros" and not picture.negative_prompt
        settings: dict[str, object] = {
            "Steps": picture.steps,
            "Sampler": sampler_title(picture.sampler, picture.schedule),
            "Schedule type": schedule_title(picture.sampler, picture.schedule),
            "CFG scale": picture.guidance_scale if guided else 1.0,
            "Seed": picture.seed,
            "Size": f"{picture.bucket.width_px}x{picture.bucket.height_px}",
            "Model": f"{self.run_name}-{weights}",
            "RNG": "CPU",
            "Guidance rescale": (self._guidance_rescale or None) if guided else None,
            "Unconditional": "zeros" if zeros else None,
        }
        return infotext(picture.prompt, picture.negative_prompt if guided else "", settings)

    def _tell_cut_prompts(self, pictures: Sequence[Picture]) -> None:
        """Prompts are cut where captions are, in training as here; captions of the data were told of at the start."""
        if not (self.samples.prompts or self.samples.images):
            return
        tokenizer = self.tokenizer()
        counts, most = tokenizer.count_tokens([picture.prompt for picture in pictures]), tokenizer.max_tokens
        cut = [f"{place} has {count}" for place, count in enumerate(counts, start=1) if count > most]
        if cut:
            shown = ", ".join(cut[:5]) + ", ..." * (len(cut) > 5)
            _log.warning("samples: prompts are cut to captions.max_tokens = %d; prompt %s tokens", most, shown)

    def _draw_sheet(self, pictures: Sequence[Picture], folder: Path, weights: str) -> None:
        """All images, below each other by what they are guided away from, above the data."""
        rows, ways = list[GridRow](), self._ways
        text = self._text(pictures[0], weights, ways[0]) if pictures else ""  # A1111's grids have the first image's
        prompts, details = [picture.prompt for picture in pictures], [_details(picture) for picture in pictures]
        common = details[0][:-1] if details and len({each[:-1] for each in details}) == 1 else ()
        shown = [", ".join(each[len(common) :]) for each in details]
        for way in ways:
            names = (image_name(index, len(pictures), way, ways) for index in range(len(pictures)))
            drawn = [read_small(folder / name) for name in names]
            against = f", guided away from {_WAYS[way]}" if len(ways) > 1 else ""
            rows.append(GridRow(f"generated{against}", drawn, prompts, shown))
        data = [torch.from_numpy(picture.latents)[None] for picture in pictures if picture.latents is not None]
        if data:
            vae = self._vae()
            rows.append(GridRow("data, through the VAE", [decoded_images(vae, latents)[0] for latents in data]))
        photos = [Image.fromarray(p.pixels.transpose(1, 2, 0)) for p in pictures if p.pixels is not None]
        if photos:
            rows.append(GridRow("data", photos))
        image_grid(rows, sheet_of(folder), ", ".join((_words(weights), *common)), text=text)


def _details(picture: Picture) -> tuple[str, ...]:
    """Of a caption; what differs between all images stands last."""
    scale = f"CFG {_number(picture.guidance_scale)}" if picture.guidance_scale > 1 else "no guidance"
    steps = f"{picture.steps} step{'s' * (picture.steps > 1)}"
    return sampler_title(picture.sampler, picture.schedule), steps, scale, f"seed {picture.seed}"


def _words(weights: str) -> str:
    """`step-00000120-ema` as `step 120, ema`."""
    kind, _, rest = weights.partition("-")
    digits, _, name = rest.partition("-")
    if kind != "step" or not digits.isdigit():
        return weights
    return f"step {int(digits):,}" + (f", {name}" if name else "")


def _number(value: float) -> str:
    """As short as it is exact: `6`, `5.5`."""
    return f"{value:.15g}"


def image_name(index: int, count: int, way: str, ways: Sequence[str]) -> str:
    """The file of a drawing, one of `count`; in the order of the images also by name."""
    digits = max(len(str(count - 1)), 2)
    return f"{index:0{digits}d}{f'-{way}' if len(ways) > 1 else ''}.png"
