"""What editors and readers are told about the keys is what the program accepts."""

import json
from pathlib import Path

import pytest

from trainer.cli.commands.schema import main
from trainer.config.fields import all_keys
from trainer.config.reference import field_docs, json_schema

ROOT = Path(__file__).parents[2]
DOCS, CONFIGS = ROOT / "docs" / "config.md", ROOT / "configs"


def test_the_committed_reference_is_current() -> None:
    mend = "run: scripts/reference.sh"
    assert DOCS.read_text(encoding="utf-8") == field_docs(), mend
    assert json.loads((CONFIGS / "sdxl-train.schema.json").read_text(encoding="utf-8")) == json_schema(), mend


def test_ready_configurations_name_the_schema_for_editors() -> None:
    for config in CONFIGS.glob("*.yaml"):
        assert config.read_text().startswith("# yaml-language-server: $schema=sdxl-train.schema.json\n"), config


def test_the_reference_names_every_key_once() -> None:
    rows = [line for line in field_docs().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows].count("keep_tokens") == 1
    assert len(rows) == len(list(all_keys()))


def test_the_schema_serves_an_editor() -> None:
    schema = json_schema()
    assert schema["title"] == "sdxl-train configuration"
    assert set(schema["required"]) == {"run", "model", "data", "optimizer"}
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name
            assert ("default" in field) != (name in section.get("required", ())), name
    flag = schema["$defs"]["TrainConfig"]["properties"]["batch_by_area"]
    assert {"type": "boolean"} in flag["anyOf"]
    assert schema["$defs"]["TrainConfig"]["properties"]["precision"]["enum"][0] == "bf16"


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["--markdown"]) == 0
    assert capsys.readouterr().out == field_docs()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "sdxl-train schema > sdxl-train.schema.json" in capsys.readouterr().out
