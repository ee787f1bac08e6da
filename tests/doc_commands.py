"""Command lines as the pages and helps show them, and what the program's own parsers make of each."""

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from trainer.cli.commands.data import ACTIONS
from trainer.cli.main import COMMANDS, main

_SHELL = {">", ">>", "<", "|", "||", "&&", "&", ";"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SUBCOMMANDS = {"data": tuple(ACTIONS), "adapter": ("merge", "extract", "inspect")}


class _Parsed(Exception):
    """Takes the place of all that a command would do once its words have been understood."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        super().__init__()
        self.namespace = namespace


def shown_commands(text: str) -> Iterator[str]:
    """Each line `sdxl-train ...` of the blocks of a page in Markdown: what a reader copies."""
    for language, block in _FENCE.findall(text):
        if language not in ("yaml", "text"):
            yield from commands_of_block(block)
    yield from commands_of_block(
        "\n".join(line for line in _FENCE.sub("", text).split("\n") if line.startswith("    "))
    )


def named_commands(text: str) -> Iterator[str]:
    """Each `sdxl-train ...` within the sentences of a page: what it works on may be left out."""
    prose = "\n".join("" if line.startswith("    ") else line for line in _FENCE.sub("", text).split("\n"))
    for span in re.findall(r"`([^`]+)`", prose):
        if span.startswith("sdxl-train"):
            yield " ".join(span.split())


def commands_of_block(block: str) -> Iterator[str]:
    """The lines that begin with the program's name, without the remark behind two spaces at their end."""
    for line in re.sub(r"\\\n\s*", "", block).split("\n"):
        if line.lstrip().startswith("sdxl-train "):
            yield re.split(r" {2,}", line.strip())[0]


def words_of(command: str) -> list[str]:
    """The words behind the program's name, up to what is the shell's, and without what stands for more of the kind."""
    words = shlex.split(re.sub(r"\[[a-z]+\.key=value[^\]]*\]", "", command), comments=True)[1:]
    end = next((at for at, word in enumerate(words) if word in _SHELL), len(words))
    return [word for word in words[:end] if word not in ("...", "…")]


def is_name(words: Sequence[str]) -> bool:
    """Whether these are nothing but the name of a command or of one of its actions."""
    return tuple(words) in all_commands()


def parsed(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the command's own parser makes of the words.

    Raises:
        SystemExit: it does not understand them, and has said why.
        UserError: there is no such command.
    """

    def stopping(name: str) -> Any:
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
            raise _Parsed(parse(self, *given))

        return parse_and_stop

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        try:
            code = main(words)
        except _Parsed as understood:
            return understood.namespace
    raise AssertionError(f"{' '.join(words)}: ended with {code} before its words were looked at")


def all_commands() -> list[tuple[str, ...]]:
    """Each command, and each action of those that have some."""
    return [(name,) for name in COMMANDS] + [(name, each) for name, those in SUBCOMMANDS.items() for each in those]
