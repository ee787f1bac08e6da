"""Rules of `samples`."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.samples_config import SamplesConfig
from trainer.errors import UserError

PIXELS_PER_LATENT = 8
_OF_SCHEDULES = ("epsilon", "v_prediction")
_IN_WORDS = {"flow": "a velocity (rectified flow)", "edm": "EDM's F"}


def sample_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the samples of `config` break."""
    samples = config.samples
    yield from _sizes(config, "samples", samples.width_px, samples.height_px)
    if is_given(config, "samples.count"):
        for name in ("prompts", "images", "prompt_file"):
            if getattr(samples, name):
                keys = ("samples.count", f"samples.{name}")
                yield clash(config, keys, "has no effect; each prompt gives one image")
    if samples.guidance_scale <= 1 and is_given(config, "samples.negative_prompt"):
        keys = ("samples.negative_prompt", "samples.guidance_scale")
        yield clash(config, keys, "has no effect; it needs a guidance above 1")
    if samples.schedule == "karras" and samples.sampler != "dpmpp_2m":
        yield clash(config, ("samples.schedule", "samples.sampler"), "has no effect; it is for `dpmpp_2m`")
    for i, image in enumerate(samples.images):
        at = f"samples.images.{i}"
        yield from _sizes(config, at, image.width_px, image.height_px)
        scale = samples.guidance_scale if image.guidance_scale is None else image.guidance_scale
        if image.negative_prompt and scale <= 1:
            of = "samples" if image.guidance_scale is None else at
            keys = (f"{at}.negative_prompt", f"{of}.guidance_scale")
            yield clash(config, keys, "has no effect; it needs a guidance above 1")
        if image.schedule == "karras" and (image.sampler or samples.sampler) != "dpmpp_2m":
            of = at if image.sampler else "samples"
            yield clash(config, (f"{at}.schedule", f"{of}.sampler"), "has no effect; it is for `dpmpp_2m`")


def _sizes(config: Config, at: str, width_px: int | None, height_px: int | None) -> Iterator[Problem]:
    for name, pixels in (("width_px", width_px), ("height_px", height_px)):
        if pixels is not None and pixels % PIXELS_PER_LATENT:
            yield clash(config, (f"{at}.{name}",), f"must be a multiple of {PIXELS_PER_LATENT}")


def require_sampler(samples: SamplesConfig, prediction: str) -> None:
    """Refuse samplers that do not go with what the run predicts, which is known with its model.

    Args:
        prediction: a `PredictionType`.
    Raises:
        UserError: one line for each place that names such a sampler.
    """
    if prediction in _OF_SCHEDULES:
        return
    named = [("samples.sampler", samples.sampler)]
    named += [(f"samples.images.{i}.sampler", image.sampler) for i, image in enumerate(samples.images)]
    wrong = [
        f"{key} = {name}: this run predicts {_IN_WORDS[prediction]}, which is drawn by `euler`; leave it out"
        for key, name in named
        if name not in (None, "euler")
    ]
    if wrong:
        raise UserError(*wrong)
