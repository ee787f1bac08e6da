"""The section `samples`: what is drawn while a run trains, and by `sample` and `eval`."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Count, Fraction, PathField, PositiveInt, Section, Seed

SamplerName = Literal["euler", "euler_a", "ddim", "dpmpp_2m"]
ScheduleName = Literal["normal", "karras"]
MOST_STEPS = 500
SampleSteps = Annotated[PositiveInt, Field(le=MOST_STEPS)]
GuidanceScale = Annotated[float, Field(ge=0)]


class SampleImageConfig(Section):
    prompt: str
    """What is drawn."""
    negative_prompt: str | None = None
    """What this image is guided away from; default: `samples.negative_prompt`."""
    width_px: PositiveInt | None = None
    """Its width; default: `samples.width_px`."""
    height_px: PositiveInt | None = None
    """Its height; default: `samples.height_px`."""
    seed: Seed | None = None
    """Seed of its starting noise; default: by its place among all images, as `samples.seed` says."""
    steps: SampleSteps | None = None
    """Sampler steps; default: `samples.steps`."""
    guidance_scale: GuidanceScale | None = None
    """Classifier-free guidance; default: `samples.guidance_scale`."""
    sampler: SamplerName | None = None
    """How it is drawn; default: `samples.sampler`."""
    schedule: ScheduleName | None = None
    """Where the steps of `dpmpp_2m` lie; default: `samples.schedule`."""


class SamplesConfig(Section):
    every_steps: Count = 0
    """Optimizer steps between sample grids; 0 turns them off."""
    prompts: list[str] = []
    """One image is drawn for each prompt. Where there is none here, in `images` or in `prompt_file`, captions of the
    prepared data are used."""
    images: list[SampleImageConfig] = []
    """Images with settings of their own, after those of `prompts`, such as `[{prompt: a red fox, seed: 7}]`."""
    prompt_file: PathField | None = None
    """A file of prompts as kohya's scripts take it, after those of `images`: `.json`, `.toml`, or text with a prompt
    a line. A line may end in flags such as `--n blurry --w 832 --h 1216 --d 7 --s 20 --l 5`; `#` begins a comment. It
    is read when the command starts."""
    negative_prompt: str = ""
    """What the images are guided away from."""
    count: PositiveInt = 8
    """How many captions of the data are used where there are no prompts."""
    width_px: PositiveInt | None = None
    """Width of the images; default: `data.buckets.resolution`."""
    height_px: PositiveInt | None = None
    """Height of the images; default: `data.buckets.resolution`."""
    steps: SampleSteps = 28
    """Sampler steps."""
    sampler: SamplerName = "euler"
    """How images are drawn, in A1111's words: Euler, Euler a, DDIM or DPM++ 2M. A velocity of rectified flow and EDM
    are drawn by `euler`."""
    schedule: ScheduleName = "normal"
    """Where the steps of `dpmpp_2m` lie: `normal`, at even timesteps; `karras`, at noise levels that crowd towards the
    image (Karras et al. 2022, eq. 5)."""
    guidance_scale: GuidanceScale = 6.0
    """Classifier-free guidance; 1 or less turns it off."""
    guidance_rescale: Literal["auto"] | Fraction = "auto"
    """How far the contrast that guidance adds is taken back (Lin et al. 2023). `auto`: 0.7 with zero terminal SNR,
    which needs it, else 0."""
    unconditional: Literal["empty_text", "zeros", "both"] = "empty_text"
    """What guidance leads away from where there is no negative prompt: the empty text, as in A1111 and ComfyUI, or
    zeros, as in diffusers. `both`: each image twice, one below the other."""
    seed: Seed = 0
    """Seed of the first image's starting noise; the n-th image uses seed + n."""
