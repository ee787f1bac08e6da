"""Each command line of the pages, of the configurations' headers and of the helps is one that the program knows."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doc_commands import (
    all_commands,
    commands_of_block,
    is_name,
    named_commands,
    parsed,
    shown_commands,
    words_of,
)
from trainer.cli.main import COMMANDS, main
from trainer.config.load import load_config
from trainer.config.yaml_source import dump

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MINIMAL = {"run": {"dir": "runs/x"}, "model": {"path": "model"}, "train": {"steps": 1}, "optimizer": {"lr": 1e-6},
           "data": {"sources": [{"path": "photos"}], "prepared": "prepared"}}  # fmt: skip


def _shown() -> Iterator[tuple[str, str]]:
    """(page or file, command)."""
    for page in PAGES:
        yield from ((page.name, command) for command in shown_commands(page.read_text(encoding="utf-8")))
    for config in sorted(CONFIGS.glob("*.yaml")):
        header = re.sub(r"^# ?", "", config.read_text(encoding="utf-8"), flags=re.MULTILINE)
        yield from ((config.name, command) for command in commands_of_block(header))


def _named() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield from ((page.name, command) for command in named_commands(page.read_text(encoding="utf-8")))


def _cases(found: Iterator[tuple[str, str]]) -> list[object]:
    return [pytest.param(words_of(command), id=f"{where}: {command}") for where, command in dict.fromkeys(found)]


@pytest.mark.parametrize("words", _cases(_shown()))
def test_a_command_is_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words == ["COMMAND"]:  # of a drawing
        return
    if words == ["--version"]:
        assert main(words) == 0
        return
    found = parsed(words, monkeypatch)
    overrides = [word for word in getattr(found, "overrides", ()) if word != "section.key=value"]
    known = ROOT / (getattr(found, "config", None) or "CONFIG.yaml")
    if known.parent == CONFIGS:
        load_config(known, overrides, check_paths=False)
    elif overrides:
        known = tmp_path / "minimal.yaml"
        known.write_text(dump(MINIMAL))
        load_config(
            known, [*overrides, *["train.steps=null"] * ("train.epochs" in " ".join(overrides))], check_paths=False
        )


@pytest.mark.parametrize("words", _cases(_named()))
def test_a_command_in_a_sentence_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if is_name(words) or words in ([], ["COMMAND"], ["--version"]):
        return
    if words[1:] and words[1].startswith("--") and words[0] in ("bench", "prepare"):
        words = [words[0], "CONFIG.yaml", *words[1:]]
    parsed([word for word in words if not word.startswith("[")], monkeypatch)


def test_the_pages_show_every_command() -> None:
    shown = {words_of(command)[0] for _, command in _shown()}
    assert {*COMMANDS} - shown <= {"train", "schema", "completion"}  # the first may be left out; two stand in sentences


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_help_has_an_example_that_is_understood(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An action of a command may have its example in the command's own help."""
    monkeypatch.setenv("COLUMNS", "1000")
    examples = []
    for words in (command, command[:1]):
        try:
            assert main([*words, "--help"]) == 0
        except SystemExit as ended:
            assert ended.code == 0
        _, *behind = re.split(r"^examples?:|; example:|\bexamples?: ", capsys.readouterr().out, maxsplit=1, flags=re.M)
        lines = re.sub(r"\\\n\s*", "", "\n".join(behind)).replace("; ", "\n").split("\n")
        lines = [line.strip() for line in lines if re.match(r"\s*sdxl-train \S", line)]
        examples += [line for each in lines for line in commands_of_block(each)]
    own = [each for each in examples if words_of(each)[: len(command)] == [*command]]
    if command == ("train",):
        own = [each for each in examples if words_of(each)[0].endswith(".yaml")]
    if command == ("import-kohya",):  # tells of itself under its newer name
        own = [each for each in examples if words_of(each)[0] == "import"]
    assert own, f"{' '.join(command)}: no example in its --help"
    for example in examples:
        if "<Tab>" not in example:
            parsed(words_of(example), monkeypatch)
