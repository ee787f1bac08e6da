"""Whose settings a file holds, by a look at its content: kohya's, diffusers' or OneTrainer's."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.importing.command_text import Command, read_command
from trainer.importing.diffusers_config import import_diffusers
from trainer.importing.draft_end import read_text
from trainer.importing.given import Draft
from trainer.importing.kohya_config import import_command, import_file
from trainer.importing.onetrainer_config import import_onetrainer
from trainer.importing.onetrainer_settings import is_onetrainer, read_json_text


def import_any(place: Path, accelerate: Path | None = None) -> Draft:
    """The configuration of a shell script, of kohya's TOML, or of OneTrainer's JSON.

    Args:
        accelerate: accelerate's YAML file.
    Raises:
        UserError: the file cannot be read, or is none of these.
    """
    text = read_text(place)
    if place.suffix.lower() == ".toml":
        return import_file(place, accelerate)
    if text.lstrip("\ufeff \t\r\n").startswith(("{", "[")):
        settings = read_json_text(text, str(place))
        if isinstance(settings, dict) and "pretrained_model_name_or_path" in settings:
            rule = (
                "settings of a window for kohya's scripts; give the .toml that it writes when it starts a training, or"
            )
            raise UserError(f"{place}: {rule} the command that it prints")
        if not isinstance(settings, dict) or not is_onetrainer(settings):
            raise UserError(f"{place}: JSON, but not OneTrainer's settings, which have training_method and model_type")
        return import_onetrainer(settings, place)
    return import_of(read_command(text, str(place)), str(place), accelerate)


def import_of(command: Command, place: str, accelerate: Path | None = None) -> Draft:
    """The configuration of a command of any script that is known.

    Raises:
        UserError: with the option that cannot be understood.
    """
    known = import_diffusers if command.script.startswith("train_") else import_command
    return known(command, place, accelerate)
