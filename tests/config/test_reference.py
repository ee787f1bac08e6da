"""What editors and readers are told about the keys is what the program accepts."""

import json
import re
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


# Numbers without a unit: rates and their factors, constants of formulas, chances and weights that are called so.
PURE = {
    *("lr", "text_encoder_lr", "lr_scale", "layer_decay", "weight_decay", "weight_decay_scale", "final_ratio"),
    *("betas", "beta3", "eps", "eps2", "clip_threshold", "decay_rate", "d0", "d_coef", "growth_rate", "momentum"),
    *("rank", "alpha", "conv_rank", "conv_alpha", "lokr_factor", "dropout", "max_grad_norm", "latent_scale"),
    *("latent_shift", "shift", "mean", "std", "a", "b", "gamma", "k", "delta", "contrast", "unmasked_weight", "prior"),
    *("offset", "offset_adaptive", "pyramid_levels", "pyramid_discount", "perturbation", "candidates", "power", "min"),
    *("max", "loss_weight", "weight", "repeats", "min_aspect", "max_aspect", "min_score", "max_score", "seed"),
    *("guidance_scale", "guidance_rescale", "spike_sigma", "ns_steps", "restarts", "tag_dropout_rate", "dropout_rate"),
    *("caption_probability", "flip_probability", "offset_probability", "timesteps", "json_depth", "folder_depth"),
}
_UNIT_IN_NAME = re.compile(r"(?:^|_)(?:px|s|c|gib|mib|bytes|pixels|chars|tokens|steps|epochs|items|members|fraction)$")
_UNIT_IN_WORDS = re.compile(
    r"\b(?:steps?|blocks|epochs|passes|images|captions|pixels|tokens|tags|batches|bits|bytes|checkpoints|snapshots|files"
    r"|entries|rows|columns|workers|processes|threads|seconds|degrees|share|part of|GiB)\b",
    re.IGNORECASE,
)


def test_every_number_has_its_unit() -> None:
    """In its name or in its meaning; what has none is listed above, so that a new key is thought about."""
    rows = [line.strip("| ").split(" | ") for line in field_docs().splitlines() if line.startswith("| `")]
    without = set[str]()
    for name, values, default, *meaning in rows:
        assert values and default and len(" | ".join(meaning)) > 10, name
        key = name.strip("`")
        if re.search(r"number", values) and not _UNIT_IN_NAME.search(key) and key not in PURE:
            without |= set() if _UNIT_IN_WORDS.search(" ".join(meaning)) else {key}
    assert not without
    assert {row[0].strip("`") for row in rows} >= PURE


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
