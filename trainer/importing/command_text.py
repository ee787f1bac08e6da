"""The command of a training as somebody keeps it: one line, a shell script, or TOML; as words, not yet understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import UserError

_SCRIPT = re.compile(
    r"(?:.*/)?(?:(sdxl_train_network|sdxl_train)(?:_[\w-]+)?|(train_text_to_image_(?:lora_)?sdxl))\.py$"
)
SCRIPTS = "sdxl_train.py, sdxl_train_network.py or train_text_to_image_(lora_)sdxl.py"
_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(\S.*|)$")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


@dataclass(frozen=True)
class Command:
    """A command of kohya's scripts, or of diffusers'.

    Attributes:
        script: `sdxl_train`, `sdxl_train_network`, `train_text_to_image_sdxl` or `train_text_to_image_lora_sdxl`; ""
            where it is not told.
        launch: the words between `accelerate launch` and the script.
        words: those after the script.
    """

    script: str = ""
    launch: Sequence[str] = ()
    words: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def read_command(text: str, place: str) -> Command:
    """The one command of a shell script that starts one of these scripts.

    Options may stand on lines of their own without a backslash, as people paste them; comments are left out, and
    variables that the script sets are put in.

    Args:
        place: where the text is from, for messages.
    Raises:
        UserError: there is no such command, several, or a quote that is not closed.
    """
    variables: dict[str, str] = {}
    commands: list[str] = []
    goes_on, is_ours = False, False
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("#"):
            continue
        assigned = None if goes_on else _ASSIGNED.fullmatch(line)
        continues = line.endswith("\\")
        body = line.removesuffix("\\").strip()
        if assigned and not continues:
            variables[assigned[1]] = _unquoted(assigned[2])
        elif goes_on or (is_ours and body.startswith("-")):
            commands[-1] += f" {body}"
        elif body:
            commands.append(body)
            is_ours = False
        is_ours = is_ours or bool(commands and _names_script(commands[-1]))
        goes_on = continues
    found = [command for command in map(_split(place, variables), commands) if command is not None]
    if len(found) != 1:
        rule = "no command" if not found else f"{len(found)} commands"
        raise UserError(f"{place}: holds {rule} with {SCRIPTS}; give one")
    return found[0]


def command_of_words(words: Sequence[str]) -> Command | None:
    """A command that is split into words already; None: it is of another script."""
    for i, word in enumerate(words):
        if match := _SCRIPT.fullmatch(word):
            return Command(match[1] or match[2], [*words[:i]], [*words[i + 1 :]])
    return None


def read_toml(text: str, place: str) -> dict[str, Any]:
    """A TOML file's tables.

    Raises:
        UserError: it is none.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not TOML: {error}") from None


def _names_script(text: str) -> bool:
    return any(_SCRIPT.fullmatch(word.strip("\"'")) for word in text.split())


def _split(place: str, variables: Mapping[str, str]) -> Any:
    def split(text: str) -> Command | None:
        if not _names_script(text):
            return None
        filled = _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), text)
        try:
            return command_of_words(shlex.split(filled, comments=True))
        except ValueError as error:
            raise UserError(f"{place}: the command cannot be split into words: {error}") from None

    return split


def _unquoted(text: str) -> str:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return text
    return words[0] if words else ""
