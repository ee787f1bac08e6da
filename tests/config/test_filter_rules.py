"""Filters that would do nothing, or leave nothing: one line with the keys."""

from collections.abc import Callable

import pytest

from trainer.config.schema import Config

F = "data.filters"
SCORED = "data.sources=[{type: kohya_json, path: c.yaml, latents: more, score_field: s}]"
TAGGED = "data.sources=[{path: photos, caption_files_hold: tags}]"

WRONG: dict[str, tuple[list[str], tuple[str, ...], str]] = {
    # overrides; the keys that are named; the reason
    "no aspect": ([f"{F}.min_aspect=2.0", f"{F}.max_aspect=0.5"], (f"{F}.min_aspect = 2.0",), "would leave out every"),
    "no length": (
        [f"{F}.min_caption_chars=20", f"{F}.max_caption_chars=10"],
        (f"{F}.min_caption_chars = 20", f"{F}.max_caption_chars = 10"),
        "would leave out every image",
    ),
    "no score": ([SCORED, f"{F}.min_score=5.0", f"{F}.max_score=4.0"], (f"{F}.min_score = 5.0",), "every image"),
    "score of nothing": ([f"{F}.min_score=5.0"], (f"{F}.min_score = 5.0",), "no source has a `score_field` or"),
    "a tag twice": (
        [TAGGED, f"{F}.tags_include=[a, b]", f"{F}.tags_exclude=[b]"],
        (f"{F}.tags_include", f"{F}.tags_exclude"),
        "both name `b`",
    ),
    "tags of captions": (
        [f"{F}.tags_exclude=[b]"],
        (f"{F}.tags_exclude", "data.sources.0.caption_files_hold = caption (the default)"),
        "if the files hold tags, write `tags`",
    ),
    "latents do not look alike": (
        [SCORED, f"{F}.near_duplicates=4"],
        (f"{F}.near_duplicates = 4",),
        "has no effect on latents",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(name: str, mistakes: Callable[..., tuple[str, ...]]) -> None:
    overrides, keys, reason = WRONG[name]
    (line,) = mistakes(overrides=overrides)
    assert reason in line and all(key in line for key in keys), line


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{F}.min_side_px=512", f"{F}.min_aspect=0.5", f"{F}.max_aspect=2.0", f"{F}.near_duplicates=0"],
        [TAGGED, f"{F}.tags_include=[a, b]", f"{F}.tags_exclude=[c]", f"{F}.max_caption_chars=10"],
        [SCORED, f"{F}.min_score=5.0", f"{F}.max_score=5.0"],
        [SCORED],
    ],
)
def test_what_goes_together(overrides: list[str], load: Callable[..., Config]) -> None:
    assert load(overrides=overrides).data.filters.is_on or overrides == [SCORED]
