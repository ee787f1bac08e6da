"""What a right configuration means: scalars, overrides, defaults, and the way back to YAML."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.load import load_config, to_yaml
from trainer.config.schema import Config
from trainer.config.yaml_source import dump, parse

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")
Load = Callable[..., Config]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("Yes", "Yes"),
        ("off", "off"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("inf", "inf"),
        ("=", "="),
        ("~/x", "~/x"),
        ("'5'", "5"),
        ('"no"', "no"),
        ("'~'", "~"),
        ("[a, 1, no]", ["a", 1, "no"]),
        ("ein Foto in Ö, 猫 🐈", "ein Foto in Ö, 猫 🐈"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, meant: object) -> None:
    value = parse(f"key: {written}").value
    assert isinstance(value, dict)
    assert value["key"] == meant
    assert type(value["key"]) is type(meant)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "1e-4",
        "no",
        "0o7",
        "~",
        "null",
        "",
        " ",
        "<<",
        "=",
        "010",
        "12:30",
        ".inf",
        "- a",
        "a: b",
        "#",
        "'",
        "\n",
        "\x85",
    ]
)
leaves = texts | st.integers(-(10**12), 10**12) | st.booleans() | st.none() | st.floats(allow_nan=False)


@settings(deadline=None)  # a busy machine is no fault
@given(st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)))
def test_what_is_dumped_is_read_back(value: object) -> None:
    for flow in (False, True):
        text = dump({"key": value}, flow=flow)
        document = parse(text)
        if not document.problems:  # such as a key that reads as null
            assert document.value == {"key": value}


def test_defaults_and_types(load: Load) -> None:
    config = load()
    assert config.run.dir == Path("runs/x")
    assert config.optimizer.lr == 1e-4
    assert config.train.gradient_accumulation_steps is None
    assert config.data.buckets.resolution == 1024
    assert config.run.resume == "auto"


@pytest.mark.parametrize(
    ("word", "meant"), [("yes", True), ("no", False), ("on", True), ("Off", False), ("true", True)]
)
def test_flags_take_the_words_of_yaml_1_1(load: Load, word: str, meant: bool) -> None:
    config = load(RIGHT, [f"train.batch_by_area={word}", f"run.resume={word}", f"samples.negative_prompt={word}x"])
    assert config.train.batch_by_area is meant
    assert config.run.resume is meant
    assert config.samples.negative_prompt == f"{word}x"


def test_a_whole_number_is_a_right_value_of_a_real_field(load: Load) -> None:
    config = load(RIGHT, ["train.max_grad_norm=0", "optimizer.lr=1", "optimizer.betas=[0, 0.5]"])
    assert (config.train.max_grad_norm, config.optimizer.lr, config.optimizer.betas) == (0.0, 1.0, [0.0, 0.5])


def test_overrides_come_in_order_and_reach_everywhere(load: Load) -> None:
    overrides = [
        "train.steps=5",
        "train.steps=7",
        "samples.prompts=[a cat, 'b: c']",
        "data.sources.0.repeats=3",
        "data.buckets.min_px=512",
        "launch={workers: 4}",
        "samples.negative_prompt=a=b",
    ]
    config = load(RIGHT, overrides)
    assert config.train.steps == 7
    assert config.samples.prompts == ["a cat", "b: c"]
    assert (config.data.sources[0].repeats, config.data.sources[0].path) == (3, Path("photos"))
    assert config.data.buckets.min_px == 512
    assert config.launch.workers == 4
    assert config.samples.negative_prompt == "a=b"


def test_an_override_can_mend_and_replace(load: Load) -> None:
    config = load(
        RIGHT.replace("steps: 100", "stpes: 5"), ["train={epochs: 2}", "data.sources=[{path: photos}, {path: more}]"]
    )
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert len(config.data.sources) == 2


def test_null_takes_back_what_the_file_says(load: Load) -> None:
    assert load(RIGHT, ["train.steps=null", "train.epochs=3"]).train.epochs == 3


def test_aliases_empty_sections_windows_lines_and_a_byte_order_mark(load: Load) -> None:
    text = (
        RIGHT.replace("runs/x", "&here runs/x").replace("prepared: prepared", "prepared: *here") + "launch:\nlog: {}\n"
    )
    config = load(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert config.data.prepared == config.run.dir == Path("runs/x")


def test_home_and_quoted_paths(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load(RIGHT, ["run.dir=~/runs/ä b", 'data.prepared="pre pared"'])
    assert config.run.dir == Path("/home/ada/runs/ä b")
    assert config.data.prepared == Path("pre pared")


def test_settings_that_eval_and_sample_use_need_not_be_scheduled(load: Load) -> None:
    overrides = ["data.validation_fraction=0.1", "validation.max_images=8", "samples.steps=4", "samples.prompts=[a]"]
    assert load(RIGHT, overrides).validation.every_steps == 0


def test_paths_need_not_exist_where_they_are_not_checked(folder: Path) -> None:
    Path("c.yaml").write_text(RIGHT.replace("sdxl", "elsewhere"))
    assert load_config(Path("c.yaml"), check_paths=False).model.path == Path("elsewhere")


def test_the_resolved_configuration_reads_back_from_anywhere(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        "samples.prompts=[no, '1e-4', '5', 'ä: #b', \"two\\nlines\"]",
        "optimizer.eps=1e-12",
        "run.resume=false",
    ]
    resolved = to_yaml(load(RIGHT, overrides))
    Path("more/resolved.yaml").write_text(resolved, encoding="utf-8")
    monkeypatch.chdir("more")
    again = load_config(Path("resolved.yaml"))
    assert again.samples.prompts == ["no", "1e-4", "5", "ä: #b", "two\nlines"]
    assert again.optimizer.eps == 1e-12
    assert again.run.dir == Path("../runs/x").resolve()
    assert to_yaml(again) == resolved


def test_loading_needs_no_torch() -> None:
    code = "import sys, trainer.config.load, trainer.config.reference; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "diffusers"} & set(ran.stdout.split())


def test_sources_of_any_types(load: Callable[..., Config]) -> None:
    tars = "{type: latent_tars, metadata: c.yaml, tars: more, repeats: 2}"
    sources = f"[{{path: photos}}, {{type: kohya_json, path: c.yaml, latents: more}}, {tars}]"
    config = load(overrides=[f"data.sources={sources}", "data.sources.2.repeats=3"])
    assert [source.type for source in config.data.sources] == ["folder", "kohya_json", "latent_tars"]
    assert [source.repeats for source in config.data.sources] == [1, 1, 3]
    again = load(to_yaml(config))
    assert [source.type for source in again.data.sources] == ["folder", "kohya_json", "latent_tars"]


def test_captions_in_full(load: Load) -> None:
    sources = "sources: [{path: photos}, {path: more, caption_files_hold: tags}]"
    captions = """
captions:
  use: mix
  caption_probability: 0.3
  prefix: '{photo|picture} of'
  wildcards: yes
  shuffle_tags: yes
  keep_tokens: 1
  keep_tokens_separator: '|||'
  tag_separator: ';'
  secondary_separator: ';;;'
  tag_dropout_rate: 0.1
  dropout_rate: 0.1
  dropout_every_n_epochs: 5
  max_empty_fraction: 1
"""
    config = load(RIGHT.replace("sources:\n    - path: photos", sources) + captions)
    assert config.captions.keep_tokens_separator == "|||" and config.captions.prefix == "{photo|picture} of"
    cached = load(RIGHT.replace("prepared: prepared", "prepared: p\n  cache_text: yes") + "captions: {prefix: a photo}")
    assert cached.data.cache_text and cached.captions.prefix == "a photo"
