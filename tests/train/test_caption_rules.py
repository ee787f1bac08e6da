"""What a run says of its captions before it begins, and when it refuses to."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.real_run import model_of
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.captions import PLAIN, CaptionRules, caption_record
from trainer.data.catalog.settings import PrepareSettings
from trainer.errors import UserError
from trainer.train.caption_rules import caption_rules, describe_captions, require_captions, survey_of
from trainer.train.workers.prepare_worker import prepare_settings


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path) -> Path:
    (tmp_path / "photos").mkdir()
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
run: {{dir: {tmp_path}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{sources: [{{path: {tmp_path}/photos, caption_files_hold: tags}}], prepared: {tmp_path}/prepared}}
train: {{steps: 8}}
optimizer: {{lr: 1e-3}}
"""
    )
    return path


def _settings(config: Config) -> PrepareSettings:
    return prepare_settings(config, model_of(config))


def _load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


def _records(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"photos/{i}", caption_record("", text).decode()) for i, text in enumerate(texts)]


def test_rules_are_those_of_the_configuration(config_file: Path) -> None:
    assert caption_rules(_load(config_file)) == PLAIN
    given = _load(config_file, "captions={shuffle_tags: yes, keep_tokens: 2, prefix: a, max_empty_fraction: 0.5}")
    assert caption_rules(given) == CaptionRules(shuffle_tags=True, keep_tokens=2, prefix="a")


def test_cached_text_is_of_one_set_of_rules(config_file: Path) -> None:
    plain = _settings(_load(config_file, "captions.prefix=a photo"))
    cached = _settings(_load(config_file, "captions.prefix=a photo", "data.cache_text=true"))
    assert "captions" not in plain.to_json() and cached.to_json()["captions"] == {"prefix": "a photo"}


def test_what_is_shown(config_file: Path) -> None:
    config = _load(config_file, "captions.shuffle_tags=true")
    survey = survey_of(config, _records(["cat, the, a, b", "the cat " * 80, ""]))
    lines = describe_captions(config, model_of(config), survey)
    assert lines[0] == "captions as they will be trained, in the first two epochs:"
    assert lines[1] == "  photos/0" and lines[4] == "  photos/1"
    for line in lines[2:4]:
        count, _, text = line.partition(" tokens: ")
        assert count == "       7" and sorted(text.split(", ")) == ["a", "b", "cat", "the"]
    assert lines[5].startswith("     160 tokens: the cat the cat") and lines[5].endswith("...") and len(lines[5]) < 440
    assert lines[7:] == ["  of 3 sampled: 1 without text, 1 longer than the 75 tokens that are used"]
    no_tags = survey_of(config, [("photos/0", caption_record("a\tcat").decode())])
    assert describe_captions(config, model_of(config), no_tags)[-1].startswith("  none of them has tags")
    assert describe_captions(config, model_of(config), no_tags)[2].endswith(" tokens: a cat")


def test_too_many_empty_texts_are_refused_in_one_line(config_file: Path) -> None:
    texts = ["a"] * 95 + [""] * 5
    require_captions(_load(config_file), survey_of(_load(config_file), _records(texts)))
    require_captions(_load(config_file), survey_of(_load(config_file), []))
    config = _load(config_file, "captions.dropout_rate=1")
    with pytest.raises(UserError) as caught:
        require_captions(config, survey_of(config, _records([*texts, "", ""])))
    assert caught.value.lines == (
        "captions.max_empty_fraction = 0.05: 7 of 102 sampled images have an empty text, such as photos/95, photos/96, "
        "photos/97; caption them before they are prepared, or raise the limit",
    )
    for override in ("captions.max_empty_fraction=1", "captions.prefix=sks girl"):
        config = _load(config_file, override)
        require_captions(config, survey_of(config, _records([""] * 9)))


def test_weights_that_no_image_has_are_told(config_file: Path) -> None:
    plain, asking = _load(config_file), _load(config_file, "data.sources.0.weight_extension=.weight")
    for record, is_told in ((caption_record("a"), True), (caption_record("a", "", 0.5), False)):
        for config in (plain, asking):
            survey = survey_of(config, [("photos/0", record.decode())])
            told = "none of them has a loss weight other than 1" in str(
                describe_captions(config, model_of(config), survey)
            )
            assert told is (is_told and config is asking)
