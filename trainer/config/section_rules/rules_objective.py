"""Options of `objective` that would do nothing, or harm; what hangs on the model is in `train/run_objective.py`."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config

_T, _W, _L, _N = (f"objective.{name}" for name in ("timesteps", "weighting", "loss", "noise"))


def objective_problems(config: Config) -> Iterator[Problem]:
    """Every rule of the section that `config` breaks."""
    for check in (_idle, _prediction, _timesteps, _weighting, _contrast, _noise, _masks, _samples):
        yield from check(config)


def _idle(config: Config) -> Iterator[Problem]:
    """Keys that only count beside a certain value of another."""
    objective = config.objective
    times, weights, loss, noise = objective.timesteps, objective.weighting, objective.loss, objective.noise
    has_mean = times.distribution in ("logit_normal", "laplace")
    is_huber, has_offset = loss.kind in ("huber", "smooth_l1"), noise.offset > 0 or noise.offset_adaptive > 0
    uses_gamma = weights.kind in ("min_snr", "soft_min_snr", "p2")
    needed = (
        (f"{_T}.mean", f"{_T}.distribution", has_mean, "`distribution: logit_normal` or `laplace`"),
        (f"{_T}.std", f"{_T}.distribution", has_mean, "`distribution: logit_normal` or `laplace`"),
        (f"{_T}.a", f"{_T}.distribution", times.distribution == "beta", "`distribution: beta`"),
        (f"{_T}.b", f"{_T}.distribution", times.distribution == "beta", "`distribution: beta`"),
        (f"{_W}.gamma", f"{_W}.kind", uses_gamma, "`kind: min_snr`, `soft_min_snr` or `p2`"),
        (f"{_W}.k", f"{_W}.kind", weights.kind == "p2", "`kind: p2`"),
        (f"{_W}.lr", f"{_W}.kind", weights.kind == "learned", "`kind: learned`"),
        (f"{_T}.even_share", f"{_T}.distribution", times.distribution == "importance", "`distribution: importance`"),
        (f"{_L}.delta", f"{_L}.kind", is_huber, "`kind: huber` or `smooth_l1`"),
        (f"{_L}.delta_schedule", f"{_L}.kind", is_huber, "`kind: huber` or `smooth_l1`"),
        (f"{_L}.unmasked_weight", f"{_L}.masked", loss.masked, "`masked: true`"),
        (f"{_L}.unmasked_probability", f"{_L}.masked", loss.masked, "`masked: true`"),
        (f"{_L}.normalize_masked_area", f"{_L}.masked", loss.masked, "`masked: true`"),
        (f"{_N}.offset_probability", f"{_N}.offset", has_offset, "an `offset`"),
        (f"{_N}.pyramid_discount", f"{_N}.pyramid_levels", noise.pyramid_levels > 0, "`pyramid_levels`"),
    )
    for key, other, works, what in needed:
        if is_given(config, key) and not works:
            yield clash(config, (key, other), f"has no effect without {what}")
    if is_huber and loss.delta is not None and loss.delta >= 1 and loss.delta_schedule in (None, "exponential", "snr"):
        keys = (f"{_L}.delta", f"{_L}.delta_schedule")
        yield clash(config, keys, "a schedule falls from 1 to delta: give one below 1, or `delta_schedule: constant`")
    if noise.offset_probability == 0 and has_offset:
        keys = (f"{_N}.offset_probability", f"{_N}.offset")
        yield clash(config, keys, "no image gets the offset; leave both out")


def _prediction(config: Config) -> Iterator[Problem]:
    objective = config.objective
    kind, zero, key = objective.prediction, objective.zero_terminal_snr is True, "objective.prediction"
    if kind == "epsilon" and zero:
        keys = (key, "objective.zero_terminal_snr")
        yield clash(config, keys, "must not go together; where the input is all noise, predicting it teaches nothing")
    if kind in ("flow", "edm") and zero:
        keys = (key, "objective.zero_terminal_snr")
        yield clash(config, keys, "has no effect; only `v_prediction` has a schedule that can end so")
    if kind in ("flow", "edm") and objective.flow.aligned:
        keys = (key, "objective.flow.aligned")
        yield clash(config, keys, "goes on from a model of epsilon or v; use `prediction: auto`")
    if kind in ("epsilon", "v_prediction", "edm") and not objective.flow.aligned and objective.flow.shift != 1.0:
        keys = (key, "objective.flow.shift")
        yield clash(config, keys, "has no effect; use `prediction: flow`, or `flow.aligned`")
    if objective.flow.shift == "resolution" and config.data.buckets.resolution == 256:
        keys = ("objective.flow.shift", "data.buckets.resolution")
        yield clash(config, keys, "has no effect; the shift is 1 at 256 px")
    if objective.flow.aligned and objective.weighting.kind != "none":
        keys = ("objective.flow.aligned", f"{_W}.kind")
        yield clash(config, keys, "must not go together; the flow's loss is a weighting of its own")
    if objective.flow.aligned and zero and kind == "auto":
        keys = ("objective.flow.aligned", "objective.zero_terminal_snr", key)
        yield clash(config, keys, "converts the schedule and the flow at once; give `prediction: v_prediction`, or one")


def _timesteps(config: Config) -> Iterator[Problem]:
    times, kind = config.objective.timesteps, config.objective.prediction
    if times.min >= times.max:
        yield clash(config, (f"{_T}.min", f"{_T}.max"), "leaves no timestep; `min` must be below `max`")
    if config.objective.zero_terminal_snr is True and times.max < 1000:
        keys = (f"{_T}.max", "objective.zero_terminal_snr")
        yield clash(config, keys, "the last timestep, which zero terminal SNR is for, would not be trained")
    if times.distribution == "beta" and (times.a or 1.0) == (times.b or 1.0) == 1.0:
        yield clash(config, (f"{_T}.distribution", f"{_T}.a", f"{_T}.b"), "is `uniform`; write that")
    if kind == "edm" and times.distribution == "logit_normal":
        keys = (f"{_T}.distribution", "objective.prediction")
        yield clash(config, keys, "must not go together; EDM's noise levels are log-normal already: use `uniform`")
    if times.distribution == "importance" and config.objective.flow.aligned:
        keys = (f"{_T}.distribution", "objective.flow.aligned")
        yield clash(config, keys, "must not go together; the aligned way has its own noise levels")
    if times.distribution == "importance" and config.objective.weighting.kind == "learned":
        keys = (f"{_T}.distribution", f"{_W}.kind")
        yield clash(
            config, keys, "must not go together; learned weights make all losses alike, so that none stands out"
        )
    if times.stratified and (config.train.global_batch_size or 0) == 1:
        yield clash(config, (f"{_T}.stratified", "train.global_batch_size"), "has no effect on one image a step")


def _weighting(config: Config) -> Iterator[Problem]:
    kind, weights = config.objective.prediction, config.objective.weighting
    same = {"like_epsilon": "epsilon", "like_v_prediction": "v_prediction", "like_flow": "flow"}
    if kind != "auto" and same.get(weights.kind) == kind:
        yield clash(config, (f"{_W}.kind", "objective.prediction"), "has no effect; that is what is predicted")
    if kind == "edm" and weights.kind in ("min_snr", "soft_min_snr", "debiased", "p2"):
        keys = (f"{_W}.kind", "objective.prediction")
        yield clash(config, keys, "must not go together; EDM's preconditioning is a weighting already")
    if kind == "flow" and weights.kind == "debiased":
        keys = (f"{_W}.kind", "objective.prediction")
        yield clash(config, keys, "was made for epsilon, and takes both ends of the flow away: use `timesteps`")
    if weights.kind in ("min_snr", "soft_min_snr") and weights.gamma is not None and weights.gamma > 500:
        yield clash(config, (f"{_W}.gamma", f"{_W}.kind"), "has next to no effect; the SNR ends at 1,176: 5 is usual")


def _contrast(config: Config) -> Iterator[Problem]:
    objective, key = config.objective, f"{_L}.contrast"
    if not objective.loss.contrast:
        return
    if objective.prediction in ("epsilon", "v_prediction", "edm") or objective.flow.aligned:
        other = "objective.flow.aligned" if objective.flow.aligned else "objective.prediction"
        yield clash(config, (key, other), "must not go together; only a velocity tells where another image lies")
    if objective.loss.kind != "l2":
        yield clash(config, (key, f"{_L}.kind"), "must not go together; only with `l2` does the sum stay bounded")
    if objective.weighting.kind == "learned":
        keys = (key, f"{_W}.kind")
        yield clash(config, keys, "must not go together; the difference of two losses may be negative and has no log")
    if config.train.global_batch_size == 1:
        keys = (key, "train.global_batch_size")
        yield clash(config, keys, "has no effect; a step of one image has no other")


def _noise(config: Config) -> Iterator[Problem]:
    noise, kind, zero = config.objective.noise, config.objective.prediction, config.objective.zero_terminal_snr is True
    has_offset = noise.offset > 0 or noise.offset_adaptive > 0
    for name, there in (("offset", has_offset), ("pyramid_levels", noise.pyramid_levels > 0)):
        key = f"{_N}.{'offset_adaptive' if name == 'offset' and not noise.offset else name}"
        if there and zero:
            keys = (key, "objective.zero_terminal_snr")
            yield clash(config, keys, "must not go together; it makes up for what zero terminal SNR mends")
        if there and kind == "flow":
            keys = (key, "objective.prediction")
            yield clash(config, keys, "must not go together; flow ends in plain noise, and images are drawn from it")
        if there and noise.candidates > 1:
            keys = (key, f"{_N}.candidates")
            yield clash(config, keys, "must not go together; the nearest noise is chosen before anything is added")
    if has_offset and noise.pyramid_levels > 0:
        keys = (f"{_N}.offset", f"{_N}.pyramid_levels")
        yield clash(config, keys, "must not go together; the coarsest level is an offset")
    if noise.pairing != "none" and noise.candidates > 1:
        keys = (f"{_N}.pairing", f"{_N}.candidates")
        yield clash(config, keys, "must not go together; each chooses the noise of an image")
    if noise.pairing != "none" and config.train.global_batch_size == 1:
        keys = (f"{_N}.pairing", "train.global_batch_size")
        yield clash(config, keys, "has no effect; a step of one image has one noise: use `candidates`")
    if noise.perturbation > 0 and kind == "flow":
        keys = (f"{_N}.perturbation", "objective.prediction")
        yield clash(config, keys, "must not go together; the path of a flow would lead elsewhere")


def _masks(config: Config) -> Iterator[Problem]:
    loss = config.objective.loss
    if loss.masked and all(source.masks == "none" for source in config.data.sources):
        keys = (f"{_L}.masked", "data.sources.0.masks")
        yield clash(config, keys, "no source has masks; say where they are")
    if loss.masked and loss.unmasked_weight == 1:
        yield clash(config, (f"{_L}.unmasked_weight", f"{_L}.masked"), "all of each image counts alike; leave both out")
    if loss.masked and loss.unmasked_probability == 1:
        keys = (f"{_L}.unmasked_probability", f"{_L}.masked")
        yield clash(config, keys, "no image is trained with its mask; leave both out")


def _samples(config: Config) -> Iterator[Problem]:
    samples = config.samples
    guided, scale, zeros = samples.guidance_scale > 1, "samples.guidance_scale", "samples.unconditional"
    for name in ("guidance_rescale", "unconditional"):
        if is_given(config, f"samples.{name}") and not guided:
            yield clash(config, (f"samples.{name}", scale), "has no effect; it needs a guidance above 1")
    if samples.unconditional == "zeros" and samples.negative_prompt:
        yield clash(config, (zeros, "samples.negative_prompt"), "zeros stand for no text at all")
    if samples.unconditional == "both" and samples.negative_prompt:
        yield clash(config, (zeros, "samples.negative_prompt"), "both are of an empty negative prompt")
