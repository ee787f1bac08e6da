"""Loss weights that would do nothing, or that say two things: one line with both keys."""

from collections.abc import Callable

import pytest

from trainer.config.schema import Config

W, B = "objective.loss_weights", "objective.loss_weights.tag_balance"
TAGGED = "data.sources=[{path: photos, caption_files_hold: tags}, {path: more}]"


def sources(*options: str) -> str:
    entries = [f"{{path: {path}, {option}}}" for path, option in zip(("photos", "more"), options, strict=False)]
    return f"data.sources=[{', '.join(entries)}]"


WRONG: dict[str, tuple[list[str], tuple[str, ...], str]] = {
    # overrides; the keys that are named; the reason
    "prior of weight 1": (
        [sources("repeats: 2", "prior: true")],
        ("data.sources.1.prior = true", f"{W}.prior = 1.0 (the default)"),
        "give another weight, or leave `prior` out",
    ),
    "no prior": ([f"{W}.prior=0.5"], (f"{W}.prior = 0.5", "data.sources.0.prior = false"), "no source has `prior"),
    "two weights": (
        [sources("repeats: 2", "prior: true, loss_weight: 0.3"), f"{W}.prior=0.5"],
        ("data.sources.1.loss_weight = 0.3", "data.sources.1.prior = true"),
        "give only one of them",
    ),
    "one source": ([sources("loss_weight: 0.5")], ("data.sources.0.loss_weight = 0.5",), "has next to no effect"),
    "all alike": (
        [sources("loss_weight: 0.5", "loss_weight: 0.5")],
        ("data.sources.0.loss_weight = 0.5", "data.sources.1.loss_weight = 0.5"),
        "all sources count the same",
    ),
    "all prior": ([sources("prior: true"), f"{W}.prior=0.5"], ("data.sources.0.prior = true",), "count the same"),
    "no own weights": ([f"{W}.per_image=false"], (f"{W}.per_image = false",), "has no effect; no source has a `weight"),
    "ending without a dot": (
        [sources("weight_extension: weight")],
        ("data.sources.0.weight_extension = weight",),
        "must be a dot and an ending",
    ),
    "one file for both": (
        [sources("weight_extension: .txt")],
        ("data.sources.0.weight_extension = .txt", "data.sources.0.caption_extension = .txt"),
        "files of their own",
    ),
    "bounds of nothing": ([TAGGED, f"{B}.min=0.5"], (f"{B}.min = 0.5", f"{B}.power = 0.0"), "without a `power`"),
    "upper bound of nothing": ([TAGGED, f"{B}.max=2.0"], (f"{B}.max = 2.0", f"{B}.power = 0.0"), "without a `power`"),
    "no room": (
        [TAGGED, f"{B}.power=0.5", f"{B}.min=1.0", f"{B}.max=1.0"],
        (f"{B}.min = 1.0", f"{B}.max = 1.0"),
        "weigh the same",
    ),
    "no tags to balance": (
        [f"{B}.power=0.5"],
        (f"{B}.power = 0.5", "data.sources.0.caption_files_hold = caption (the default)"),
        "if the files hold tags, write `tags`",
    ),
    "no tags to weigh": (
        [f"{W}.tag_file=c.yaml"],
        (f"{W}.tag_file = c.yaml", "data.sources.0.caption_files_hold"),
        "if the files hold tags",
    ),
    "no file": ([TAGGED, f"{W}.tag_file=none.csv"], (f"{W}.tag_file = none.csv",), "no such file"),
    "0": ([sources("loss_weight: 0")], ("data.sources.0.loss_weight = 0",), "must be greater than 0"),
    "too much": ([sources("loss_weight: 101")], ("data.sources.0.loss_weight = 101",), "at most 100"),
    "text": ([sources("loss_weight: half")], ("data.sources.0.loss_weight = half",), "must be a number"),
    "not a number": ([sources("loss_weight: .nan")], ("data.sources.0.loss_weight = .nan",), "must be"),
    "steep": ([TAGGED, f"{B}.power=1.5"], (f"{B}.power = 1.5",), "at most 1"),
    "least above 1": ([TAGGED, f"{B}.power=1.0", f"{B}.min=2.0"], (f"{B}.min = 2.0",), "at most 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(name: str, mistakes: Callable[..., tuple[str, ...]]) -> None:
    overrides, keys, reason = WRONG[name]
    (line,) = mistakes(overrides=overrides)
    assert reason in line and all(key in line for key in keys), line


@pytest.mark.parametrize(
    "overrides",
    [
        [sources("repeats: 2", "prior: true"), f"{W}.prior=0.5"],
        [sources("loss_weight: 2", "loss_weight: 0.01")],
        [sources("weight_extension: .weight"), f"{W}.per_image=false"],
        [TAGGED, f"{B}.power=0.5", f"{B}.max=2.0", f"{W}.tag_file=c.yaml", "captions.tag_separator=;"],
        ["data.sources=[{type: kohya_json, path: c.yaml, latents: more, weight_field: w}]", f"{B}.power=1.0"],
        ["data.sources=[{type: latent_tars, metadata: c.yaml, tars: more, weight_field: w, loss_weight: 1.0}]"],
        ["data.sources=[{type: parquet, files: more, weight_column: w}, {type: hf, path: x/y, weight_column: w}]"],
        ["data.sources=[{type: webdataset, tars: more, weight_field: w}]", f"{W}.per_image=false"],
    ],
)
def test_what_goes_together(overrides: list[str], load: Callable[..., Config]) -> None:
    load(overrides=overrides)
