"""Captions, tags and what lies beside images: one line for what would do nothing or says two things."""

from collections.abc import Callable

import pytest

from trainer.config.load import to_yaml
from trainer.config.schema import Config

G = "captions.tag_groups"
AT = "data.sources.0"
TAGGED = "data.sources=[{path: photos, caption_files_hold: tags}]"
JSON = "data.sources=[{path: photos, caption_extension: .json}]"
CACHED = "data.cache_text=true"


def source(options: str) -> str:
    return f"data.sources=[{{path: photos, {options}}}]"


def groups(*entries: str) -> str:
    return f"{G}=[{', '.join(f'{{{entry}}}' for entry in entries)}]"


WRONG: dict[str, tuple[list[str], str, str]] = {
    # overrides; what is named; the reason
    "tags twice": ([source("caption_files_hold: tags, tags_extension: .tags")], f"{AT}.tags_extension", "only one"),
    "json and tags": ([source("caption_files_hold: tags, caption_extension: .json")], f"{AT}.caption_ext", "only one"),
    "no dot": ([source("tags_extension: tags")], f"{AT}.tags_extension = tags", "a dot and an ending, such as .tags"),
    "one file for both": ([source("tags_extension: .txt")], f"{AT}.caption_extension = .txt", "files of their own"),
    "weights of both": (
        [source("tags_extension: .w, weight_extension: .w")],
        f"{AT}.weight_extension = .w",
        "files of their own",
    ),
    "field of no json": ([source("tags_field: labels")], f"{AT}.tags_field = labels", "no effect without `.json`"),
    "weight of no json": ([source("weight_field: w")], f"{AT}.weight_field = w", "no effect without `.json`"),
    "two weights": (
        [source("caption_extension: .json, weight_field: w, weight_extension: .weight")],
        f"{AT}.weight_extension = .weight",
        "give only one of them",
    ),
    "several, cached": ([CACHED, "captions.several=random"], "captions.several = random", "the same at each draw"),
    "group, cached": (
        [TAGGED, CACHED, groups("name: a, tags: [x], dropout: 0.5")],
        f"{G}.0.dropout = 0.5",
        "the same at each draw",
    ),
    "group without tags in the data": ([groups("name: a, tags: [x]")], G, "if the files hold tags, write `tags`"),
    "one name": ([TAGGED, groups("name: a, tags: [x]", "name: a, tags: [y]")], f"{G}.1.name = a", "its own name"),
    "one tag": ([TAGGED, groups("name: a, tags: [x]", "name: b, tags: [x]")], f"{G}.1.tags", "x is in both"),
    "no tag": ([TAGGED, groups("name: a, tags: ['x, y']")], f"{G}.0.tags", "can be no tag"),
    "blank": ([TAGGED, groups("name: a, tags: [' x']")], f"{G}.0.tags", "can be no tag"),
    "all taken": ([TAGGED, groups("name: a, tags: [x], take: 1")], f"{G}.0.take = 1", "the group has no more tags"),
    "empty": ([TAGGED, groups("name: a, tags: []")], f"{G}.0.tags", "must have at least 1"),
    "nameless": ([TAGGED, groups("tags: [x]")], f"{G}.0.name", "missing"),
    "a section": ([TAGGED, f"{G}={{quality: {{tags: [x]}}}}"], G, "must be a list"),
    "misspelt": ([TAGGED, groups("name: a, tags: [x], drop_out: 0.5")], f"{G}.0.drop_out", "did you mean `dropout`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(name: str, mistakes: Callable[..., tuple[str, ...]]) -> None:
    overrides, named, reason = WRONG[name]
    (line,) = mistakes(overrides=overrides)
    assert named in line and reason in line, line


@pytest.mark.parametrize(
    "overrides",
    [
        [JSON, "captions.use=both", "captions.shuffle_tags=true", "captions.several=random"],
        [source("tags_extension: .tags"), "captions.use=mix", "objective.loss_weights.tag_balance.power=0.5"],
        [source("caption_extension: .JSON, caption_field: text, captions_field: texts, weight_field: w")],
        [TAGGED, groups("name: a, tags: [x, y], keep: last, take: 1, dropout: 0.5"), "captions.keep_tokens=1"],
        [TAGGED, CACHED, groups("name: a, tags: [x, y]")],
        [TAGGED, groups("name: a, tags: ['x, y']"), "captions.tag_separator=;"],
    ],
)
def test_what_goes_together(overrides: list[str], load: Callable[..., Config]) -> None:
    config = load(overrides=overrides)
    assert load(to_yaml(config)).captions == config.captions
