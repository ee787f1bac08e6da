"""How an image was drawn, as the text that A1111 writes into its PNGs (`parameters`) and reads in "PNG Info".

The format is that of `create_infotext` and `parse_generation_parameters` in A1111's modules: the prompt; a line that
begins with `Negative prompt:`, if there is one; a last line of `Key: value` pairs, values with a comma or colon in
quotes.
"""

import json
import re
import unicodedata
from dataclasses import dataclass

from PIL.PngImagePlugin import PngInfo

from trainer.config.sections.samples_config import SamplerName, ScheduleName

CHUNK = "parameters"
_NAMES: dict[SamplerName, str] = {"euler": "Euler", "euler_a": "Euler a", "ddim": "DDIM", "dpmpp_2m": "DPM++ 2M"}
_NEGATIVE = "Negative prompt: "
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_MOST_CHARACTERS, _MOST_OF_PAIRS = 1 << 16, 4000  # the pattern takes the square of the time


@dataclass(frozen=True)
class Told:
    """What an image's text says."""

    prompt: str
    negative_prompt: str
    settings: dict[str, str]


def sampler_title(sampler: SamplerName, schedule: ScheduleName) -> str:
    """A sampler as A1111 calls it, such as `DPM++ 2M Karras`."""
    return _NAMES[sampler] + (" Karras" if schedule == "karras" else "")


def infotext(prompt: str, negative_prompt: str, settings: dict[str, object]) -> str:
    """The text of an image.

    Args:
        settings: by A1111's names, such as `Steps`, in its order; those that are None are left out.
    """
    text, negative = _unmarked(_plain(prompt)), _unmarked(_plain(negative_prompt))
    # A prompt that begins so cannot be told from a negative one.
    lines = [f", {text}" if text.startswith(_NEGATIVE.strip()) else text]
    if negative:
        lines.append(_NEGATIVE + negative)
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def schedule_title(sampler: SamplerName, schedule: ScheduleName) -> str | None:
    """What A1111 calls the places of the steps, where it would take others if nothing was said.

    Since its version 1.9 `DPM++ 2M` alone is drawn with Karras's.
    """
    return "Uniform" if (sampler, schedule) == ("dpmpp_2m", "normal") else None


def read_infotext(text: str) -> Told:
    """What `infotext` has written; of a text of any other kind, as much as is understood."""
    *lines, last = text[:_MOST_CHARACTERS].strip().split("\n")
    pairs = _PAIR.findall(last[:_MOST_OF_PAIRS])
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE.strip())), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE.strip()).strip()
    return Told("\n".join(lines[:start]), negative, {name: _unquoted(value) for name, value in pairs})


def png_text(text: str) -> PngInfo:
    """For Pillow's `save`; Latin-1 goes into a tEXt chunk, anything else into iTXt."""
    info = PngInfo()
    info.add_text(CHUNK, text)
    return info


def _unmarked(text: str) -> str:
    """With lines that begin as the negative prompt does joined to those before; tokenizers take either as a blank."""
    return text.replace(f"\n{_NEGATIVE.strip()}", f" {_NEGATIVE.strip()}")


def _plain(text: str) -> str:
    """Without characters that a chunk cannot hold, or that would end the text; line breaks stay, tabs become blanks.

    A1111 strips each line, and so does this.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
    text = "\n".join(line.strip() for line in text.split("\n"))
    kept = (c for c in text if c == "\n" or unicodedata.category(c) != "Cc")
    return "".join(kept).encode("utf-8", "replace").decode().strip()


def _quoted(value: object) -> str:
    text = _plain(str(value)).replace("\n", " ")
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"') else text


def _unquoted(value: str) -> str:
    if value[:1] != '"' or value[-1:] != '"':
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value
