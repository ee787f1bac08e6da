"""What a look at the captions finds: empty texts, tags, and the very texts of the first epochs."""

from pathlib import Path

from tests.data.small_set import write_small_set
from trainer.data.buckets import Bucket
from trainer.data.captions import PLAIN, CaptionRules, caption_record, compose
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.caption_survey import sampled_records, survey_captions
from trainer.keyed import draw_seed


def _records(*fields: tuple[str, str]) -> list[tuple[str, str]]:
    return [(f"photos/{i}", caption_record(caption, tags).decode()) for i, (caption, tags) in enumerate(fields)]


def test_empty_texts_are_counted_before_any_dropout() -> None:
    records = _records(("a", ""), ("", ""), ("", "b, c"), (" \n", " "))
    survey = survey_captions(records, CaptionRules(dropout_rate=1.0, tag_dropout_rate=1.0), 0, 5)
    assert survey.texts == ("a", "", "b, c", "") and survey.empty_keys == ("photos/1", "photos/3")
    assert survey.empty_fraction == 0.5 and survey.with_tags == 1
    assert [example.key for example in survey.examples] == ["photos/0", "photos/2"]
    assert survey_captions([], PLAIN, 0, 5).empty_fraction == 0


def test_examples_are_the_texts_of_the_first_epochs() -> None:
    records = _records(*(("", f"tag {i}, b, c, d, e, f, g") for i in range(100)))
    rules = CaptionRules(use="tags", shuffle_tags=True)
    survey = survey_captions(records, rules, 7, 5)
    assert [example.key for example in survey.examples] == [f"photos/{i}" for i in (0, 20, 40, 60, 80)]
    for example in survey.examples:
        record = dict(records)[example.key]
        seeds = [draw_seed(7, "caption", epoch, example.key, 0) for epoch in (0, 1)]
        assert example.texts == tuple(compose(record, rules, seed, epoch) for epoch, seed in enumerate(seeds))
    assert [example.texts for example in survey_captions(records[:1], PLAIN, 7, 5).examples] == [
        ("tag 0, b, c, d, e, f, g",)
    ]


def test_records_come_from_all_buckets_and_not_from_damaged_shards(tmp_path: Path) -> None:
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 12, Bucket(64, 128): 3}, repeats=2)
    records = sampled_records(PreparedSet.open(root), 8)
    assert len(records) == 8 and {key.split("/")[0] for key, _ in records} == {"64x64", "64x128"}
    assert dict(records)["64x64/0"] == '{"caption":"photo 0"}'
    (root / "64x64-0.safetensors").unlink()
    assert {key for key, _ in sampled_records(PreparedSet.open(root))} == {
        *(f"64x64/{i}" for i in range(5, 12)),
        *(f"64x128/{i}" for i in range(3)),
    }
