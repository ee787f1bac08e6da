"""What accelerate was told: how many processes there are, in which precision, and DeepSpeed's stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.yaml_source import YamlError, parse
from trainer.errors import UserError
from trainer.importing.command_text import Command
from trainer.importing.draft_end import read_text


def launched(command: Command, accelerate: Path | None) -> tuple[int | None, int | None]:
    """(processes, DeepSpeed's ZeRO stage) of accelerate, where they are told."""
    workers: int | None = None
    stage: int | None = None
    if accelerate is not None:
        table = _yaml_table(accelerate)
        workers = _whole(table.get("num_processes"))
        deepspeed = table.get("deepspeed_config")
        stage = _whole(deepspeed.get("zero_stage")) if isinstance(deepspeed, dict) else None
    words = [*command.launch]
    for i, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name in ("--num_processes", "--nproc_per_node", "--nproc-per-node"):
            workers = _whole(value if has_value else (words[i + 1] if i + 1 < len(words) else None))
    return workers, stage


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
    told = None
    if accelerate is not None:
        told = _yaml_table(accelerate).get("mixed_precision")
    for word, following in zip(command.launch, [*command.launch[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if name == "--mixed_precision":
            told = value if has_value else following
    return None if told is None else str(told)
