"""Options of the objective that would do nothing, or harm: an error that names both keys and says why."""

from collections.abc import Callable

import pytest

from trainer.config.schema import Config
from trainer.config.sections.objective_config import ObjectiveConfig

P, T, W, L, N = "objective", *(f"objective.{name}" for name in ("timesteps", "weighting", "loss", "noise"))
MASKED = [f"{L}.masked=true", "data.sources.0.masks=files"]
WRONG: dict[str, tuple[list[str], str, str, str]] = {
    # overrides; the two keys; the reason
    "mean": ([f"{T}.mean=1.0"], f"{T}.mean", f"{T}.distribution", "has no effect without"),
    "std": ([f"{T}.std=2.0", f"{T}.distribution=beta", f"{T}.a=2.0"], f"{T}.std", f"{T}.distribution", "has no effect"),
    "a": ([f"{T}.a=2.0"], f"{T}.a", f"{T}.distribution", "has no effect without `distribution: beta`"),
    "b": ([f"{T}.b=2.0", f"{T}.distribution=laplace"], f"{T}.b", f"{T}.distribution", "has no effect without"),
    "gamma": ([f"{W}.gamma=5.0"], f"{W}.gamma", f"{W}.kind", "has no effect without"),
    "gamma of debiased": ([f"{W}.gamma=5.0", f"{W}.kind=debiased"], f"{W}.gamma", f"{W}.kind", "has no effect"),
    "k": ([f"{W}.k=1.0", f"{W}.kind=min_snr"], f"{W}.k", f"{W}.kind", "has no effect without `kind: p2`"),
    "large gamma": ([f"{W}.gamma=2000.0", f"{W}.kind=min_snr"], f"{W}.gamma", f"{W}.kind", "next to no effect"),
    "delta": ([f"{L}.delta=0.1"], f"{L}.delta", f"{L}.kind", "has no effect without `kind: huber`"),
    "delta's schedule": ([f"{L}.delta_schedule=snr"], f"{L}.delta_schedule", f"{L}.kind", "has no effect without"),
    "large delta": ([f"{L}.delta=2.0", f"{L}.kind=huber"], f"{L}.delta", f"{L}.delta_schedule", "falls from 1"),
    "weight of no mask": ([f"{L}.unmasked_weight=0.1"], f"{L}.unmasked_weight", f"{L}.masked", "has no effect without"),
    "share of no mask": (
        [f"{L}.unmasked_probability=0.1"],
        f"{L}.unmasked_probability",
        f"{L}.masked",
        "has no effect",
    ),
    "area of no mask": ([f"{L}.normalize_masked_area=yes"], f"{L}.normalize_masked_area", f"{L}.masked", "no effect"),
    "no masks": ([f"{L}.masked=yes"], f"{L}.masked", "data.sources.0.masks", "no source has masks"),
    "masks that count for nothing": (
        [*MASKED, f"{L}.unmasked_weight=1.0"],
        f"{L}.unmasked_weight",
        f"{L}.masked",
        "all of each image counts alike",
    ),
    "masks that are never used": (
        [*MASKED, f"{L}.unmasked_probability=1.0"],
        f"{L}.unmasked_probability",
        f"{L}.masked",
        "no image is trained with its mask",
    ),
    "share of no offset": ([f"{N}.offset_probability=0.5"], f"{N}.offset_probability", f"{N}.offset", "without an"),
    "offset for nobody": (
        [f"{N}.offset=0.05", f"{N}.offset_probability=0.0"],
        f"{N}.offset_probability",
        f"{N}.offset",
        "no image gets the offset",
    ),
    "discount": ([f"{N}.pyramid_discount=0.5"], f"{N}.pyramid_discount", f"{N}.pyramid_levels", "has no effect"),
    "epsilon to the end": (
        [f"{P}.prediction=epsilon", f"{P}.zero_terminal_snr=true"],
        f"{P}.prediction",
        f"{P}.zero_terminal_snr",
        "predicting it teaches nothing",
    ),
    "flow to the end": (
        [f"{P}.prediction=flow", f"{P}.zero_terminal_snr=true"],
        f"{P}.prediction",
        f"{P}.zero_terminal_snr",
        "has no effect",
    ),
    "flow aligned with itself": (
        [f"{P}.prediction=flow", f"{P}.flow.aligned=true"],
        f"{P}.prediction",
        f"{P}.flow.aligned",
        "goes on from a model of epsilon or v",
    ),
    "shift of no flow": (
        [f"{P}.prediction=epsilon", f"{P}.flow.shift=3.0"],
        f"{P}.prediction",
        f"{P}.flow.shift",
        "has no effect",
    ),
    "shift of 256 px": (
        [f"{P}.prediction=flow", f"{P}.flow.shift=resolution", "data.buckets.resolution=256"],
        f"{P}.flow.shift",
        "data.buckets.resolution",
        "the shift is 1 at 256 px",
    ),
    "two weightings": (
        [f"{P}.flow.aligned=true", f"{W}.kind=min_snr"],
        f"{P}.flow.aligned",
        f"{W}.kind",
        "a weighting of its own",
    ),
    "two conversions": (
        [f"{P}.flow.aligned=true", f"{P}.zero_terminal_snr=true"],
        f"{P}.flow.aligned",
        f"{P}.zero_terminal_snr",
        "at once",
    ),
    "no timestep": ([f"{T}.min=500", f"{T}.max=500"], f"{T}.min", f"{T}.max", "leaves no timestep"),
    "an end that is not trained": (
        [f"{P}.prediction=v_prediction", f"{P}.zero_terminal_snr=true", f"{T}.max=900"],
        f"{T}.max",
        f"{P}.zero_terminal_snr",
        "would not be trained",
    ),
    "beta that is uniform": ([f"{T}.distribution=beta"], f"{T}.distribution", f"{T}.a", "is `uniform`"),
    "normal of normal": (
        [f"{P}.prediction=edm", f"{T}.distribution=logit_normal"],
        f"{T}.distribution",
        f"{P}.prediction",
        "log-normal already",
    ),
    "strata of one": (
        [f"{T}.stratified=true", "train.global_batch_size=1"],
        f"{T}.stratified",
        "train.global_batch_size",
        "one image a step",
    ),
    "as it is": (
        [f"{P}.prediction=epsilon", f"{W}.kind=like_epsilon"],
        f"{W}.kind",
        f"{P}.prediction",
        "that is what is predicted",
    ),
    "EDM weighted": ([f"{P}.prediction=edm", f"{W}.kind=min_snr"], f"{W}.kind", f"{P}.prediction", "already"),
    "flow debiased": ([f"{P}.prediction=flow", f"{W}.kind=debiased"], f"{W}.kind", f"{P}.prediction", "both ends"),
    "offset and its cure": (
        [f"{P}.prediction=v_prediction", f"{P}.zero_terminal_snr=true", f"{N}.offset=0.05"],
        f"{N}.offset",
        f"{P}.zero_terminal_snr",
        "makes up for what",
    ),
    "pyramid and its cure": (
        [f"{P}.prediction=v_prediction", f"{P}.zero_terminal_snr=true", f"{N}.pyramid_levels=6"],
        f"{N}.pyramid_levels",
        f"{P}.zero_terminal_snr",
        "makes up for what",
    ),
    "flow with an offset": (
        [f"{P}.prediction=flow", f"{N}.offset=0.05"],
        f"{N}.offset",
        f"{P}.prediction",
        "ends in plain noise",
    ),
    "nearest of offsets": (
        [f"{N}.candidates=4", f"{N}.offset=0.05"],
        f"{N}.offset",
        f"{N}.candidates",
        "chosen before",
    ),
    "two offsets": (
        [f"{N}.pyramid_levels=6", f"{N}.offset=0.05"],
        f"{N}.offset",
        f"{N}.pyramid_levels",
        "the coarsest level is an offset",
    ),
    "perturbed flow": (
        [f"{P}.prediction=flow", f"{N}.perturbation=0.1"],
        f"{N}.perturbation",
        f"{P}.prediction",
        "would lead elsewhere",
    ),
    "share of no importance": (
        [f"{T}.even_share=0.1"],
        f"{T}.even_share",
        f"{T}.distribution",
        "has no effect without",
    ),
    "rate of nothing learnt": ([f"{W}.lr=0.1", f"{W}.kind=min_snr"], f"{W}.lr", f"{W}.kind", "has no effect without"),
    "aligned importance": (
        [f"{T}.distribution=importance", f"{P}.flow.aligned=true"],
        f"{T}.distribution",
        f"{P}.flow.aligned",
        "its own noise levels",
    ),
    "importance of equals": (
        [f"{T}.distribution=importance", f"{W}.kind=learned"],
        f"{T}.distribution",
        f"{W}.kind",
        "none stands out",
    ),
    "contrast of noise": (
        [f"{L}.contrast=0.05", f"{P}.prediction=epsilon"],
        f"{L}.contrast",
        f"{P}.prediction",
        "only a velocity tells",
    ),
    "contrast of the aligned": (
        [f"{L}.contrast=0.05", f"{P}.flow.aligned=true"],
        f"{L}.contrast",
        f"{P}.flow.aligned",
        "only a velocity tells",
    ),
    "contrast without bound": (
        [f"{L}.contrast=0.05", f"{P}.prediction=flow", f"{L}.kind=l1"],
        f"{L}.contrast",
        f"{L}.kind",
        "stay bounded",
    ),
    "contrast has no log": (
        [f"{L}.contrast=0.05", f"{P}.prediction=flow", f"{W}.kind=learned"],
        f"{L}.contrast",
        f"{W}.kind",
        "has no log",
    ),
    "contrast with nobody": (
        [f"{L}.contrast=0.05", f"{P}.prediction=flow", "train.global_batch_size=1"],
        f"{L}.contrast",
        "train.global_batch_size",
        "has no other",
    ),
    "pairing with nobody": (
        [f"{N}.pairing=optimal_transport", "train.global_batch_size=1"],
        f"{N}.pairing",
        "train.global_batch_size",
        "has one noise",
    ),
    "noise chosen twice": (
        [f"{N}.pairing=optimal_transport", f"{N}.candidates=4"],
        f"{N}.pairing",
        f"{N}.candidates",
        "each chooses the noise",
    ),
    "rescale of no guidance": (
        ["samples.guidance_rescale=0.5", "samples.guidance_scale=1.0"],
        "samples.guidance_rescale",
        "samples.guidance_scale",
        "guidance above 1",
    ),
    "zeros and a text": (
        ["samples.unconditional=zeros", "samples.negative_prompt=blurry"],
        "samples.unconditional",
        "samples.negative_prompt",
        "no text at all",
    ),
    "both and a text": (
        ["samples.unconditional=both", "samples.negative_prompt=blurry"],
        "samples.unconditional",
        "samples.negative_prompt",
        "empty negative prompt",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pair_that_does_not_go_together_is_one_line(name: str, mistakes: Callable[..., tuple[str, ...]]) -> None:
    overrides, first, second, reason = WRONG[name]
    lines = [line for line in mistakes(overrides=overrides) if reason in line]
    assert len(lines) == 1, mistakes(overrides=overrides)
    assert f"{first} = " in lines[0] and f"{second} = " in lines[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{P}.prediction=v_prediction", f"{P}.zero_terminal_snr=true", f"{W}.kind=min_snr", f"{W}.gamma=5.0"],
        [f"{P}.prediction=flow", f"{P}.flow.shift=resolution", f"{T}.distribution=logit_normal", f"{T}.stratified=yes"],
        [f"{P}.flow.aligned=true", f"{P}.flow.shift=2.5"],
        [f"{T}.distribution=laplace", f"{T}.std=0.7", f"{N}.candidates=4", f"{L}.kind=huber", f"{L}.delta=0.2"],
        [
            f"{P}.prediction=flow",
            f"{L}.contrast=0.05",
            f"{N}.pairing=optimal_transport",
            f"{T}.distribution=importance",
        ],
        [f"{W}.kind=learned", f"{W}.lr=0.005"],
        [*MASKED, f"{L}.unmasked_weight=0.1", f"{L}.unmasked_probability=0.1", f"{L}.normalize_masked_area=true"],
        [f"{N}.offset=0.0357", f"{N}.offset_probability=0.5", f"{N}.perturbation=0.1", f"{W}.kind=p2", f"{W}.k=1.0"],
    ],
)
def test_what_goes_together(overrides: list[str], load: Callable[..., Config]) -> None:
    assert load(overrides=overrides).objective != ObjectiveConfig()
