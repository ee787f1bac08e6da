"""The command of a training as somebody keeps it: one line, a script, or TOML; as words, not yet understood."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.errors import UserError
from trainer.importing.shell_lines import read_script, until_operator

_SCRIPT = re.compile(
    r"(?:.*[/\\])?(?:(sdxl_train_network|sdxl_train)(?!_textual_inversion|_control_net|_leco)(?:_[\w-]+)?"
    r"|(train_text_to_image_(?:lora_)?sdxl|train_dreambooth_lora_sdxl(?:_advanced)?))\.py$"
)
SCRIPTS = (
    "sdxl_train.py, sdxl_train_network.py, train_text_to_image_(lora_)sdxl.py or "
    "train_dreambooth_lora_sdxl(_advanced).py"
)


@dataclass(frozen=True)
class Command:
    """A command of kohya's scripts, or of diffusers'.

    Attributes:
        script: its name without `.py` and without what a fork has added, such as `sdxl_train`; "" where it is not told.
        launch: the words between `accelerate launch` and the script.
        words: those after the script.
    """

    script: str = ""
    launch: Sequence[str] = ()
    words: Sequence[str] = ()


def read_command(text: str, place: str) -> Command:
    """The one command of a script, or of a log, that starts one of these scripts.

    Options may stand on lines of their own without a mark at their ends, as people paste them; comments are left out,
    and variables that the script sets are put in.

    Args:
        place: where the text is from, for messages.
    Raises:
        UserError: there is no such command, several, a quote that is not closed, or variables that grow without end.
    """
    try:
        script = read_script(text, _names_script)
        commands = [script.words(command) for command in script.commands if _names_script(command)]
    except ValueError as error:
        raise UserError(f"{place}: the command cannot be split into words: {error}") from None
    found = [each for each in map(command_of_words, commands) if each is not None]
    if len(found) != 1:
        rule = "no command" if not found else f"{len(found)} commands"
        raise UserError(f"{place}: holds {rule} with {SCRIPTS}; give one")
    return replace(found[0], words=until_operator([*found[0].words]))


def command_of_words(words: Sequence[str]) -> Command | None:
    """A command that is split into words already; None: it is of another script."""
    for i, word in enumerate(words):
        if match := _SCRIPT.fullmatch(word):
            return Command(match[1] or match[2], [*words[:i]], [*words[i + 1 :]])
    return None


def _names_script(text: str) -> bool:
    return any(_SCRIPT.fullmatch(word.strip("\"'")) for word in text.split())
