"""The section `ema`: one line turns it on, and what would do nothing is refused."""

from collections.abc import Callable

import pytest

from trainer.config.load import to_yaml
from trainer.config.schema import Config

from .conftest import RIGHT

Load = Callable[..., Config]


def test_one_line_turns_it_on(load: Load) -> None:
    assert load().ema.averages == []
    (average,) = load(RIGHT, ["ema.averages=[{kind: plain}]"]).ema.averages
    assert (average.name, average.decay, average.warm_up) == ("ema", 0.9999, True)
    config = load(RIGHT + "ema: {averages: [{}, {name: long, kind: power}], score: [live, long]}")
    again = load(to_yaml(config))  # written out in full, it is no mistake
    assert [each.name for each in again.ema.averages] == ["ema", "long"] and again.ema == config.ema


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("averages: [{name: Big}]", "ema.averages.0.name = Big: must be a small letter and"),
        ("averages: [{name: live}]", "ema.averages.0.name = live: must be"),
        ("averages: [{name: '2'}]", "ema.averages.0.name = '2': must be"),
        ("averages: [{decya: 0.9}]", "ema.averages.0.decya: unknown key; did you mean `decay`?"),
        ("averages: [{decay: 1}]", "ema.averages.0.decay = 1: must be less than 1"),
        ("averages: [{kind: power, length: 0.3}]", "ema.averages.0.length = 0.3: must be less than 0.288"),
        ("averages: [{kind: pwer}]", "ema.averages.0.kind = pwer: must be one of plain, power (did you mean `power`?)"),
        ("averages: [{}, {}]", "ema (the default): each average needs a name of its own"),
        (
            "averages: [{kind: power, decay: 0.9}]",
            "ema.averages.0.decay = 0.9 with ema.averages.0.kind = power: has no effect; it belongs to `kind: plain`",
        ),
        ("averages: [{length: 0.05}]", "(the default): has no effect; it belongs to `kind: power`"),
        ("place: host", "ema.place = host with ema.averages = [] (the default): has no effect; there is no average"),
        ("{averages: [{}], snapshots: {every_steps: 9}}", "has no effect; snapshots are of averages of `kind: power`"),
        ("{averages: [{kind: power}], snapshots: {keep: 9}}", "has no effect; no snapshots are kept"),
        ("{averages: [{name: long}], score: [lnog]}", "`lnog` is no average; did you mean `long`?"),
        ("{averages: [{name: long}], score: [x]}", "`x` is no average; there are live, long"),
        ("{averages: [{}], score: [ema, ema]}", "ema.score = [ema, ema]: names ema twice"),
        ("{averages: [{}], score: []}", "ema.score = []: must have at least 1"),
    ],
)
def test_mistakes(mistakes: Callable[..., tuple[str, ...]], section: str, line: str) -> None:
    text = section if section.startswith("{") else f"{{{section}}}"
    (found,) = mistakes(RIGHT + f"ema: {text}")
    assert found.startswith("c.yaml:13: ") and line in found, found


def test_exports_name_an_average(load: Load, mistakes: Callable[..., tuple[str, ...]]) -> None:
    export = "checkpoint: {export: {when: end, weights: emma}}\n"
    (line,) = mistakes(RIGHT + export + "ema: {averages: [{}]}")
    assert "checkpoint.export.weights = emma" in line and "did you mean `ema`?" in line
    assert load(RIGHT + export.replace("emma", "ema") + "ema: {averages: [{}]}").checkpoint.export.weights == "ema"
