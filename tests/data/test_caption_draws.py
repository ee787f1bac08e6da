"""Which of several captions, and which tags of a group, an image gets: the same for any number of readers and workers,
after a resume, and in what is shown before."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.small_set import byte_tokens, write_small_set
from trainer.cli.main import main
from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules, caption_record, compose
from trainer.data.loader import BatchReader, open_loader
from trainer.data.sampler import Position
from trainer.data.store.shard_reader import ShardError, _check_caption
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.caption_survey import sampled_records, survey_captions
from trainer.data.survey.stats import sample
from trainer.data.tag_groups import TagGroup
from trainer.keyed import draw_seed

SEED, SQUARE, WIDE = 7, Bucket(64, 64), Bucket(64, 128)
CAPTIONS = (("a cat", 1.0), ("a pet", 2.0), ("cats, one", 3.0))
TAGS = "x, good, y, z, best"
RULES = CaptionRules(
    use="mix",
    several="random",
    shuffle_tags=True,
    tag_groups=(TagGroup("quality", ("good", "best"), dropout=0.3, take=1),),
)


def _record(number: int) -> bytes:
    return caption_record(CAPTIONS, TAGS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    root = tmp_path_factory.mktemp("prepared")
    return PreparedSet.open(write_small_set(root, {SQUARE: 11, WIDE: 6}, repeats=2, record=_record))


def _steps(
    prepared: PreparedSet, position: Position, workers: int = 0, rank: int = 0, world: int = 1
) -> Iterator[tuple[Position, dict[tuple[int, int], str]]]:
    """Of each step the position behind it, and the texts by epoch and draw seed of the row."""
    reader = BatchReader(prepared, "train", SEED, byte_tokens, captions=RULES)
    cut = {"rank": rank, "world": world, "micro_batch": 4 // world, "accumulation": 1}
    with open_loader(reader, position, **cut, workers=workers, prefetch_batches=3, pin_memory=False) as loader:
        for step in loader:
            found = {}
            for batch in step.batches:
                assert batch.input_ids is not None
                for seed, ids, weight in zip(batch.draw_seeds.tolist(), batch.input_ids, batch.weights, strict=True):
                    if weight:
                        found[step.epoch, seed] = bytes(ids[0][ids[0] > 0].tolist()).decode()
            yield step.position_after, found


def _epochs(prepared: PreparedSet, count: int, **how: int) -> dict[tuple[int, int], str]:
    found = {}
    for position, texts in _steps(prepared, Position.start(2, 4), **how):
        found |= texts
        if position.epoch == count:
            return found
    raise AssertionError("the loader has ended")


def test_draws_follow_from_seed_epoch_key_and_repeat(prepared: PreparedSet) -> None:
    found = _epochs(prepared, 3)
    assert len(found) == 3 * 34
    for bucket, images in (("64x64", 11), ("64x128", 6)):
        for epoch, image, repeat in ((e, i, r) for e in range(3) for i in range(images) for r in range(2)):
            of = (epoch, f"{bucket}/{image}", repeat)
            assert found[epoch, draw_seed(SEED, "draw", *of)] == compose(
                _record(image), RULES, draw_seed(SEED, "caption", *of), epoch
            )
    assert set(found.values()) > {text for text, _ in CAPTIONS}
    tags = [text.split(", ") for text in found.values() if "x" in text.split(", ")]
    assert all(sorted(text)[-3:] == ["x", "y", "z"] and set(text[:-3]) <= {"good", "best"} for text in tags)
    assert {len(text) for text in tags} == {3, 4}


def test_workers_and_a_resume_change_no_draw(prepared: PreparedSet) -> None:
    expected = _epochs(prepared, 2)
    shared = _epochs(prepared, 2, rank=0, world=2) | _epochs(prepared, 2, rank=1, world=2)
    assert shared == expected
    position, found = Position.start(2, 4), {}
    while position.epoch < 2:  # two steps, and a start from what was saved
        for _, (after, texts) in zip(range(2), _steps(prepared, position), strict=False):
            position = after
            found |= {place: text for place, text in texts.items() if place[0] < 2}
    assert found == expected


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [1, 3])
def test_reader_processes_change_no_draw(prepared: PreparedSet, workers: int) -> None:
    assert _epochs(prepared, 2, workers=workers) == _epochs(prepared, 2)


def test_what_is_shown_is_what_is_trained(prepared: PreparedSet, capsys: pytest.CaptureFixture[str]) -> None:
    survey = survey_captions(sampled_records(prepared), RULES, SEED, 3)
    found = _epochs(prepared, 2)
    assert len(survey.examples) == 3 and survey.with_several == survey.with_tags == len(survey.texts)
    for example in survey.examples:
        seeds = [draw_seed(SEED, "draw", epoch, example.key, 0) for epoch in (0, 1)]
        assert example.texts == tuple(found[epoch, seed] for epoch, seed in enumerate(seeds))
    *_, last = sample(prepared, 5, RULES)
    assert last is not None and set(last.texts) == {"a cat"}
    tags = CaptionRules(use="tags", tag_groups=RULES.tag_groups)
    *_, last = sample(prepared, 5, tags)
    assert last is not None and set(last.texts) == {"good, x, y, z"}
    assert main(["data", "stats", str(prepared.path)]) == 0
    assert capsys.readouterr().out


def test_records_that_somebody_altered_are_refused() -> None:
    _check_caption(_record(0))
    for captions in ([], [["a"]], [["a", "1"]], [["a", 0]], "a", {"a": 1}):
        with pytest.raises(ShardError, match="no record of a caption"):
            _check_caption(json.dumps({"captions": captions}).encode())


def test_an_alteration_in_a_shard_costs_its_row(tmp_path: Path) -> None:
    root = write_small_set(
        tmp_path / "p", {SQUARE: 3}, record=lambda i: b'{"captions":[["a",-1]]}' if i == 1 else _record(i)
    )
    opened = PreparedSet.open(root)
    assert [opened.read_record("train", 0, row) is not None for row in range(3)] == [True, False, True]
