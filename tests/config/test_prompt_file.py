"""A file of prompts with kohya's flags: what it means, and what of it is refused, by line."""

import itertools
from pathlib import Path

import pytest

from trainer.cli.commands.sample import _prompts
from trainer.config.load import load_config
from trainer.config.prompt_file import prompt_of_line, read_prompts, with_prompts_read
from trainer.config.prompt_settings import sampler_of
from trainer.errors import UserError

RIGHT = Path(__file__).parent / "right.yaml"


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "prompts.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refused(file: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    return [line.removeprefix(f"{file}") for line in caught.value.lines]


def test_kohyas_lines_are_understood(tmp_path: Path) -> None:
    text = """# what the fox should look like
masterpiece, best quality, in white shirts --n low quality, worst quality --w 768 --h 1152 --d 1 --l 7.5 --s 28

  a cat -- or a dog, 3--4 of them --ss k_euler_a  --D 0
a house   --l .5 --n
a fox --ss DPM++ 2M Karras
\t# not drawn
"""
    file = written(tmp_path, text)
    read = {place: image.model_dump(exclude_unset=True) for place, image in read_prompts(file).items()}
    assert {int(place.removeprefix(f"{file}:")): image for place, image in read.items()} == {
        2: {
            "prompt": "masterpiece, best quality, in white shirts",
            "negative_prompt": "low quality, worst quality",
            "width_px": 768,
            "height_px": 1152,
            "seed": 1,
            "guidance_scale": 7.5,
            "steps": 28,
        },
        4: {"prompt": "a cat -- or a dog, 3--4 of them", "sampler": "euler_a", "seed": 0},
        5: {"prompt": "a house", "guidance_scale": 0.5, "negative_prompt": ""},
        6: {"prompt": "a fox", "sampler": "dpmpp_2m", "schedule": "karras"},
    }


def test_flags_in_any_order_mean_what_kohyas_rules_say() -> None:
    """sd-scripts' rules, as its documentation gives them: parts begin with " --", a part is letters in either case, a
    space and a value, and every flag sets what its letters stand for."""
    meaning = {"n": "negative_prompt", "w": "width_px", "h": "height_px", "d": "seed", "s": "steps",
               "l": "guidance_scale", "g": "guidance_scale", "ss": "sampler"}  # fmt: skip
    values = {"n": "low quality, (worst:1.2)", "w": "832", "h": "1216", "d": "42", "s": "28", "l": "6.5", "g": "4",
              "ss": "ddim"}  # fmt: skip
    for guidance in "lg":
        for order in itertools.permutations([*"nwhds", "ss", guidance]):
            parts = [f"{flag.upper() if place % 2 else flag} {values[flag]}" for place, flag in enumerate(order)]
            line = " --".join(["a fox, 1girl -- no flag", *parts])
            expected: dict[str, str] = {}
            for part in parts:
                letters, value = part.split(" ", 1)
                expected[meaning[letters.lower()]] = value
            read = prompt_of_line(line).model_dump(exclude_unset=True)
            assert read.pop("prompt") == "a fox, 1girl -- no flag"
            said = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in read.items()}
            assert said == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a cat --widht 512", "--widht: unknown flag; did you mean `--w`?"),
        ("a cat --cn image.png", "--cn: has no effect, for it is an image for a ControlNet"),
        (
            "a cat --d 3 --AM 0.5",
            "--AM: has no effect, for it is weights of networks, which only sd-scripts' generator",
        ),
        ("a cat --zzzzzz 1", "--zzzzzz: unknown flag; there are --n, --w, --h, --d, --s, --l, --g, --ss"),
        ("a cat --w 500", "--w 500: must be a multiple of 8"),
        ("a cat --w 512 px", "--w 512 px: must be a whole number from 8 to 2147483647"),
        ("a cat --h -8", "--h -8: must be a whole number from 8 to 2147483647"),
        ("a cat --d -1", "--d -1: must be a whole number from 0 to 4294967295"),
        ("a cat --d " + "9" * 5000, "must be a whole number from 0 to 4294967295"),
        ("a cat --s 501", "--s 501: must be a whole number from 1 to 500"),
        ("a cat --s ²", "--s ²: must be a whole number from 1 to 500"),
        ("a cat --l inf", "--l inf: must be a number that is not negative"),
        ("a cat --l 7,5", "--l 7,5: must be a number that is not negative"),
        ("a cat --w", "--w: has no value"),
        ("a cat --d 1 --d 2", "--d 2: seed is said twice"),
        ("a cat --l 5 --g 3", "--g 3: guidance_scale is said twice"),
        ("--n blurry", "has no prompt before its flags"),
        ("a cat --ss eulr_a", "--ss eulr_a: must be one of euler, euler_a, ddim, dpmpp_2m, dpmpp_2m_karras (did you "),
        ("a cat --ss heun", "--ss heun: must be one of euler, euler_a, ddim, dpmpp_2m, dpmpp_2m_karras"),
    ],
)
def test_a_line_that_is_not_understood_is_refused(line: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        prompt_of_line(line)
    assert said in str(caught.value)


def test_every_wrong_line_is_told_with_its_number(tmp_path: Path) -> None:
    file = written(tmp_path, "a cat --sed 3\r\na dog\r\n\r\n--w 8\r\n")
    assert refused(file) == [":1: --sed: unknown flag; did you mean `--d`?", ":4: has no prompt before its flags"]


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    assert refused(written(tmp_path, "# nothing\n\n")) == [
        ": holds no prompt; a line holds one, and those that begin with # are comments"
    ]
    assert refused(written(tmp_path, b"\x00\x81\x00")) == [
        ": is neither UTF-8 nor Windows-1252 (byte 0x00 at 0); save it as UTF-8"
    ]
    assert refused(written(tmp_path, "a cat\n" * 501)) == [": holds 501 prompts; at most 500 are drawn"]
    assert refused(written(tmp_path, "x" * (1 << 20) + "y"))[0].startswith(": has 1,048,577 bytes")
    assert refused(tmp_path)[0].startswith(": is a folder")
    assert refused(tmp_path / "promts.txt") == [f": no such file; did you mean `{tmp_path / 'prompts.txt'}`?"]
    assert refused(tmp_path / "prompts.yaml")[0].startswith(": must be .txt, .json or .toml; lists of settings in YAML")


@pytest.mark.parametrize("data", ["ein Fuchs, grün\n".encode(), "\ufeffein Fuchs, grün".encode(),
                                  "ein Fuchs, grün".encode("utf-16"), "ein Fuchs, grün".encode("cp1252")])  # fmt: skip
def test_any_editors_file_is_read(tmp_path: Path, data: bytes) -> None:
    assert [image.prompt for image in read_prompts(written(tmp_path, data)).values()] == ["ein Fuchs, grün"]


def test_samplers_have_many_names() -> None:
    names = {"euler": "Euler", "euler_a": "Euler a", "ddim": "DDIM", "dpmpp_2m": "DPM++ 2M"}
    for ours, theirs in names.items():
        assert sampler_of(theirs) == sampler_of(ours) == (ours, None)
    assert sampler_of("dpmsolver++") == ("dpmpp_2m", None)


def test_a_configuration_holds_what_the_file_held(tmp_path: Path) -> None:
    file = written(tmp_path, "a fox --d 7\n")
    overrides = ["samples.images=[{prompt: a cat, width_px: 512}]", "samples.prompts=[a]"]
    overrides.append(f"samples.prompt_file={file}")
    config = with_prompts_read(load_config(RIGHT, overrides, check_paths=False))
    assert config.samples.prompt_file is None and config.samples.prompts == ["a"]
    assert [(image.prompt, image.width_px, image.seed) for image in config.samples.images] == [
        ("a cat", 512, None),
        ("a fox", None, 7),
    ]


def test_lines_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "a fox\na cat --n blurry\n")
    config = load_config(RIGHT, [f"samples.prompt_file={file}", "samples.guidance_scale=1"], check_paths=False)
    with pytest.raises(UserError) as caught:
        with_prompts_read(config)
    said = "negative_prompt = blurry with samples.guidance_scale = 1.0: has no effect; it needs a guidance above 1"
    assert caught.value.lines == (f"{file}:2: {said}",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["samples.schedule=karras"], "samples.schedule = karras with samples.sampler = euler (the default): has no e"),
        (["samples.sampler=eular"], "samples.sampler = eular: must be one of euler, euler_a, ddim, dpmpp_2m (did you"),
        (["samples.images=[{prompt: a, width_px: 500}]"], "samples.images.0.width_px = 500: must be a multiple of 8"),
        (["samples.images=[{promt: a}]"], "samples.images.0.promt: unknown key; did you mean `prompt`?"),
        (["samples.images=[{seed: 1}]"], "samples.images.0.prompt: missing (what is drawn)"),
        (["samples.images=[{prompt: a}]", "samples.count=3"], "samples.count = 3 with samples.images = [{prompt: a}]:"),
        (
            ["samples.images=[{prompt: a, negative_prompt: b, guidance_scale: 1}]"],
            "samples.images.0.negative_prompt = b with samples.images.0.guidance_scale = 1.0: has no effect",
        ),
        (
            ["samples.images=[{prompt: a, schedule: karras}]"],
            "samples.images.0.schedule = karras with samples.sampler = euler (the default): has no effect",
        ),
    ],
)  # fmt: skip
def test_wrong_settings(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RIGHT, overrides, check_paths=False)
    assert said in "\n".join(caught.value.lines)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RIGHT, [f"samples.prompt_file={tmp_path / 'none.txt'}"])
    assert f"samples.prompt_file = {tmp_path / 'none.txt'}: no such file" in "\n".join(caught.value.lines)


def test_the_commands_prompts_take_the_place_of_the_runs(tmp_path: Path) -> None:
    file = written(tmp_path, "a fox --d 7\n")
    run = ["samples.images=[{prompt: a cat}]", "samples.prompts=[a]"]
    prompts = ["a: [cat] # 1", 'ä "b" 🦊']
    config = with_prompts_read(load_config(RIGHT, [*run, *_prompts(prompts, file)], check_paths=False))
    assert config.samples.prompts == prompts and [image.prompt for image in config.samples.images] == ["a fox"]
    assert load_config(RIGHT, [*run, *_prompts(prompts, None)], check_paths=False).samples.images == []
    assert _prompts([], None) == []
