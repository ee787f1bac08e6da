"""What a page tells of a run's data: against the files that the set was made of."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from tests.data.survey.browsed_set import BrowsedSet, write_browsed_set
from trainer.cli.commands.report import _look_at_data
from trainer.data.buckets import Bucket
from trainer.data.captions import PLAIN, caption_record
from trainer.data.survey.browse.page_facts import TextMeasure
from trainer.errors import UserError
from trainer.report.data_facts import DataLook, FollowedData, data_facts

CHARACTERS = TextMeasure(lambda texts: [*map(len, texts)], "characters", 75)


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> BrowsedSet:
    return write_browsed_set(tmp_path_factory.mktemp("report-data"))


def test_what_is_told_is_what_is_there(browsed: BrowsedSet) -> None:
    """Forty-one images of two sources, one of them no image, one a line that a filter has left."""
    found = data_facts(DataLook(browsed.prepared, PLAIN, CHARACTERS))
    files = Counter(
        path.parent.name for path in browsed.root.glob("*/*.jpg") if path.parent.name in ("photos", "tagged")
        and path.name != "page.jpg"
    )  # fmt: skip
    assert {name.rpartition("/")[2]: (images, all_) for name, images, all_ in found["sources"]} == {
        "photos": (files["photos"], files["photos"]),
        "tagged": (files["tagged"], 2 * files["tagged"]),
    }
    assert found["images"] == [files.total(), 0] and found["per_epoch"] == files["photos"] + 2 * files["tagged"]
    assert sum(images for _, _, images, _, _ in found["buckets"]) == files.total()
    assert found["num_buckets"] == len(found["buckets"]) and found["snapshot"] == "000001"
    reasons = dict(found["left_out"])
    assert found["num_left_out"] == sum(reasons.values()) == 3 and any("script" in reason for reason in reasons)
    json.dumps(found, allow_nan=False)


def test_caption_lengths(tmp_path: Path) -> None:
    lengths = [0, 0, 10, 20, 30, 76, 80, 200, 12, 14]
    root = write_small_set(tmp_path, {Bucket(64, 64): 10}, record=lambda i: caption_record("x" * lengths[i]))
    texts = data_facts(DataLook(root, PLAIN, CHARACTERS))["texts"]
    assert texts["sampled"] == 10 and texts["most"] == 200 and texts["median"] == 17
    assert (texts["cut"], texts["empty"], texts["used"], texts["unreadable"]) == (3, 2, 75, 0)
    expected = Counter(min(length // texts["width"], len(texts["bars"]) - 1) for length in lengths)
    assert texts["bars"] == [expected[bar] for bar in range(len(texts["bars"]))]


def test_a_set_that_is_not_there_is_told_and_looked_for_again(tmp_path: Path) -> None:
    data = FollowedData(lambda: DataLook(tmp_path / "prepared", PLAIN, CHARACTERS))
    assert "holds no prepared data set" in data.facts()["problem"]
    write_small_set(tmp_path / "prepared", {Bucket(64, 64): 4})
    assert data.facts()["images"] == [4, 0]
    assert data.facts() is data.facts(), "nothing is gathered twice"
    (tmp_path / "prepared" / "bad.jsonl").write_text('{"path": "/x.jpg", "reason": "is no image"}\n')
    assert data.facts()["left_out"] == [["is no image", 1]]

    def fails() -> DataLook:
        raise UserError("config.resolved.yaml: is missing")

    assert FollowedData(fails).facts() == {"problem": "config.resolved.yaml: is missing"}


def test_a_run_looks_at_its_data_as_its_settings_say(browsed: BrowsedSet, tmp_path: Path) -> None:
    """Without the model's tokenizers, in characters."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.resolved.yaml").write_bytes(browsed.config.read_bytes())
    look = _look_at_data(run)
    assert look.prepared == browsed.prepared and look.rules.use == "both" and "characters" in look.measure.unit
    with pytest.raises(UserError):
        _look_at_data(tmp_path)
