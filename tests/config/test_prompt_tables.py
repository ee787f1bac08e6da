"""Files of prompts in JSON and TOML: what they mean by sd-scripts' rules, and what of them is refused, by entry."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.load import load_config
from trainer.config.prompt_file import read_prompts, with_prompts_read
from trainer.errors import UserError

RIGHT = Path(__file__).parent / "right.yaml"
# What sd-scripts looks up in an entry when it draws (`sample_image_inference`), and what we call it.
LOOKED_UP = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width_px",
    "height": "height_px",
    "seed": "seed",
    "sample_steps": "steps",
    "scale": "guidance_scale",
    "sample_sampler": "sampler",
}
FLAGS = {"negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "sample_steps": "s", "scale": "l",
         "sample_sampler": "ss"}  # fmt: skip
WORDS = st.text("abcäö猫🦊 ,.:(){}[]\"'\\#=-%", max_size=20).map(str.strip)
SIDES = st.integers(1, 400).map(lambda n: 8 * n)
SETTINGS = {
    "negative_prompt": WORDS,
    "width": SIDES,
    "height": SIDES,
    "seed": st.integers(0, 2**32 - 1),
    "sample_steps": st.integers(1, 500),
    "scale": st.integers(0, 40) | st.integers(0, 40_000).map(lambda n: n / 1000),
    "sample_sampler": st.sampled_from(["euler", "euler_a", "ddim"]),
}
SAID = st.fixed_dictionaries({}, optional=SETTINGS)
ENTRY = st.fixed_dictionaries({"prompt": WORDS}, optional=SETTINGS)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """The settings that each prompt of a file says."""
    return [image.model_dump(exclude_unset=True) for image in read_prompts(file).values()]


def refused(file: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    return [line.removeprefix(f"{file}: ") for line in caught.value.lines]


def ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {LOOKED_UP[name]: value for name, value in entry.items()}


def as_toml(table: dict[str, Any]) -> str:
    """TOML's basic strings are JSON's, and so are its numbers."""
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in table.items())


def as_line(entry: dict[str, Any]) -> str:
    """The same as a line, whose parts begin with " --" and letters."""
    return " --".join([entry["prompt"], *(f"{FLAGS[name]} {entry[name]}" for name in entry if name != "prompt")])


@settings(deadline=None)
@given(st.lists(st.tuples(ENTRY, st.booleans()), min_size=1, max_size=4))
def test_json_says_what_sd_scripts_looks_up(tmp_path_factory: pytest.TempPathFactory, entries) -> None:
    """An entry is a table, or a line."""
    listed: list[Any] = []
    for entry, is_line in entries:
        can_be_line = entry["prompt"] and "--" not in entry["prompt"] + entry.get("negative_prompt", "")
        listed.append(as_line(entry) if is_line and can_be_line else entry)
    file = written(tmp_path_factory.mktemp("json"), "prompts.json", json.dumps(listed))
    assert read(file) == [ours(entry) for entry, _ in entries]


@settings(deadline=None)
@given(SAID, st.lists(ENTRY, min_size=1, max_size=4))
def test_toml_says_it_for_all_and_for_each(tmp_path_factory: pytest.TempPathFactory, of_all, subsets) -> None:
    """`dict(**prompt, **subset)`, and where both say something, the subset."""
    text = "[prompt]\n" + as_toml(of_all) + "".join("[[prompt.subset]]\n" + as_toml(each) for each in subsets)
    file = written(tmp_path_factory.mktemp("toml"), "prompts.toml", text)
    assert read(file) == [ours({**of_all, **each}) for each in subsets]


def test_as_people_write_them(tmp_path: Path) -> None:
    toml = """# for the first run
[prompt]
width = 832
height = 1216
scale = 5
negative_prompt = "low quality"

[[prompt.subset]]
prompt = "a red fox --w 64"  # flags are words here
seed = 7

[[prompt.subset]]
prompt = '''
a cat,
at night'''
sample_sampler = "DPM++ 2M Karras"
width = 1_024
"""
    shared = {"width_px": 832, "height_px": 1216, "guidance_scale": 5.0, "negative_prompt": "low quality"}
    karras = {"sampler": "dpmpp_2m", "schedule": "karras", "width_px": 1024}
    cat = {**shared, "prompt": "a cat,\nat night", **karras}
    assert read(written(tmp_path, "p.toml", toml)) == [{**shared, "prompt": "a red fox --w 64", "seed": 7}, cat]
    listed = ["a fox --d 3", {"prompt": "", "seed": None, "guidance_scale": 4, "sample_sampler": "k_euler_a"}]
    expected = [{"prompt": "a fox", "seed": 3}, {"prompt": "", "guidance_scale": 4.0, "sampler": "euler_a"}]
    assert read(written(tmp_path, "p.json", json.dumps(listed))) == expected
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):
        assert read(written(tmp_path, "p.JSON", '["grün"]'.encode(encoding))) == [{"prompt": "grün"}]
        assert read(written(tmp_path, "p.toml", '[prompt]\r\nsubset = [{prompt = "grün"}]'.encode(encoding))) == [
            {"prompt": "grün"}
        ]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a cat --w 500", "--w 500: must be a multiple of 8"),
        ("", "has no prompt before its flags"),
        ({"prompt": "a", "width": 500}, "width = 500: must be a multiple of 8"),
        ({"prompt": "a", "height": "512"}, "height = 512: must be a whole number from 8 to 2147483647"),
        ({"prompt": "a", "width": 512.0}, "width = 512.0: must be a whole number from 8 to 2147483647"),
        ({"prompt": "a", "seed": True}, "seed = true: must be a whole number from 0 to 4294967295"),
        ({"prompt": "a", "seed": -1}, "seed = -1: must be a whole number from 0 to 4294967295"),
        ({"prompt": "a", "sample_steps": 501}, "sample_steps = 501: must be a whole number from 1 to 500"),
        ({"prompt": "a", "scale": -0.5}, "scale = -0.5: must be a number that is not negative"),
        ({"prompt": "a", "scale": "7"}, "scale = 7: must be a number that is not negative"),
        ({"prompt": "a", "scale": 5, "guidance_scale": 3}, "guidance_scale = 3: guidance_scale is said twice"),
        ({"prompt": ["a"]}, 'prompt = ["a"]: must be text'),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt = 3: must be text"),
        ({"prompt": "\ud83e"}, r"prompt = \ud83e: holds half a character (a lone surrogate)"),
        ({"prompt": "a", "sample_sampler": "heun"}, "sample_sampler = heun: must be one of euler, euler_a, ddim, d"),
        ({"width": 512}, "prompt: missing (what is drawn)"),
        ({"prompt": None}, "prompt: missing (what is drawn)"),
        ({"prompt": "a", "widht": 512}, "widht: unknown key; did you mean `width`?"),
        ({"prompt": "a", "width_px": 512}, "width_px: unknown key; did you mean `width`?"),
        ({"prompt": "a", "w": 512}, "w: unknown key; did you mean `width`?"),
        ({"prompt": "a", "diffusion_steps": 20}, "diffusion_steps: unknown key; did you mean `sample_steps`?"),
        ({"prompt": "a", "enabled": True}, "enabled: unknown key; there are prompt, negative_prompt, width, height, s"),
        ({"prompt": "a", "controlnet_image": "a.png"}, "controlnet_image: has no effect, for it is an image for a Con"),
        ({"prompt": "a", "enum": 1}, "enum: has no effect, for it is a number that sd-scripts sets by itself; leave i"),
        ({"prompt": "a", "\x1b[2J\n": 1}, r"\x1b[2J\n: unknown key; there are prompt"),
        ({"prompt": "a", "width": [[9] * 500]}, "width = [[9, 9, 9"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_understood_is_refused(tmp_path: Path, entry: Any, said: str) -> None:
    (line,) = refused(written(tmp_path, "prompts.json", json.dumps(["a fox", entry])))
    assert line.startswith(f"prompt 2: {said}") and len(line) < 300


def test_everything_that_is_wrong_is_told(tmp_path: Path) -> None:
    entries = [{"prompt": "a", "seed": 1.5, "hight": 8}, "a cat", "a dog --sed 3"]
    assert refused(written(tmp_path, "p.json", json.dumps(entries))) == [
        "prompt 1: seed = 1.5: must be a whole number from 0 to 4294967295",
        "prompt 1: hight: unknown key; did you mean `height`?",
        "prompt 3: --sed: unknown flag; did you mean `--d`?",
    ]
    told = refused(written(tmp_path, "p.json", json.dumps([{"seed": 1}] * 30)))
    assert len(told) == 21 and told[-1] == "and 10 more lines"
    # What is wrong for all is told once.
    text = (
        "[prompt]\nwidht = 512\nseed = 2024-01-01\n[[prompt.subset]]\nprompt = 'a'\n[[prompt.subset]]\nprompt = 'b'\n"
    )
    assert refused(written(tmp_path, "p.toml", text)) == [
        "prompt.widht: unknown key; did you mean `width`?",
        'prompt.seed = "2024-01-01": must be a whole number from 0 to 4294967295',
    ]
    text = "[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = 'a'\n[[prompt.subset]]\nscale = inf\nprompt = 'b'\n"
    assert refused(written(tmp_path, "p.toml", text)) == [
        "prompt.subset 2: scale = Infinity: must be a number that is not negative"
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", "{}", "must be a list of prompts, each a line of text or an object"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", '["a", ["b"], 3]', "prompt 2: must be a line of text or an object"),
        ("p.json", '["a",]', "not valid JSON"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "not valid JSON (the name prompt stands twice in it)"),
        ("p.json", json.dumps(["a"] * 501), "holds 501 prompts; at most 500 are drawn"),
        ("p.toml", "", "prompt: missing; a file of prompts holds [prompt], for all, and a [[prompt.subset]] for each"),
        ("p.toml", "[prompts]\nwidth = 8\n", "prompts: unknown key; did you mean `prompt`?"),
        ("p.toml", "width = 8\n[prompt]\n", "width: belongs below [prompt]"),
        ("p.toml", "[[subset]]\nprompt='a'\n", "subset: unknown key; a file of prompts holds [prompt], for all, and"),
        ("p.toml", "[[prompt]]\nprompt='a'\n", "prompt: must be one table; a file of prompts holds [prompt], for all"),
        ("p.toml", "prompt = 'a'\n", "prompt: must be one table; a file of prompts holds [prompt], for all, and a ["),
        ("p.toml", "[prompt]\nprompt='a'\n", "prompt.subset: missing; a file of prompts holds [prompt], for all, and"),
        ("p.toml", "[prompt]\n[[prompt.subsets]]\n", "prompt.subset: missing; did you mean it by `subsets`?"),
        ("p.toml", "[prompt.subset]\nprompt='a'\n", "prompt.subset: must be a list of tables; a file of prompts holds"),
        ("p.toml", "[prompt]\nsubset = ['a']\n", "prompt.subset 1: must be a table"),
        ("p.toml", "[prompt]\nsubset = []\n", "holds no prompt"),
        ("p.toml", "[prompt]\nwidth = 8\nwidth = 16\n", "not TOML: Cannot overwrite a value (at line 3"),
        ("p.toml", "[prompt\n", "not TOML: "),
    ],
)  # fmt: skip
def test_files_of_another_shape(tmp_path: Path, name: str, text: str, said: str) -> None:
    assert refused(written(tmp_path, name, text))[0].startswith(said)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", "[" * 10**6),
        ("p.json", "[" + "{}," * 300_000 + "{}]"),
        ("p.json", "[" + "9" * 10**6 + "]"),
        ("p.json", '[{"prompt": "a", "seed": ' + "9" * 10**6 + "}]"),
        ("p.toml", "prompt=" + "[" * 10**6),
        ("p.toml", "prompt." + ".".join("a" * 400_000) + "=1"),
        ("p.toml", "[prompt]\n" + "[[prompt.subset]]\n" * 50_000),
        ("p.toml", "[prompt]\nseed = " + "9" * 10**6),
        ("p.toml", "x" * (2 << 20)),
        ("p.toml", "[prompt]\n" + "".join(f"negative_promt{n} = 1\n" for n in range(40_000))),
        ("p.json", json.dumps([{f"negative_promt{n}": 1 for n in range(40_000)}])),
        ("p.json", json.dumps([{f"negative_promt{n}": 1 for n in range(20)}] * 500)),
    ],
)
def test_hostile_files_are_refused_at_once(tmp_path: Path, name: str, text: str) -> None:
    before = time.process_time()
    assert 1 <= len(refused(written(tmp_path, name, text))) <= 21
    assert time.process_time() - before < 5


def test_a_prompt_that_would_do_nothing_is_refused_by_its_place(tmp_path: Path) -> None:
    entries = [{"prompt": "a"}, {"prompt": "b", "negative_prompt": "c"}]
    file = written(tmp_path, "p.json", json.dumps(entries))
    config = load_config(RIGHT, [f"samples.prompt_file={file}", "samples.guidance_scale=1"], check_paths=False)
    with pytest.raises(UserError) as caught:
        with_prompts_read(config)
    said = "negative_prompt = c with samples.guidance_scale = 1.0: has no effect; it needs a guidance above 1"
    assert caught.value.lines == (f"{file}: prompt 2: {said}",)
    config = load_config(RIGHT, [f"samples.prompt_file={file}"], check_paths=False)
    assert [image.prompt for image in with_prompts_read(config).samples.images] == ["a", "b"]


def test_a_subset_counts_by_any_of_a_settings_names(tmp_path: Path) -> None:
    text = "[prompt]\nscale = 5\nwidth = 512\n[[prompt.subset]]\nprompt = 'a'\nguidance_scale = 7\n"
    assert read(written(tmp_path, "p.toml", text.encode())) == [ours({"prompt": "a", "width": 512, "scale": 7})]


def test_a_line_of_json_holds_whole_characters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="half a character"):
        read(written(tmp_path, "p.json", b'["a \\ud800 fox"]'))
