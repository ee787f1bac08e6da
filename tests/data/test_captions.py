"""Texts from records: kohya's order of operations, what is kept and dropped, and that a draw is a draw."""

import json
import math
import pickle
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.captions import CaptionRules, caption_record, compose, is_record
from trainer.keyed import draw_seed

TAGS = [f"tag {i}" for i in range(12)]
TEXT = ", ".join(TAGS)
BIG = caption_record("", TEXT)


def kohya(caption: str, rules: CaptionRules, rng: random.Random, epoch: int) -> str:
    """What sd-scripts documents for a subset, in its order; `epoch` counts from 1."""
    if rules.prefix:
        caption = rules.prefix + " " + caption
    if rules.suffix:
        caption = caption + " " + rules.suffix
    is_drop_out = rules.dropout_rate > 0 and rng.random() < rules.dropout_rate
    every = rules.dropout_every_n_epochs
    if is_drop_out or (every > 0 and epoch % every == 0):
        return ""
    if rules.wildcards:
        if "\n" in caption:
            caption = rng.choice(caption.split("\n"))
        caption = caption.replace("{{", "⦅").replace("}}", "⦆")
        caption = re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match.group(1).split("|")), caption)
        caption = caption.replace("⦅", "{").replace("⦆", "}")
    else:
        caption = caption.split("\n")[0]
    if rules.shuffle_tags or rules.tag_dropout_rate > 0:
        fixed: list[str] = []
        fixed_suffix: list[str] = []
        keep, separator = rules.keep_tokens_separator, rules.tag_separator
        if keep and keep in caption:
            fixed_part, flex_part = caption.split(keep, 1)
            if keep in flex_part:
                flex_part, suffix_part = flex_part.split(keep, 1)
                fixed_suffix = [t.strip() for t in suffix_part.split(separator) if t.strip()]
            fixed = [t.strip() for t in fixed_part.split(separator) if t.strip()]
            flex = [t.strip() for t in flex_part.split(separator) if t.strip()]
        else:
            tokens = [t.strip() for t in caption.strip().split(separator)]
            flex = tokens[:]
            if rules.keep_tokens > 0:
                fixed, flex = tokens[: rules.keep_tokens], tokens[rules.keep_tokens :]
        if rules.shuffle_tags:
            rng.shuffle(flex)
        flex = [t for t in flex if rules.tag_dropout_rate <= 0 or rng.random() >= rules.tag_dropout_rate]
        caption = ", ".join(fixed + flex + fixed_suffix)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.tag_separator)
    return caption


DOCUMENTED = CaptionRules(
    use="tags",
    keep_tokens_separator="|||",
    shuffle_tags=True,
    tag_dropout_rate=0.1,
    secondary_separator=";;;",
    wildcards=True,
    prefix="1girl, miku |||",
    suffix=", screencap ||| masterpiece, rating: general",
)
"""The example of sd-scripts' documentation of subsets."""


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("a, b, c", CaptionRules()),
        ("a,b,c", CaptionRules(prefix="x,", suffix=", y")),
        ("a, b, c", CaptionRules(shuffle_tags=True)),
        ("a, b, c, d", CaptionRules(shuffle_tags=True, keep_tokens=2)),
        ("a, b", CaptionRules(shuffle_tags=True, keep_tokens=5)),
        ("a, b, c", CaptionRules(shuffle_tags=True, prefix="trigger", suffix="end")),
        ("a, b, c", CaptionRules(shuffle_tags=True, prefix="trigger,", keep_tokens=1)),
        ("a, b ||| c, d, e ||| f, g", CaptionRules(shuffle_tags=True, keep_tokens_separator="|||")),
        ("a, b ||| c, d, e", CaptionRules(shuffle_tags=True, keep_tokens_separator="|||", keep_tokens=3)),
        ("||| c, d |||", CaptionRules(shuffle_tags=True, keep_tokens_separator="|||")),
        ("a, b, c, d", CaptionRules(shuffle_tags=True, keep_tokens_separator="|||", keep_tokens=1)),
        ("a, b, c", CaptionRules(tag_dropout_rate=0.5)),
        ("a, b, c", CaptionRules(tag_dropout_rate=0.5, keep_tokens=1)),
        ("a, b ||| c ||| d", CaptionRules(tag_dropout_rate=0.5, keep_tokens_separator="|||")),
        ("a", CaptionRules(tag_dropout_rate=0.5)),
        ("a, b, c", CaptionRules(shuffle_tags=True, tag_dropout_rate=0.4)),
        ("a, sky;;;day, b", CaptionRules(secondary_separator=";;;")),
        ("a, sky;;;day, b", CaptionRules(secondary_separator=";;;", shuffle_tags=True, tag_dropout_rate=0.3)),
        ("a;b ;c", CaptionRules(tag_separator=";", shuffle_tags=True)),
        ("a;x/y;c", CaptionRules(tag_separator=";", secondary_separator="/", shuffle_tags=True)),
        ("a, {b|c} d, {{e}}", CaptionRules(wildcards=True)),
        ("a, {b|c, d}, e", CaptionRules(wildcards=True, shuffle_tags=True)),
        ("a, {b|c}\nd, e\nf", CaptionRules(wildcards=True)),
        ("a\nb\nc", CaptionRules()),
        ("a", CaptionRules(wildcards=True, prefix="{p|q}", suffix="{{r}}")),
        ("a, b", CaptionRules(dropout_rate=0.5)),
        ("a, b", CaptionRules(dropout_rate=0.5, prefix="p", shuffle_tags=True)),
        ("a, {b|c}", DOCUMENTED),
        ("a, sky;;;day", DOCUMENTED),
    ],
)
def test_the_texts_are_those_of_kohya(text: str, rules: CaptionRules) -> None:
    """All of its texts and no others, and about as often."""
    draws, rules = 3000, replace(rules, use="tags")
    expected = Counter(kohya(text, rules, random.Random(i), 1) for i in range(draws))
    record = caption_record("", text)
    found = Counter(compose(record, rules, draw_seed(i), 0) for i in range(draws))
    for outcome in expected | found:
        e, f = expected[outcome], found[outcome]
        assert abs(e - f) <= 5 * math.sqrt(e + f) + 3, (outcome, e, f)


def test_every_n_th_epoch_is_without_text() -> None:
    rules = CaptionRules(dropout_every_n_epochs=3, prefix="p")
    texts = [compose(caption_record("a"), rules, 5, epoch) for epoch in range(7)]
    assert texts == [kohya("a", rules, random.Random(0), epoch + 1) for epoch in range(7)]
    assert texts == ["p a", "p a", "", "p a", "p a", "", "p a"]


BOTH = caption_record("A girl, on a bench.", "1girl, solo, smile")


@pytest.mark.parametrize(
    ("record", "rules", "expected"),
    [
        (BOTH, CaptionRules(), "A girl, on a bench."),
        (BOTH, CaptionRules(use="tags"), "1girl, solo, smile"),
        (BOTH, CaptionRules(use="both"), "A girl, on a bench., 1girl, solo, smile"),
        (
            BOTH,
            CaptionRules(use="both", both_order="tags_first", both_separator=". "),
            "1girl, solo, smile. A girl, on a bench.",
        ),
        (BOTH, CaptionRules(use="both", prefix="p", suffix="s"), "p A girl, on a bench., 1girl, solo, smile s"),
        (BOTH, CaptionRules(use="mix", caption_probability=1.0), "A girl, on a bench."),
        (BOTH, CaptionRules(use="mix", caption_probability=0.0), "1girl, solo, smile"),
        *(
            (record, CaptionRules(use=use), text)
            for use in ("caption", "tags", "both", "mix")
            for record, text in [
                (caption_record("only a caption"), "only a caption"),
                (caption_record("", "only, tags"), "only, tags"),
                (caption_record("  ", "only, tags"), "only, tags"),
                ('{"tags":"only, tags"}', "only, tags"),
                ('{"caption":null,"tags":"only, tags"}', "only, tags"),
                ('{"caption":"only a caption","tags":null}', "only a caption"),
                (caption_record(""), ""),
                ("{}", ""),
            ]
        ),
        (caption_record("\n first \n\nsecond"), CaptionRules(prefix="p", suffix="s"), "p first s"),
        (caption_record(""), CaptionRules(prefix="sks girl"), "sks girl"),
        (caption_record("", "a,, b, ,"), CaptionRules(use="tags", shuffle_tags=True, settled=True), "a, b"),
    ],
)
def test_where_the_text_comes_from(record: str, rules: CaptionRules, expected: str) -> None:
    assert compose(record, rules, 1, 0) == expected


@pytest.mark.parametrize("use", ["caption", "tags", "both", "mix"])
def test_tags_alone_with_wildcards_are_no_empty_text(use: Any) -> None:
    """sd-scripts #2388 trained on empty captions there."""
    rules = CaptionRules(use=use, wildcards=True)
    texts = {compose(caption_record("", "1girl, {a|b}"), rules, seed, 0) for seed in range(50)}
    assert texts == {"1girl, a", "1girl, b"}


@pytest.mark.parametrize("order", ["caption_first", "tags_first"])
@pytest.mark.parametrize("separator", [", ", ". ", " "])
def test_a_caption_beside_tags_is_never_cut(order: Any, separator: str) -> None:
    rules = CaptionRules(
        use="both",
        both_order=order,
        both_separator=separator,
        shuffle_tags=True,
        tag_dropout_rate=0.2,
        keep_tokens=1,
        prefix="p,",
    )
    caption = "A girl, on a bench, smiles."
    for seed in range(200):
        text = compose(caption_record(caption, TEXT), rules, seed, 0)
        if order == "caption_first":
            start = f"p, {caption}{separator}{TAGS[0]}"  # the prefix stays, and one tag is kept
            assert text.startswith(start)
            rest = text[len(start) :].split(", ")[1:]
        else:
            assert text.endswith(f"{separator}{caption}") and text.startswith("p, ")
            rest = text.removesuffix(f"{separator}{caption}").split(", ")[1:]
        assert set(rest) <= set(TAGS) and len(rest) == len(set(rest))


def test_a_caption_alone_is_not_cut_and_keep_separators_go() -> None:
    rules = CaptionRules(shuffle_tags=True, keep_tokens_separator="|||", prefix="miku |||", suffix="||| anime")
    assert compose(caption_record("A girl, sitting, alone."), rules, 3, 0) == "miku, A girl, sitting, alone., anime"
    both = replace(rules, use="both", suffix="")
    texts = {compose(caption_record("A, b.", "x, y"), both, seed, 0) for seed in range(20)}
    assert texts == {"miku, A, b., x, y", "miku, A, b., y, x"}


@given(
    st.lists(st.sampled_from([*TAGS, "ü", "a b", "😀"]), max_size=30),
    st.integers(0, 5),
    st.integers(0, 2**63 - 1),
)
def test_a_shuffle_loses_and_adds_nothing(tags: list[str], keep: int, seed: int) -> None:
    record = caption_record("", ", ".join(tags))
    found = compose(record, CaptionRules(use="tags", shuffle_tags=True, keep_tokens=keep), seed, 0)
    shuffled = found.split(", ") if found else []
    assert Counter(shuffled) == Counter(tags) and shuffled[:keep] == tags[:keep]


def test_every_order_is_as_likely() -> None:
    rules = CaptionRules(use="tags", shuffle_tags=True)
    counts = Counter(compose(caption_record("", "a, b, c, d"), rules, draw_seed(i), 0) for i in range(12_000))
    assert len(counts) == 24
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 60  # chi square of 23: 1 in 30,000


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_rates(rate: float) -> None:
    draws = 4000

    def assert_near(count: int, of: int, share: float) -> None:
        assert abs(count - of * share) < 4.5 * math.sqrt(of * share * (1 - share))

    texts = [compose(caption_record("a"), CaptionRules(dropout_rate=rate), draw_seed(i), 0) for i in range(draws)]
    assert_near(texts.count(""), draws, rate)
    rules = CaptionRules(use="tags", tag_dropout_rate=rate, keep_tokens=2)
    counts = Counter(tag for i in range(draws) for tag in compose(BIG, rules, draw_seed(i), 0).split(", "))
    assert counts[TAGS[0]] == counts[TAGS[1]] == draws
    for tag in TAGS[2:]:
        assert_near(draws - counts[tag], draws, rate)
    mixed = Counter(
        compose(BOTH, CaptionRules(use="mix", caption_probability=rate), draw_seed(i), 0) for i in range(draws)
    )
    assert_near(mixed["A girl, on a bench."], draws, rate)


def test_a_draw_is_a_function_of_its_seed() -> None:
    rules = CaptionRules(use="tags", shuffle_tags=True, tag_dropout_rate=0.1, wildcards=True)
    seeds = [draw_seed(0, "caption", epoch, "photos/1", 0) for epoch in range(8)]
    texts = [compose(BIG, rules, seed, 0) for seed in seeds]
    assert texts == [compose(BIG.decode(), pickle.loads(pickle.dumps(rules)), seed, 0) for seed in seeds]
    assert len(set(texts)) == len(texts)


def test_texts_never_change() -> None:
    """A run that goes on with a later version goes on with the same texts."""
    numbers = compose(BIG, CaptionRules(use="tags", shuffle_tags=True), 7, 0).replace("tag ", "")
    assert numbers == "6, 7, 9, 4, 0, 11, 8, 10, 2, 3, 1, 5"
    rules = CaptionRules(use="tags", wildcards=True, tag_dropout_rate=0.3, dropout_rate=0.2)
    texts = [compose(caption_record("", "{a|b|c}, d, e"), rules, seed, 0) for seed in range(6)]
    assert texts == ["b, e", "c, d, e", "", "", "a, e", "b, d"]


@pytest.mark.parametrize(
    ("rules", "is_random"),
    [
        (CaptionRules(), False),
        (CaptionRules(use="both", prefix="p", suffix="s", secondary_separator=";;;"), False),
        (CaptionRules(use="mix"), True),
        (CaptionRules(use="mix", caption_probability=1.0), False),
        (CaptionRules(wildcards=True), True),
        (CaptionRules(shuffle_tags=True), True),
        (CaptionRules(tag_dropout_rate=0.1), True),
        (CaptionRules(dropout_rate=0.1), True),
        (CaptionRules(dropout_every_n_epochs=2), True),
    ],
)
def test_what_is_random(rules: CaptionRules, is_random: bool) -> None:
    assert rules.is_random == is_random
    assert not rules.as_settled().is_random
    record = caption_record("a {b|c}\nd", "e, {f|g}, h\ni")
    settled = {compose(record, rules.as_settled(), seed, seed) for seed in range(40)}
    assert len(settled) == 1
    if not is_random:
        assert settled == {compose(record, rules, 1, 1)}


def test_settled_texts_are_as_written() -> None:
    rules = CaptionRules(
        use="mix",
        wildcards=True,
        shuffle_tags=True,
        tag_dropout_rate=0.9,
        keep_tokens_separator="|||",
        dropout_rate=1.0,
        dropout_every_n_epochs=1,
        prefix="{x|y},",
    ).as_settled()
    assert compose(caption_record("a {b|c}\nd", "e"), rules, 0, 0) == "x, a b"
    assert compose(caption_record("", "e ||| {f|g}, h ||| i"), rules, 0, 0) == "x, e, f, h, i"


@given(st.text(), st.text(), st.integers(0, 2**63 - 1))
def test_no_text_is_too_odd(caption: str, tags: str, seed: int) -> None:
    record = json.dumps({"caption": caption, "tags": tags})
    rules = CaptionRules(use="both", wildcards=True, shuffle_tags=True, tag_dropout_rate=0.3, keep_tokens_separator="|")
    compose(record, rules, seed, 0)


def test_records() -> None:
    assert caption_record("ü") == '{"caption":"ü"}'.encode()
    assert json.loads(caption_record("a", "b, c")) == {"caption": "a", "tags": "b, c"}


WEIGHTED = caption_record((("a", 1.0), ("b, c", 5.0), ("d", 0.5), ("e", 3.5)))


def test_captions_are_drawn_by_their_weights() -> None:
    assert json.loads(WEIGHTED) == {"captions": [["a", 1.0], ["b, c", 5.0], ["d", 0.5], ["e", 3.5]]}
    draws, rules = 8000, CaptionRules(several="random", prefix="p")
    counts = Counter(compose(WEIGHTED, rules, draw_seed(0, "caption", i, "x", 0), 0) for i in range(draws))
    for text, share in {"p a": 0.1, "p b, c": 0.5, "p d": 0.05, "p e": 0.35}.items():
        assert abs(counts.pop(text) - draws * share) < 4.5 * math.sqrt(draws * share * (1 - share))
    assert not counts
    for settled in (rules.as_settled(), CaptionRules(prefix="p")):
        assert {compose(WEIGHTED, settled, seed, 0) for seed in range(20)} == {"p a"}


def test_lines_are_drawn_alike_and_as_wildcards_draw_them() -> None:
    record = caption_record("a\nb {x|y}\nc", "t\nu")
    seeds = [draw_seed(i) for i in range(6000)]
    drawn = [compose(record, CaptionRules(several="random"), seed, 0) for seed in seeds]
    assert all(abs(count - 2000) < 4.5 * math.sqrt(6000 * 2 / 9) for count in Counter(drawn).values())
    assert set(drawn) == {"a", "b {x|y}", "c"}
    wild = [compose(record, CaptionRules(wildcards=True), seed, 0) for seed in seeds]
    assert [text[0] for text in wild] == [text[0] for text in drawn]


def test_weighted_draws_never_change() -> None:
    texts = [compose(WEIGHTED, CaptionRules(several="random"), seed, 0) for seed in range(12)]
    assert texts == ["b, c", "e", "b, c", "b, c", "b, c", "b, c", "b, c", "e", "b, c", "e", "a", "b, c"]
    assert CaptionRules(several="random").is_random and not CaptionRules(several="random").as_settled().is_random


def test_a_caption_of_several_beside_tags() -> None:
    record = caption_record((("a, b.", 1.0), ("c.", 3.0)), "x, y", 0.5)
    assert json.loads(record)["loss_weight"] == 0.5
    rules = CaptionRules(use="both", several="random", shuffle_tags=True)
    texts = {compose(record, rules, draw_seed(i), 0) for i in range(200)}
    assert texts == {"a, b., x, y", "a, b., y, x", "c., x, y", "c., y, x"}


@pytest.mark.parametrize(
    "altered",
    ["[]", "[[]]", '["a"]', '[["a"]]', '[["a", "1"]]', '[["a", 0]]', '[["a", -1]]', '[["a", true]]', '[["a", NaN]]',
     '[["a", Infinity]]', '[["a", 1, 2]]', '[[1, 1]]', '{"a": 1}', '"a"', "null"],
)  # fmt: skip
def test_altered_captions_are_no_record(altered: str) -> None:
    assert not is_record(json.loads(f'{{"captions": {altered}}}'))
    assert not is_record(json.loads(f'{{"caption": {altered}}}')) or altered in ('"a"', "null")


def test_what_is_a_record() -> None:
    assert is_record(json.loads(WEIGHTED)) and is_record({"caption": None, "tags": "a", "loss_weight": 2})
    assert not is_record([]) and not is_record({"caption": 1}) and not is_record({"loss_weight": "1"})
