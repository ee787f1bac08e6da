"""What images say of how they were drawn, read by a parser of A1111's format that shares nothing with ours."""

import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from trainer.evaluate.drawing.infotext import infotext, png_text, read_infotext, sampler_title, schedule_title

SETTINGS: dict[str, object] = {
    "Steps": 28,
    "Sampler": "DPM++ 2M Karras",
    "CFG scale": 6.0,
    "Seed": 4294967295,
    "Size": "832x1216",
    "Model": "foxes-step-00000120-ema",
    "RNG": "CPU",
    "Guidance rescale": None,
}


def chunks_of(data: bytes) -> list[tuple[str, bytes]]:
    """Type and content of each chunk (PNG specification, 5.3)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + content)
        found.append((kind.decode(), content))
        at += 12 + length
    return found


def parameters_of(file: Path) -> str:
    """The text under `parameters`: of a tEXt chunk in Latin-1, of an iTXt chunk in UTF-8 (11.3.4)."""
    for kind, content in chunks_of(file.read_bytes()):
        keyword, _, rest = content.partition(b"\0")
        if kind == "tEXt" and keyword == b"parameters":
            return rest.decode("latin-1")
        if kind == "iTXt" and keyword == b"parameters":
            compressed, _method, rest = rest[0], rest[1], rest[2:]
            assert not compressed
            _language, _, rest = rest.partition(b"\0")
            _translated, _, text = rest.partition(b"\0")
            return text.decode("utf-8")
    raise AssertionError("no text")


def png_info(text: str) -> dict[str, str]:
    """As A1111's wiki describes it: prompt, `Negative prompt: ...`, and on the last line pairs apart by commas, where a
    value with a comma stands in double quotes."""
    body, _, last = text.rpartition("\n")
    prompt, found, negative = body.partition("\nNegative prompt: ")
    fields = {"prompt": prompt, "negative": negative if found else ""}
    rest = last
    while rest:
        key, _, rest = rest.partition(": ")
        if rest.startswith('"'):
            end = next(i for i in range(1, len(rest)) if rest[i] == '"' and rest[i - 1] != "\\")
            value, rest = rest[1:end], rest[end + 1 :].removeprefix(", ")
        else:
            value, _, rest = rest.partition(", ")
        fields[key] = value
    return fields


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a red fox in snow", ""),
        ("a red fox, (best quality:1.2), <lora:x:1>", "blurry, lowres"),
        ("ein Fuchs, grün", "unscharf, häßlich"),
        ("лиса, 狐 🦊", "размыто"),
        ("two lines:\nof text, Steps: none", "one,\ntwo"),
    ],
)
def test_a1111_would_read_it(tmp_path: Path, prompt: str, negative: str) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(file, pnginfo=png_text(infotext(prompt, negative, SETTINGS)))
    text = parameters_of(file)
    fields = png_info(text)
    assert fields == {
        "prompt": prompt,
        "negative": negative,
        "Steps": "28",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "6.0",
        "Seed": "4294967295",
        "Size": "832x1216",
        "Model": "foxes-step-00000120-ema",
        "RNG": "CPU",
    }
    # The pattern of its own source finds the same pairs.
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    assert dict(re.findall(pattern, text.rsplit("\n", 1)[1])) == {k: fields[k] for k in fields if k[0].isupper()}
    told = read_infotext(text)
    assert (told.prompt, told.negative_prompt) == (prompt, negative)
    assert told.settings["Size"] == "832x1216" and len(told.settings) == 7


def test_values_that_would_end_early_are_quoted() -> None:
    text = infotext("a", "", SETTINGS | {"Model": 'run, "best": 2'})
    assert text.endswith('Model: "run, \\"best\\": 2", RNG: CPU')
    assert read_infotext(text).settings["Model"] == 'run, "best": 2'


def test_characters_that_no_chunk_holds(tmp_path: Path) -> None:
    text = infotext("a\0b\x1b[2J\rc\r\nd\ud83d", "", SETTINGS)
    file = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(file, pnginfo=png_text(text))
    assert png_info(parameters_of(file))["prompt"] == "ab[2J\nc\nd?"


@pytest.mark.parametrize("text", ["", "a cat", "\n\n", "Steps: 1", "Negative prompt: b", "a, b: c, " * 9000])
def test_any_text_is_read(text: str) -> None:
    told = read_infotext(text)
    assert isinstance(told.settings, dict)


@pytest.mark.parametrize(
    ("prompt", "negative", "read"),
    [
        ("a\nNegative prompt: b", "c\nNegative prompt: d", ("a Negative prompt: b", "c Negative prompt: d")),
        ("Negative prompt: alone", "", (", Negative prompt: alone", "")),
        ("  spaced \n\t line\t", " neg ", ("spaced\nline", "neg")),
        ("tab\there", "", ("tab here", "")),
        ("", "only this", ("", "only this")),
        ("", "", ("", "")),
        ("Steps: 20, Sampler: Euler a, Seed: 1", "Steps: 1, Seed: 2, Size: 3x4", None),
        ("a\n\n\nb", 'say "this", \\(so\\)', None),
        ("<lora:x:1> [a:b:0.5] {c|d}", '"begins and ends"', None),
    ],
)
def test_what_a1111s_parser_would_take_for_something_else(
    prompt: str, negative: str, read: tuple[str, str] | None
) -> None:
    """By the steps of its `parse_generation_parameters`: the last line is pairs; each line is stripped; one that begins
    with `Negative prompt:` begins that one, and what follows up to the last line belongs to it."""
    *lines, last = infotext(prompt, negative, SETTINGS).strip().split("\n")
    found, side = {"prompt": [], "negative": []}, "prompt"
    for line in (line.strip() for line in lines):
        side = "negative" if line.startswith("Negative prompt:") else side
        found[side].append(line[16:].strip() if line.startswith("Negative prompt:") else line)
    assert ("\n".join(found["prompt"]), "\n".join(found["negative"])) == (read or (prompt, negative))
    assert last.startswith("Steps: 28, Sampler: ") and last.endswith(", RNG: CPU")
    told = read_infotext(infotext(prompt, negative, SETTINGS))
    assert (told.prompt, told.negative_prompt) == (read or (prompt, negative))


def test_samplers_have_a1111s_names() -> None:
    names = [sampler_title(name, "normal") for name in ("euler", "euler_a", "ddim", "dpmpp_2m")]
    assert names == ["Euler", "Euler a", "DDIM", "DPM++ 2M"]
    assert sampler_title("dpmpp_2m", "karras") == "DPM++ 2M Karras" and schedule_title("dpmpp_2m", "karras") is None
    # Alone, A1111 takes Karras's steps with DPM++ 2M, and even ones with the others.
    assert schedule_title("dpmpp_2m", "normal") == "Uniform" and schedule_title("euler", "normal") is None
