"""What accelerate was told: how many processes there are, in which precision, and DeepSpeed's stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.yaml_source import YamlError, parse
from trainer.errors import UserError
from trainer.importing.command_text import Command
from trainer.importing.draft_end import read_text
from trainer.importing.given import Draft


def accelerate_file(command: Command, given: Path | None) -> tuple[Path | None, str]:
    """accelerate's YAML file, and what to say of one that the command names and that is not there.

    Args:
        given: a file that counts before the one that the command names.
    """
    named = _launch_option(command, "--config_file") or _launch_option(command, "--config-file")
    if given is not None or named is None:
        return given, ""
    path = Path(named).expanduser()
    if path.is_file():
        return path, ""
    mend = "give it by --accelerate-config, or set launch.workers to the number of cards"
    return None, f"accelerate's {named} is not here: {mend}"


def launched(draft: Draft, command: Command, accelerate: Path | None) -> tuple[int | None, int | None]:
    """(processes, DeepSpeed's ZeRO stage) of accelerate, where they are told."""
    workers: int | None = None
    stage: int | None = None
    accelerate, missing = accelerate_file(command, accelerate)
    if missing:
        draft.notes.append(missing)
    if accelerate is not None:
        table = _yaml_table(accelerate)
        workers = _whole(table.get("num_processes"))
        deepspeed = table.get("deepspeed_config")
        stage = _whole(deepspeed.get("zero_stage")) if isinstance(deepspeed, dict) else None
    for option in ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node"):
        if (told := _launch_option(command, option)) is not None:
            workers = _whole(told)
    return workers, stage


def _launch_option(command: Command, option: str) -> str | None:
    """The value of an option before the script's name."""
    told, words = None, command.launch
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, has_value, value = word.partition("=")
        if name == option:
            told = value if has_value else following
    return told


def _yaml_table(path: Path) -> dict[str, Any]:
    try:
        value = parse(read_text(path)).value
    except YamlError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold keys and values, as accelerate writes them")
    return value


def _whole(value: object) -> int | None:
    return int(str(value)) if str(value).isdecimal() else None


def launched_precision(command: Command, accelerate: Path | None) -> str | None:
    """`mixed_precision` of accelerate, where it is told."""
    accelerate, _ = accelerate_file(command, accelerate)
    of_file = None if accelerate is None else _yaml_table(accelerate).get("mixed_precision")
    told = _launch_option(command, "--mixed_precision") or _launch_option(command, "--mixed-precision") or of_file
    return None if told is None else str(told)
