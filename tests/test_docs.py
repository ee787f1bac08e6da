"""What the pages show can be typed: each example of a configuration is a valid one."""

import configparser
import re
from pathlib import Path

import pytest

from trainer.cli import main as cli
from trainer.config.load import load_config
from trainer.config.yaml_source import dump, parse

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
]
REST = {"run": {"dir": "runs/x"}, "model": {"path": "model"}, "train": {"steps": 1}, "optimizer": {"lr": 1e-6},
        "data": {"sources": [{"path": "photos"}], "prepared": "prepared"}}  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_valid(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(dump(REST | dict(parse(text).value)))
    load_config(tmp_path / "config.yaml", check_paths=False)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/data.md", "docs/optimizers.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


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
