"""From the configuration's `objective`, and what the model says of itself, to the objective of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from trainer.config.schema import Config
from trainer.config.sections.objective_config import ObjectiveConfig, TimestepsConfig, WeightingConfig, flow_shift
from trainer.data.survey.image_weights import describe_loss_weights
from trainer.errors import UserError
from trainer.model_files.run_model import RunModel

if TYPE_CHECKING:
    from trainer.diffusion.learner import Learner
    from trainer.diffusion.losses import Delta
    from trainer.diffusion.objective import Objective
    from trainer.diffusion.prediction import Prediction, PredictionType
    from trainer.diffusion.timesteps import Distribution
    from trainer.diffusion.weighting import Weighting

TRAINED = ("epsilon", "v_prediction", "flow", "edm")
_IN_WORDS = {"epsilon": "epsilon", "v_prediction": "v-prediction", "flow": "rectified flow", "edm": "EDM"}


@dataclass(frozen=True)
class ChosenPrediction:
    """What is trained.

    Attributes:
        kind: one of `TRAINED`.
        zero_terminal_snr: whether the schedule ends in noise alone.
        description: a line for people, with where it is from, and from what the model is converted.
    """

    kind: str
    zero_terminal_snr: bool
    description: str


def chosen_prediction(config: ObjectiveConfig, model: RunModel) -> ChosenPrediction:
    """What the configuration asks for, or else what the model predicts already; needs no torch.

    Raises:
        UserError: the model predicts something that is not trained, or the two do not go together.
    """
    told = model.prediction
    kind = told.kind if config.prediction == "auto" else config.prediction
    if kind not in TRAINED:
        raise UserError(
            f"model.path: {model.source.path}: predicts {kind}, by {told.by}; trained are {', '.join(TRAINED)}: choose "
            "one by objective.prediction, and the model is converted"
        )
    by = "objective.prediction" if config.prediction != "auto" else told.by
    zero = config.zero_terminal_snr
    if zero == "auto":
        zero = told.zero_terminal_snr and kind == told.kind == "v_prediction"
    if zero and kind != "v_prediction":
        reason = "only v_prediction has a schedule that can end so"
        if kind == "epsilon":
            reason = "the input is all noise at the last timestep, so that predicting it teaches nothing"
        raise UserError(
            f"objective.zero_terminal_snr = true: this run predicts {_IN_WORDS[kind]} ({by}); {reason}: use "
            "objective.prediction=v_prediction"
        )
    if config.flow.aligned and kind not in ("epsilon", "v_prediction"):
        raise UserError(
            "objective.flow.aligned = true: goes on from a model of epsilon or v, and this run predicts "
            f"{_IN_WORDS[kind]} ({by})"
        )
    if config.loss.contrast and kind != "flow":
        raise UserError(
            f"objective.loss.contrast = {config.loss.contrast}: needs a velocity; this run predicts {_IN_WORDS[kind]} "
            f"({by}): use objective.prediction=flow"
        )
    shift_used = kind == "flow" or config.flow.aligned
    if config.flow.shift != 1.0 and not shift_used:
        raise UserError(
            f"objective.flow.shift = {config.flow.shift}: has no effect; this run predicts {_IN_WORDS[kind]} ({by})"
        )
    described = _IN_WORDS[kind] + " with zero terminal SNR" * bool(zero)
    described += ", as the flow that follows from it" * config.flow.aligned
    if (kind, bool(zero)) == (told.kind, told.zero_terminal_snr):
        return ChosenPrediction(kind, bool(zero), f"{described}, as the model does ({told.by})")
    before = _IN_WORDS.get(told.kind, told.kind) + " with zero terminal SNR" * told.zero_terminal_snr
    return ChosenPrediction(kind, bool(zero), f"{described}; the model predicts {before} ({told.by}) and is converted")


def describe_objective(config: Config, model: RunModel) -> list[str]:
    """What is trained, and what is not as usual, in lines for people; without torch."""
    objective = config.objective
    lines = [f"objective: {chosen_prediction(objective, model).description}"]
    usual = ObjectiveConfig()
    options = {
        name: getattr(objective, name).model_dump(exclude_defaults=True)
        for name in ("flow", "timesteps", "weighting", "loss", "noise")
        if getattr(objective, name) != getattr(usual, name)
    }
    for name, values in options.items():
        words = [f"{key} {value}" if key != "kind" else str(value) for key, value in values.items()]
        lines.append(f"  {name}: {', '.join(words)}")
    if not objective.loss.masked and any(source.masks != "none" for source in config.data.sources):
        lines.append("  masks: data.sources have some, which are not used; objective.loss.masked=true uses them")
    return [*lines, *describe_loss_weights(config.data.sources, objective.loss_weights), *_costs(config)]


def extra_noises(config: ObjectiveConfig) -> int:
    """Tensors like an image's noise that lie on the card beside it while the image is trained on."""
    candidates = config.noise.candidates if config.noise.candidates > 1 else 0
    return candidates + 2 * (config.loss.contrast > 0)  # another's noise and target


def _costs(config: Config) -> Iterator[str]:
    """What options of the objective take, in lines for people; most take nothing."""
    objective, side = config.objective, config.data.buckets.resolution // 8
    image_mb = 4 * side**2 * 4 / 1e6
    if extra := extra_noises(objective):
        batch_mb = extra * image_mb * config.train.batch_size_per_gpu
        yield f"  costs: {batch_mb:.1f} MB on each card for noise beside the usual"
    if objective.noise.pairing != "none" or objective.loss.contrast:
        yield (
            f"  costs: every worker sees the step's latents, {image_mb / 2:.2f} MB an image, over the wire and in host "
            "memory; no pass begins before all of them are read"
        )
    if objective.noise.pairing != "none":
        yield "  costs: each noise is drawn twice, on the CPU"


def guidance_warning(config: Config) -> str | None:
    """Guidance leads away from what the model makes of no text; one that never saw that may not have it right."""
    captions, samples = config.captions, config.samples
    never = captions.dropout_rate == 0 and captions.dropout_every_n_epochs == 0
    if not samples.every_steps or samples.guidance_scale <= 1 or not never:
        return None
    return (
        f"samples.guidance_scale = {samples.guidance_scale:g} with captions.dropout_rate = 0: the model never sees an "
        "empty caption, and what guidance leads away from drifts; 0.1 is usual"
    )


def make_objective(config: Config, model: RunModel) -> Objective:
    """The run's objective.

    Raises:
        UserError: as `chosen_prediction`.
    """
    from trainer.diffusion import losses, masking, timesteps
    from trainer.diffusion.importance import LossHistory
    from trainer.diffusion.noise import NoiseRecipe
    from trainer.diffusion.objective import Objective, taught

    wished = config.objective
    prediction = make_prediction(config, model)
    loss = {"l2": losses.squared, "l1": losses.absolute, "huber": losses.huber, "smooth_l1": losses.smooth_l1}
    noise, mean, learner = wished.noise, masking.plain_mean, _learner(wished)
    if wished.loss.masked:
        masked = masking.area_mean if wished.loss.normalize_masked_area else masking.masked_mean
        mean = masked(wished.loss.unmasked_weight)
    objective = Objective(
        prediction=prediction,
        distribution=_distribution(wished.timesteps, prediction, wished.flow.aligned, _shift(config)),
        spread=timesteps.stratified if wished.timesteps.stratified else timesteps.independent,
        weigh=_weighting(wished.weighting, wished.flow.aligned),
        loss=loss[wished.loss.kind],
        delta=_delta(wished),
        noise=NoiseRecipe(
            offset=noise.offset,
            offset_probability=noise.offset_probability,
            offset_adaptive=noise.offset_adaptive,
            pyramid_levels=noise.pyramid_levels,
            pyramid_discount=noise.pyramid_discount,
            perturbation=noise.perturbation,
            candidates=noise.candidates,
        ),
        pairs=noise.pairing == "optimal_transport",
        contrast=wished.loss.contrast,
        mean=mean,
    )
    if isinstance(learner, LossHistory):
        objective = replace(objective, distribution=learner.positions)
    return taught(objective, learner) if learner else objective


def _learner(config: ObjectiveConfig) -> Learner | None:
    from trainer.diffusion.importance import LossHistory
    from trainer.diffusion.uncertainty import LearnedWeights

    times = config.timesteps
    if times.distribution == "importance":
        return LossHistory(times.even_share, times.min / 1000, times.max / 1000)
    return LearnedWeights(config.weighting.lr or 0.01) if config.weighting.kind == "learned" else None


def make_prediction(config: Config, model: RunModel) -> Prediction:
    """The process and the target alone, for whoever draws images."""
    from trainer.diffusion import prediction as predictions

    chosen = chosen_prediction(config.objective, model)
    kind = cast("PredictionType", chosen.kind)
    if kind == "flow":
        return predictions.flow(_shift(config))
    if kind == "v_prediction":
        return predictions.v_prediction(with_zero_terminal_snr=chosen.zero_terminal_snr)
    return {"epsilon": predictions.epsilon, "edm": predictions.edm}[kind]()


def _shift(config: Config) -> float:
    return flow_shift(config.objective.flow, config.data.buckets.resolution)


def _distribution(config: TimestepsConfig, prediction: Prediction, aligned: bool, shift: float) -> Distribution:
    from trainer.diffusion import timesteps

    low, high = config.min / 1000, config.max / 1000
    mean = 0.0 if config.mean is None else config.mean
    if config.distribution in ("uniform", "importance"):
        found = timesteps.uniform(low, high) if (low, high) != (0.0, 1.0) else timesteps.EVENLY
    elif config.distribution == "logit_normal":
        found = timesteps.logit_normal(mean, config.std or 1.0, low, high)
    elif config.distribution == "beta":
        found = timesteps.beta(config.a or 1.0, config.b or 1.0, low, high)
    else:
        found = timesteps.laplace(prediction.log_snr, mean, config.std or 0.5, low, high)
    return timesteps.aligned_with_flow(prediction.log_snr, found, shift) if aligned else found


def _weighting(config: WeightingConfig, aligned: bool) -> Weighting:
    from trainer.diffusion import weighting

    kind = "like_flow" if aligned else config.kind
    if kind in ("min_snr", "soft_min_snr"):
        make = weighting.min_snr if kind == "min_snr" else weighting.soft_min_snr
        return make(config.gamma or 5.0)
    if kind == "p2":
        return weighting.p2(config.k or 1.0, config.gamma or 1.0)
    return {
        "none": weighting.unweighted,
        "learned": weighting.unweighted,
        "debiased": weighting.debiased,
        "like_epsilon": weighting.like_epsilon,
        "like_v_prediction": weighting.like_v,
        "like_flow": weighting.like_flow,
    }[kind]


def _delta(config: ObjectiveConfig) -> Delta | None:
    from trainer.diffusion import losses

    if config.loss.kind not in ("huber", "smooth_l1"):
        return None
    delta, schedule = config.loss.delta or 0.1, config.loss.delta_schedule or "snr"
    make = {"constant": losses.constant_delta, "exponential": losses.exponential_delta, "snr": losses.snr_delta}
    return make[schedule](delta)
