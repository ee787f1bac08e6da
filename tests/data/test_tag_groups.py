"""Groups of tags: their place, their chances, and that they are drawn by nothing but the seed."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from trainer.data.captions import CaptionRules, caption_record, compose
from trainer.data.tag_groups import TagGroup
from trainer.keyed import draw_seed

QUALITY = TagGroup("quality", ("masterpiece", "best quality", "absurdres"))
ARTISTS = TagGroup("artists", ("by a", "by b", "by c"), keep="last", take=1)
RECORD = caption_record("", "1girl, by b, best quality, solo, by a, masterpiece, smile")
DRAWS = 4000


def texts(rules: CaptionRules, record: bytes = RECORD) -> list[list[str]]:
    return [compose(record, rules, draw_seed(i), 0).split(", ") for i in range(DRAWS)]


def near(count: int, of: int, share: float) -> bool:
    return abs(count - of * share) < 4.5 * math.sqrt(of * share * (1 - share))


def test_groups_keep_their_place_while_others_are_shuffled() -> None:
    rules = CaptionRules(use="tags", shuffle_tags=True, keep_tokens=1, tag_groups=(QUALITY, ARTISTS))
    found = texts(rules)
    assert all(text[:3] == ["1girl", "best quality", "masterpiece"] for text in found)
    assert all(sorted(text[3:5]) == ["smile", "solo"] and len(text) == 6 for text in found)
    assert near(sum(text[3] == "smile" for text in found), DRAWS, 0.5)
    assert near(sum(text[5] == "by a" for text in found), DRAWS, 0.5)
    assert {text[5] for text in found} == {"by a", "by b"}


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_a_group_goes_as_a_whole_and_by_its_own_chance(rate: float) -> None:
    group = TagGroup("quality", QUALITY.tags, dropout=rate)
    found = texts(CaptionRules(use="tags", tag_dropout_rate=0.3, tag_groups=(group,)))
    present = [sum(tag in group.members for tag in text) for text in found]
    assert set(present) == {0, 2} and near(present.count(0), DRAWS, rate)
    without = Counter(tag for text in found for tag in text)
    assert near(DRAWS - without["solo"], DRAWS, 0.3)
    both = sum(not count and "solo" not in text for text, count in zip(found, present, strict=True))
    assert near(both, DRAWS, rate * 0.3)  # independent of one another


def test_as_many_as_asked_for_each_as_often() -> None:
    group = TagGroup("g", ("a", "b", "c", "d"), take=2)
    found = texts(CaptionRules(use="tags", tag_groups=(group,)), caption_record("", "d, x, c, b, a"))
    assert all(len(text) == 3 and text[2] == "x" for text in found)
    pairs = Counter(tuple(text[:2]) for text in found)
    assert set(pairs) == {("d", "c"), ("d", "b"), ("d", "a"), ("c", "b"), ("c", "a"), ("b", "a")}
    assert all(near(count, DRAWS, 1 / 6) for count in pairs.values())


def test_another_group_changes_nothing_of_a_draw() -> None:
    group = TagGroup("g", ("solo", "smile"), dropout=0.5)
    other = TagGroup("h", ("by a", "by b"), dropout=0.5)
    alone, beside = (texts(CaptionRules(use="tags", tag_groups=groups)) for groups in ((group,), (other, group)))
    assert ["solo" in text for text in alone] == ["solo" in text for text in beside]


def test_settled_texts_have_all_in_place() -> None:
    group = TagGroup("quality", QUALITY.tags, dropout=1.0)
    rules = CaptionRules(use="tags", shuffle_tags=True, tag_groups=(group, ARTISTS)).as_settled()
    expected = "best quality, masterpiece, 1girl, solo, smile, by b"
    assert compose(RECORD, rules, 5, 3) == expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (CaptionRules(use="both"), "A girl, alone., best quality, masterpiece, 1girl, solo, smile, by b, by a"),
        (
            CaptionRules(use="both", both_order="tags_first", both_separator=". "),
            "best quality, masterpiece, 1girl, solo, smile, by b, by a. A girl, alone.",
        ),
        (CaptionRules(use="caption"), "A girl, alone."),
        (CaptionRules(use="tags", prefix="sks,"), "best quality, masterpiece, sks, 1girl, solo, smile, by b, by a"),
    ],
)
def test_beside_captions_and_prefixes(rules: CaptionRules, expected: str) -> None:
    record = caption_record("A girl, alone.", "1girl, by b, best quality, solo, by a, masterpiece, smile")
    artists = TagGroup("artists", ARTISTS.tags, keep="last")
    grouped = replace(rules, tag_groups=(QUALITY, artists))
    assert not grouped.is_random
    assert {compose(record, grouped, seed, 0) for seed in range(20)} == {expected}


def test_what_is_random() -> None:
    assert CaptionRules(tag_groups=(ARTISTS,)).is_random
    assert CaptionRules(tag_groups=(TagGroup("q", ("a",), dropout=0.1),)).is_random
    assert not CaptionRules(tag_groups=(QUALITY,)).is_random
