"""Wrong values on the command line, many mistakes at once, wrong values of every key, unreadable files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config.fields import all_keys, dotted, field_at
from trainer.config.load import load_config
from trainer.errors import UserError

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")
Mistakes = Callable[..., tuple[str, ...]]

ONE_WRONG_OVERRIDE = {
    "train.stpes=5": "train.stpes: unknown key; did you mean `steps`?",
    "stpes=5": "stpes: unknown key; did you mean `train.steps` or `samples.steps`?",
    "train.steps": "write it as section.key=value",
    "=5": "write it as section.key=value",
    "train..steps=5": "write it as section.key=value",
    "train.steps=": "train.steps: missing (how long to train)",
    "train.steps=many": "train.steps = many: must be a whole number",
    "train.steps=[1": "not valid YAML: a quote or bracket that opens here is not closed",
    "train.steps.x=5": "train.steps = {x: 5}: must be a whole number",
    "data.sources.1.path=more": "`data.sources` has no such entry (its last is `data.sources.0`)",
    "data.sources.first.path=more": "`data.sources` has no such entry",
    "data.sources.0.path=mroe": "data.sources.0.path = mroe: no such folder; did you mean `more`?",
    "train.epochs=3": "train.steps = 100 with train.epochs = 3: give only one of them",
    "samples.negative_prompt=a: b": "samples.negative_prompt = {a: b}: must be text; put it in quotes",
    "data.sources.0.masks=file": "data.sources.0.masks = file: must be one of none, alpha, files",
    "data.sources.0.mask_suffix=-mask.png": (
        "data.sources.0.mask_suffix = -mask.png with data.sources.0.masks = none (the default): has no effect without "
        "`masks: files`"
    ),
    "data.sources=[{path: photos, masks: files, mask_suffix: .txt}]": (
        "data.sources.0.mask_suffix = .txt: must be a mark and an ending of images, such as -masklabel.png"
    ),
    "data.sources=[{path: photos, masks: files, mask_suffix: .png}]": "must be a mark and an ending of images",
    "data.sources=[{path: photos, masks: files, mask_folder: mroe}]": (
        "data.sources.0.mask_folder = mroe: no such folder; did you mean `more`?"
    ),
    "data.sources=[{path: photos, masks: files, mask_folder: photos}]": (
        "data.sources.0.mask_folder = photos with data.sources.0.path = photos: must not lie in the source"
    ),
    "data.sources=[{path: photos, masks: files, mask_folder: more, mask_suffix: -m.png}]": (
        "data.sources.0.mask_suffix = -m.png with data.sources.0.mask_folder = more: give one of them"
    ),
    "data.sources=[{path: photos, masks: alpha, mask_folder: more}]": (
        "data.sources.0.mask_folder = more with data.sources.0.masks = alpha: has no effect without `masks: files`"
    ),
    "data.sources=[{type: webdataset, tars: more, masks: files, mask_suffix: -m.png}]": (
        "data.sources.0.mask_suffix = -m.png: must begin with a dot, at which the names of samples end"
    ),
    "data.sources=[{type: parquet, files: more, mask_column: seg}]": (
        "data.sources.0.mask_column = seg with data.sources.0.masks = none (the default): has no effect without "
        "`masks: column`"
    ),
    "checkpoint={keep: 2, keep: 3}": "checkpoint.keep: given twice",
    "optimizer.lr=\ud800": "the character U+D800 is not allowed",
}


@pytest.mark.parametrize(("override", "expected"), ONE_WRONG_OVERRIDE.items(), ids=ascii)
def test_a_wrong_override_is_shown_as_it_was_typed(mistakes: Mistakes, override: str, expected: str) -> None:
    (line,) = mistakes(RIGHT, [override])
    place = "c.yaml:10: " if override == "train.epochs=3" else "override '"
    assert line.startswith(place)
    assert expected in line


def test_all_mistakes_come_together_in_the_order_of_the_file(mistakes: Mistakes) -> None:
    text = """\
run: {dri: runs/x, resume: no}
model:
  path: sdlx
data:
  sources:
    - path: photo
      repeats: 1.5
    - path: more
  prepared: more/prepared
train:
  precison: bf16
  steps: 5.0
  batch_size_per_gpu: "4"
optimizer:
  betas: [0.9, 1]
  betas: [0.9, 0.99]
lr_schedule: {final_ratio: 0.5}
samples:
  prompts: [a, 5, b, {c: d}]
  width_px: 60
"""
    lines = mistakes(text, ["log.evry_steps=5", "checkpoint.keep=1"])
    assert [line.split(": ")[0] for line in lines] == [
        *(f"c.yaml:{n}" for n in (1, 3, 6, 7, 9, 11, 12, 13)),
        "c.yaml:14",  # optimizer.lr is missing
        *(f"c.yaml:{n}" for n in (15, 16, 17, 19, 19, 20)),
        "override 'log.evry_steps=5'",
        "override 'checkpoint.keep=1'",
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("key", [dotted(key) for key in all_keys()])
def test_no_wrong_value_of_any_key_shows_the_words_of_a_library(mistakes: Mistakes, key: str) -> None:
    rejected = 0
    for value in (
        "zzz:",
        "-1",
        "1e999",
        "true",
        "[[]]",
        "{a: 1}",
        ".nan",
        "null",
        "''",
        "9" * 300,
        '"\\0"',
        "2024-01-01",
    ):
        try:
            lines = mistakes(RIGHT, [f"{key}={value}"])
        except pytest.fail.Exception:
            continue  # right for this key
        rejected += 1
        assert len(lines) == 1, lines
        assert lines[0].startswith((f"override '{key}=", "c.yaml:10: train.steps")), lines
        assert not any(word in lines[0] for word in ("Input", "valid ", "pydantic", "Error", "<class")), lines
    assert rejected >= 5


def test_every_key_says_what_it_is_for() -> None:
    for key in all_keys():
        field = field_at(key)
        assert field is not None
        assert field.description, dotted(key)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tny.yaml", "tny.yaml: no such file; did you mean `tiny.yaml`?"),
        (
            "confgs/tiny.yaml",
            "confgs/tiny.yaml: no such file (`confgs` does not exist); did you mean `configs/tiny.yaml`?",
        ),
        ("none/of.yaml", "none/of.yaml: no such file (`none` does not exist)"),
        ("photos", "photos: is a folder, not a regular file; give a YAML file"),
        ("tiny.yaml/x", "tiny.yaml/x: cannot be read: Not a directory"),
        ("a\0b", "a\\x00b: cannot be read: no path holds a NUL"),
        ("/dev/zero", "/dev/zero: is a device, not a regular file; give a YAML file"),
    ],
)
def test_a_file_that_cannot_be_read(folder: Path, path: str, expected: str) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").touch()
    (folder / "tiny.yaml").touch()
    with pytest.raises(UserError) as caught:
        load_config(Path(path))
    assert caught.value.lines == (expected,)
