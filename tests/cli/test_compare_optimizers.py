"""The run with another kind of optimizer, as its workers read it, and which kinds it does not go with."""

from pathlib import Path
from typing import Any

import pytest

from trainer.cli.benches.compare_optimizers import kinds_of, with_kind
from trainer.config.load import load_config, to_yaml
from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.config.sections.optimizer_config import KINDS


def config_of(optimizer: dict[str, Any], **more: Any) -> Config:
    sections = {
        "run": {"dir": "run"},
        "model": {"path": "model"},
        "data": {"sources": [{"path": "images"}], "prepared": "prepared"},
        "train": {"steps": 10, "precision": "bf16_stochastic"},
        "optimizer": optimizer,
        "lr_schedule": {"kind": "constant"},
    }
    return Config.model_validate(sections | more)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"lr": 1e-6, "betas": [0.9, 0.98], "weight_decay": 0.1, "compile": False},
        {"kind": "prodigy", "lr": 1.0, "d_coef": 2.0, "decay_norms_and_biases": False},
        {"kind": "muon", "lr": 1e-4, "momentum": 0.9},
    ],
)
def test_workers_can_read_the_run_with_each_kind(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """Numbers of one kind are not handed to another, which would refuse them."""
    config = config_of(optimizer)
    for kind in KINDS:
        way = with_kind(config, kind)
        assert not broken_rules(way), kind
        (tmp_path / "c.yaml").write_text(to_yaml(way))
        read = load_config(tmp_path / "c.yaml", check_paths=False)
        assert read.optimizer == way.optimizer and read.optimizer.kind == kind
        expected = config.optimizer.decay_norms_and_biases or kind == "adafactor"  # which decays nothing
        assert read.optimizer.decay_norms_and_biases == expected
    assert with_kind(config, config.optimizer.kind) is config
    assert with_kind(config, "adamw_8bit").optimizer.compile == optimizer.get("compile", "auto")


def test_rates_of_other_kinds() -> None:
    adamw, prodigy = config_of({"lr": 1e-6}), config_of({"kind": "prodigy", "lr": 1.0})
    assert [with_kind(adamw, kind).optimizer.lr for kind in ("lion", "dadapt_adam")] == [1e-6, 1.0]
    assert [with_kind(prodigy, kind).optimizer.lr for kind in ("prodigy", "dadapt_adam", "lion")] == [1.0, 1.0, 1e-5]


def test_what_the_run_does_not_go_with() -> None:
    rates = {"unet": {}, "text_encoder_1": {"train": True, "lr": 1e-5}}
    config = config_of({"lr": 1e-6}, trainable=rates, lr_schedule={"kind": "cosine"})
    refused = {kind: problems[0].text for kind in KINDS if (problems := broken_rules(with_kind(config, kind)))}
    assert set(refused) == {"prodigy", "dadapt_adam", "schedule_free_adamw"}
    assert "trainable.text_encoder_1.lr = 1.0e-05" in refused["prodigy"]
    released = config_of({"lr": 1e-6}, memory={"release_gradients": True}, train={"steps": 10})
    refused = {kind: problems[0].text for kind in KINDS if (problems := broken_rules(with_kind(released, kind)))}
    assert set(refused) == {"prodigy", "dadapt_adam"}


def test_kinds_by_name() -> None:
    assert kinds_of("all") == KINDS
    assert kinds_of("lion,adamw,lion") == ("lion", "adamw")
