"""From the configuration's keys to the weights of a run, and what is told of them."""

from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from trainer.config.sections.data.sources import FolderSource
from trainer.config.sections.objective_config import LossWeightsConfig, TagBalanceConfig
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.loss_weights import TagSeparators
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import (
    counted,
    describe_loss_weights,
    describe_tags,
    image_weights,
    weighs_images,
)
from trainer.errors import UserError

COMMAS = TagSeparators()


def tagged(i: int) -> bytes:
    return caption_record("", "1girl, solo" if i % 2 else "1girl, hat")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    root = tmp_path_factory.mktemp("prepared")
    return PreparedSet.open(write_small_set(root, {Bucket(64, 64): 5, Bucket(128, 64): 6}, record=tagged))


def folders(*names: str, **options: object) -> list[FolderSource]:
    """The last one with the options."""
    found = [FolderSource(path=Path("/data") / name) for name in names]
    return [*found[:-1], found[-1].model_copy(update=options)]


def test_all_that_applies_is_multiplied(prepared: PreparedSet, tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("solo,0.5\nunknown,7\nhat,1\n")
    section = LossWeightsConfig(prior=0.5, tag_file=tmp_path / "tags.csv", tag_balance=TagBalanceConfig(power=1.0))
    sources = [*folders("photos", "64x64", prior=True), *folders("more", weight_extension=".w", loss_weight=2.0)]
    weights = image_weights(sources, section, COMMAS, prepared)
    assert weights is not None
    # 1girl is on 11 images, hat on 6, solo on 5; half of the 22 occurrences lie at 6 and below: w = 6/11, 1, 6/5.
    scale = 11 / (6 * (6 / 11 + 1) / 2 + 5 * (6 / 11 + 6 / 5) / 2)
    record = caption_record("", "1girl, solo", 3.0).decode()
    expected = 0.5 * 3.0 * 0.5 * scale * (6 / 11 + 6 / 5) / 2
    assert weights.weight("64x64/1", record) == pytest.approx(expected, rel=1e-9)
    assert weights.weight("more/1", record) == pytest.approx(4 * expected, rel=1e-9)
    told = describe_loss_weights(sources, section)
    assert told == [
        f"  loss weights: 64x64 0.5 (prior); more 2; images' own weights; tags as in {tmp_path}/tags.csv; "
        "tags balanced by their counts with power 1"
    ]
    counts = counted(prepared, COMMAS)
    lines = [*describe_tags(section, counts, prepared)]
    assert lines[0] == "tags: 3 different ones, 0.0% of 11 images an epoch have none"
    assert "the typical tag is on 6 images" in lines[1]
    assert lines[2].endswith("tags.csv: weights of 3 tags; 1 are on no image, such as 'unknown'")


def test_none_where_all_count_the_same(prepared: PreparedSet) -> None:
    section = LossWeightsConfig()
    assert image_weights(folders("photos", "64x64"), section, COMMAS, prepared) is None
    assert describe_loss_weights(folders("photos"), section) == []
    assert not weighs_images(folders("photos", weight_extension=".w"), LossWeightsConfig(per_image=False))
    assert weighs_images(folders("photos", weight_extension=".w"), section)
    assert not weighs_images(folders("photos", prior=True), section)


def test_no_effect_is_one_line(prepared: PreparedSet, tmp_path: Path) -> None:
    (tmp_path / "tags.yaml").write_text("blue_eyes: 2\n")
    section = LossWeightsConfig(tag_file=tmp_path / "tags.yaml")
    with pytest.raises(UserError) as raised:
        image_weights(folders("photos"), section, COMMAS, prepared)
    (line,) = raised.value.lines
    assert line.startswith(f"objective.loss_weights.tag_file = {tmp_path}/tags.yaml: has no effect; no image of ")
    assert line.endswith(
        "has any of its tags, such as 'blue_eyes'; the most usual tags there are '1girl', 'hat', 'solo'"
    )
    untagged = PreparedSet.open(write_small_set(tmp_path / "untagged", {Bucket(64, 64): 5}))
    balance = LossWeightsConfig(tag_balance=TagBalanceConfig(power=0.5))
    for idle, key in ((section, "tag_file"), (balance, "tag_balance.power = 0.5")):
        with pytest.raises(
            UserError, match="has tags: if the caption files hold tags, write `caption_files_hold: tags`"
        ) as raised:
            image_weights(folders("photos"), idle, COMMAS, untagged)
        assert key in raised.value.lines[0]


def test_sources_that_cannot_be_told_apart(prepared: PreparedSet) -> None:
    """The second `photos` is called `photos~2`, and so is the folder of that name."""
    alike = [FolderSource(path=Path(f"/data/{path}")) for path in ("photos", "more/photos", "photos~2")]
    weighted = [*alike[:2], alike[2].model_copy(update={"loss_weight": 0.5})]
    with pytest.raises(UserError, match="keys that begin with photos~2/ and cannot be told apart"):
        image_weights(weighted, LossWeightsConfig(), COMMAS, prepared)
    both = [alike[0].model_copy(update={"loss_weight": 0.5}), *alike[1:]]
    weights = image_weights(both, LossWeightsConfig(), COMMAS, prepared)
    assert weights is not None and weights.of(["photos/a", "photos~2/a"], ["{}", "{}"]).tolist() == [0.5, 1.0]


def test_a_relative_path_has_the_name_that_it_was_prepared_under(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "regs").mkdir()
    monkeypatch.chdir(tmp_path / "regs")
    weights = image_weights([FolderSource(path=Path(), loss_weight=0.5)], LossWeightsConfig(), COMMAS, prepared)
    assert weights is not None and weights.sources == {"regs": 0.5}
