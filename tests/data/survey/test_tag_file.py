"""A user's weights of tags: three formats, and every mistake in one line."""

from pathlib import Path

import pytest

from trainer.data.survey import tag_file
from trainer.data.survey.tag_file import read_tag_file
from trainer.errors import UserError

GOOD = {"1girl": 0.5, "blue eyes": 2.0, "a, b": 3.0, ":d": 0.25, "2020": 1.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '{"1girl": 0.5, " blue eyes ": 2, "a, b": 3.0, ":d": 25e-2, "2020": 1.5}'),
        ("t.yaml", "1girl: 0.5\nblue eyes: 2\n'a, b': 3.0\n':d': 0.25\n'2020': 1.5\n"),
        ("t.yml", '{"1girl": 0.5, blue eyes: 2, "a, b": 3.0, ":d": 2.5e-1, "2020": 1.5}'),
        ("t.csv", 'tag,weight\n1girl,0.5\nblue eyes , 2\n\n"a, b",3\n:d,.25\n2020,1.5'),
        ("T.CSV", '\ufeff1girl,0.5\r\nblue eyes,2e0\r\n"a, b",3\r\n:d,.25\r\n2020,1.5\r\n'),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_tag_file(tmp_path / name) == GOOD


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.txt", "a: 1", "must be a .json, .yaml or .csv file"),
        ("t.json", '{"a": 0}', "'a' = '0': must be a number above 0 and at most 100"),
        ("t.json", '{"a": -1}', "'a' = '-1': must be a number"),
        ("t.json", '{"a": NaN}', "'a' = 'nan': must be a number"),
        ("t.json", '{"a": Infinity}', "'a' = 'inf': must be a number"),
        ("t.json", '{"a": 101}', "'a' = '101': must be a number"),
        ("t.json", '{"a": "2"}', "'a' = '2': must be a number"),
        ("t.json", '{"a": true}', "'a' = 'True': must be a number"),
        ("t.json", '{"a": {"b": 1}}', "'a' = an object: must be a number"),
        ("t.json", '{"a": 2, " a": 3}', "names 'a' twice"),
        ("t.json", '{" ": 2}', "names an empty tag"),
        ("t.json", "[1, 2]", "must hold one object of tags and weights"),
        ("t.json", '{"a": 2', "Expecting ',' delimiter"),
        ("t.json", "[" * 100_000, "maximum recursion depth"),
        ("t.json", '{"a": 1.0}', "has no effect; it holds no weight other than 1"),
        ("t.json", "{}", "has no effect"),
        ("t.yaml", "a: 2\na: 3\n", "line 2: a: given twice; first on line 1"),
        ("t.yaml", "a: 2\n  b: 3\n", "line 2: "),
        ("t.yaml", "- a\n- b\n", "must hold lines `tag: weight`"),
        ("t.yaml", "", "must hold lines `tag: weight`"),
        ("t.csv", "tag,weight\na,b\n", "'a' = 'b': must be a number"),
        ("t.csv", "a,2\nb\n", "line 2: must hold `tag,weight`"),
        ("t.csv", "a,2\nb,c,3\n", "line 2: must hold `tag,weight`; a tag with a comma stands in quotes"),
        ("t.csv", 'a,2\n"b,3\n', "unexpected end of data"),
        ("t.csv", "a\xa0\n", "is no UTF-8 text (byte 1)"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        read_tag_file(path)
    (line,) = raised.value.lines
    assert line.startswith(f"objective.loss_weights.tag_file ({path}): ") and said in line and len(line) < 300


def test_what_is_no_file_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_tag_file(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder, not a regular file"):
        read_tag_file(tmp_path / "folder.csv")
    monkeypatch.setattr(tag_file, "MAX_BYTES", 1 << 20)
    (tmp_path / "t.csv").write_text("a,2\n" * (1 << 19))
    with pytest.raises(UserError, match="at most 1,048,576 are read"):
        read_tag_file(tmp_path / "t.csv")
