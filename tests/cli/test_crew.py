"""Who works: one worker a card that is there, and as many images a step as the run began with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.checkpoint.manifest import MANIFEST
from trainer.cli.crew import config_of, first_crew, note_crew
from trainer.cli.keep_running import EVENTS, keep_running
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.host.card_choice import CardsInUse
from trainer.host.card_process import FAKE_CARDS


def config_in(folder: Path, workers: int | None = None, **train: int) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"path": "model"},
            "data": {"sources": [{"path": "."}], "prepared": "prepared"},
            "train": {"steps": 9, **train},
            "optimizer": {"lr": 1e-4},
            "launch": {"workers": workers},
        }
    )


def put_in(letters: str) -> None:
    """The cards that the host has from now on."""
    cards = [{"uuid": f"GPU-{letter}", "lost": letter.isupper()} for letter in letters]
    Path(os.environ[FAKE_CARDS]).write_text(json.dumps({"cards": cards}))


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for the driver, and no other one."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(FAKE_CARDS, str(tmp_path / "cards-of-the-host.json"))


def test_groups_that_do_not_come_out_even_become_one(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config = config.model_copy(update={"memory": config.memory.model_copy(update={"shard_within": 2})})
    put_in("abcd")
    crew = first_crew(config, "train")
    for workers, within in ((4, 2), (3, "all"), (2, 2)):
        cards = CardsInUse(crew.in_use.cards[:workers])
        assert config_of(config, crew.on(cards)).memory.shard_within == within


def with_a_checkpoint(config: Config) -> None:
    folder = config.run.dir / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("train", "images"),
    [
        ({"batch_size_per_gpu": 3}, 12),
        ({"batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 24),
        ({"batch_size_per_gpu": 2, "global_batch_size": 10}, 10),
    ],
)
def test_a_run_keeps_the_images_of_a_step_that_it_began_with(
    tmp_path: Path, train: dict[str, int], images: int
) -> None:
    config = config_in(tmp_path, 4, **train)
    put_in("abcd")
    first = first_crew(config, "train")
    assert (first.workers, first.began_with) == (4, 4) and config_of(config, first) is config
    note_crew(config, first)
    with_a_checkpoint(config)
    put_in("aBcd")
    fewer = first_crew(config, "train")
    assert [card.uuid for card in fewer.in_use.cards] == ["GPU-a", "GPU-c", "GPU-d"]
    changed = config_of(config, fewer).train
    assert (changed.global_batch_size, changed.gradient_accumulation_steps) == (images, None)
    note_crew(config, fewer)
    left = fewer.on(CardsInUse(fewer.in_use.cards[1:]))
    assert left.workers == 2 and config_of(config, left).train.global_batch_size == images
    put_in("abcd")
    again = first_crew(config, "train")
    assert (again.workers, again.began_with) == (4, 4) and config_of(config, again) is config


def test_somebody_who_asks_for_another_batch_gets_it(tmp_path: Path) -> None:
    config = config_in(tmp_path, None, batch_size_per_gpu=3)
    put_in("abcd")
    note_crew(config, first_crew(config, "train"))
    with_a_checkpoint(config)
    put_in("abc")
    other = config_in(tmp_path, None, batch_size_per_gpu=2)
    crew = first_crew(other, "train")
    assert (crew.workers, crew.began_with) == (3, 3) and config_of(other, crew) is other


def test_a_run_that_began_on_cards_does_not_go_on_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, 2)
    put_in("AB")
    assert first_crew(config, "train").workers == 2, "one that has not begun may begin on the CPU"
    put_in("ab")
    note_crew(config, first_crew(config, "train"))
    with_a_checkpoint(config)
    put_in("AB")
    crew = first_crew(config, "train")
    assert crew.workers == 0
    assert keep_running("train", config, crew, config.run.dir, {}) == 1  # 2 would keep systemd from trying again
    assert "began on cards, and there is none now" in capsys.readouterr().err
    assert "began on cards" in (config.run.dir / EVENTS).read_text()
    assert first_crew(config, "bench").workers == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert first_crew(config, "train").workers == 2


def test_fewer_cards_than_asked_for_are_refused_where_the_run_began_so(tmp_path: Path, nvidia_smi: Path) -> None:
    put_in("")
    with pytest.raises(UserError, match="4 is more than this host's GPUs"):
        first_crew(config_in(tmp_path, 4), "train")
    crew = first_crew(config_in(tmp_path), "train")
    assert crew.gpu and crew.environment() == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa1111,GPU-bbbb2222,GPU-cccc3333"}
    assert replace(crew, in_use=CardsInUse(())).environment() == {}


def test_lines_that_nobody_can_read_end_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.cli import keep_running; "
        "keep_running._tell(Path(sys.argv[1]), 'a card is gone'); print('goes on')"
    )
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert (ended.returncode, ended.stdout) in ((0, "goes on\n"), (120, "goes on\n"))
    assert (tmp_path / EVENTS).read_text().endswith("  a card is gone\n")
