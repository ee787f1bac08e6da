"""What the pages show is so: examples of configurations are valid, links lead somewhere, messages are the program's."""

import ast
import configparser
import re
from pathlib import Path

import pytest

from trainer.cli import main as cli
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.config.yaml_source import dump, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
]
REST = {"run": {"dir": "runs/x"}, "model": {"path": "model"}, "train": {"steps": 1}, "optimizer": {"lr": 1e-6},
        "data": {"sources": [{"path": "photos"}], "prepared": "prepared"}}  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_valid(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(dump(REST | dict(parse(text).value)))
    load_config(tmp_path / "config.yaml", check_paths=False)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings; `tests/test_site.py` has the site's."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_configurations_are_marked_as_such(page: Path) -> None:
    """Else nothing would check them."""
    sections = "|".join(Config.model_fields)
    assert not re.findall(rf"^    (?:{sections}):.*$", page.read_text(encoding="utf-8"), re.M)


def _is_said(piece: str, literals: str) -> bool:
    """Whether a literal of the code holds a piece of a message, or two that follow one another."""
    seams = (at for at in range(6, len(piece) - 5) if piece[:at] in literals)
    return piece in literals or any(piece[at:].strip() in literals for at in seams)


def test_messages_of_the_troubleshooting_are_the_programs_own() -> None:
    """Each piece between two values, which are written `…`."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "trainer").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    literals = "\0".join(node.value for node in nodes if isinstance(node.value, str))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [text.strip() for text in re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)]
    for message in messages:
        pieces = [piece for part in message.split("…") if (piece := part.strip(" .,:;()"))]
        assert max(map(len, pieces)) >= 15, message
        unsaid = [piece for piece in pieces if not _is_said(piece, literals)]
        assert not unsaid, f"{message}: the program does not say {unsaid}"
    assert len(messages) >= 25
    assert all("**Do.**" in section for section in page.split("\n### ")[1:])
    assert not _is_said("has no bf16 arithmetics", literals) and not _is_said("holds no complete checkmate", literals)


def test_the_architecture_names_modules_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text.partition("### For example")[0])) - {"tests/test_structure.py"}
    assert len(named) > 30
    assert not {name for name in named if not (ROOT / "trainer" / name).is_file() and "NAME" not in name}
    rooms = {folder.name for folder in (ROOT / "trainer").iterdir() if (folder / "__init__.py").is_file()}
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE))


def test_the_unit_of_systemd_lets_a_run_save_and_does_not_repeat_mistakes() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "scripts" / "sdxl-train@.service")
    service = unit["Service"]
    assert service["ExecStart"].endswith(".venv/bin/sdxl-train configs/%i.yaml")
    assert (service["KillMode"], service["Restart"]) == ("mixed", "on-failure")
    assert service["RestartPreventExitStatus"] == str(cli.main(["no-such-command"]))
