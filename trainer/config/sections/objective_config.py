"""The section `objective`: what the model is trained to predict, where, and how errors count."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import MOST_LOSS_WEIGHT, Flag, Fraction, LossWeight, PathField, PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class FlowConfig(Section):
    shift: Annotated[float, Field(gt=0, le=100)] | Literal["resolution"] = 1.0
    """r of s' = r s / (1 + (r - 1) s): above 1, more noise, for larger images. `resolution`: the square root of the
    pixels of `data.buckets.resolution` over 256^2, so 4 at 1024 px."""
    aligned: Flag = False
    """Train the flow that follows from a model of epsilon or v (Diff2Flow): its own prediction, at flow's noise levels
    and with flow's loss. The model stays one of epsilon or v for the programs that draw with it."""


def flow_shift(flow: FlowConfig, resolution_px: int) -> float:
    """`shift` as a number: by resolution, the ratio of the images' sides (Esser et al. 2024, eq. 23)."""
    return resolution_px / 256 if flow.shift == "resolution" else flow.shift


class TimestepsConfig(Section):
    distribution: Literal["uniform", "logit_normal", "laplace", "beta", "importance"] = "uniform"
    """How often each noise level is trained. `logit_normal`: the middle more often (Stable Diffusion 3). `laplace`:
    around one log SNR. `beta`: the density of a Beta distribution. `importance`: by the losses so far, of which large
    ones come more often and count less."""
    mean: float | None = None
    """`logit_normal`: mean of the logit, default 0; positive is noisier. `laplace`: the log SNR in the middle,
    default 0."""
    std: Positive | None = None
    """`logit_normal`: its standard deviation, default 1. `laplace`: its scale, default 0.5."""
    a: Positive | None = None
    """`beta`: its first parameter, default 1; below the second, less noise is trained more often."""
    b: Positive | None = None
    """`beta`: its second parameter, default 1."""
    even_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """`importance`: share of the images that are spread evenly, whatever the losses."""
    min: Annotated[int, Field(ge=0, le=999)] = 0
    """The lowest timestep that is trained, of 1,000; 0 is the image."""
    max: Annotated[int, Field(ge=1, le=1000)] = 1000
    """The first timestep that is not trained any more; 1000 for all."""
    stratified: Flag = False
    """Spread the timesteps of a step evenly: of n images, over all workers, each gets its own n-th of the range."""


class WeightingConfig(Section):
    kind: Literal[
        "none", "min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon", "like_v_prediction", "like_flow", "learned"
    ] = "none"
    """How much an image counts by its noise level. `min_snr`: no more than `gamma` lets it, against strong weights of
    nearly clean images. `soft_min_snr`: the same without an edge. `debiased`: 1 / sqrt(SNR) on epsilon. `p2`: less of
    nearly clean images. `like_...`: as if that had been predicted. `learned`: the inverse of the loss that a small
    network expects there, which trains along (EDM2)."""
    gamma: Positive | None = None
    """`min_snr`, `soft_min_snr`: default 5. `p2`: the exponent, default 1."""
    k: Positive | None = None
    """`p2`: added to the SNR, default 1."""
    lr: Positive | None = None
    """`learned`: learning rate of the small network, default 0.01."""


class LossConfig(Section):
    kind: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Of each element of the prediction. `huber` and `smooth_l1`: squared where the error is small against delta,
    linear beyond, so that a few wild images count less."""
    delta: Positive | None = None
    """Huber's delta, default 0.1; with a schedule, its least value."""
    delta_schedule: Literal["constant", "exponential", "snr"] | None = None
    """Huber's delta by noise level: the same for all; falling from 1 exponentially with the timestep; or by the SNR,
    the default."""
    masked: Flag = False
    """Train only what the images' masks show, in training and in the validation loss; `masks` of `data.sources` says
    where they are. White is trained, black is not, grey in between."""
    unmasked_weight: Fraction = 0.0
    """How much counts what is outside the mask."""
    unmasked_probability: Fraction = 0.0
    """Share of the visits of images that are trained without their mask."""
    normalize_masked_area: Flag = False
    """Divide an image's loss by the share of it that is trained, so that small masks count as much as large ones."""

    contrast: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Contrastive flow matching: so much of the loss against another image of the step is taken off, so that images of
    different captions stay apart; 0.05 is usual."""


class NoiseConfig(Section):
    offset: NotNegative = 0.0
    """Strength of a shift of whole channels, so that brighter and darker images are learnt; 0.0357 is usual."""
    offset_probability: Fraction = 1.0
    """Share of the images that get the shift."""
    offset_adaptive: NotNegative = 0.0
    """Added to the strength: this times the absolute mean of the image's channel."""
    pyramid_levels: Annotated[int, Field(ge=0, le=10)] = 0
    """Coarser noise is added in up to so many resolutions (multi-resolution noise); 6 to 8 are usual, 0 for none."""
    pyramid_discount: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """How much weaker each coarser level is."""
    perturbation: NotNegative = 0.0
    """Strength of noise that is in the input and not in the target (input perturbation); 0.1 is usual."""
    candidates: Annotated[PositiveInt, Field(le=64)] = 1
    """Draw so many noises for each image and take the nearest (immiscible diffusion); 1 for plain noise."""
    pairing: Literal["none", "optimal_transport"] = "none"
    """`optimal_transport`: deal the noises of a step out so that they are nearest to their images on the whole."""


class TagBalanceConfig(Section):
    power: Fraction = 0.0
    """p of a tag's weight (typical count / its count)^p: rare tags count more, common ones less. 0.5 is usual, 0 for
    none. An image counts the mean over its tags, all images together 1 on average, those without tags 1 each."""
    min: Annotated[float, Field(gt=0, le=1)] = 0.25
    """No tag weighs less."""
    max: Annotated[float, Field(ge=1, le=MOST_LOSS_WEIGHT)] = 4.0
    """No tag weighs more."""


class LossWeightsConfig(Section):
    prior: LossWeight = 1.0
    """How much each image of sources with `prior: true` counts in the loss (kohya's `prior_loss_weight`)."""
    per_image: Flag = True
    """Use the images' own weights, which `prepare` has stored where a source names their field, column or files."""
    tag_file: PathField | None = None
    """Weights of tags: `.json` or `.yaml` with `tag: weight`, or `.csv` with lines `tag,weight`. An image counts the
    product of its tags' weights; tags that are not named count 1."""
    tag_balance: TagBalanceConfig = TagBalanceConfig()
    """Weights of tags by how often they occur in the prepared data."""

    @property
    def weighs_tags(self) -> bool:
        """Whether what an image counts hangs on its tags."""
        return self.tag_file is not None or self.tag_balance.power > 0


class ObjectiveConfig(Section):
    prediction: Literal["auto", "epsilon", "v_prediction", "flow", "edm"] = "auto"
    """What the model is trained to predict. `auto`: what it predicts already, by its marker tensors, scheduler or
    metadata. Another one converts it, which takes some thousand steps; see docs/objectives.md."""
    zero_terminal_snr: Literal["auto"] | Flag = "auto"
    """End the schedule in noise alone, so that very dark and very bright images can be drawn; of v-prediction. `auto`:
    as the model was trained."""
    flow: FlowConfig = FlowConfig()
    """Flow matching."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Where in the process images are trained."""
    weighting: WeightingConfig = WeightingConfig()
    """How much each noise level counts."""
    loss: LossConfig = LossConfig()
    """Of errors."""
    noise: NoiseConfig = NoiseConfig()
    """What is added to plain noise."""
    loss_weights: LossWeightsConfig = LossWeightsConfig()
    """How much each image counts, whatever its noise level: the product of the weights of its source, its own and those
    of its tags, at most 100."""
