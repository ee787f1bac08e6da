"""docs/quickstart_sdxl.md as a reader goes through it: each of its commands, in order, on a small model."""

import http.client
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.doc_commands import shown_commands, words_of
from trainer.cli.main import main
from trainer.config.yaml_source import dump, parse

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quickstart_sdxl.md"
pytestmark = pytest.mark.e2e
SMALL = {"data": {"buckets": {"resolution": 64, "min_px": 32, "max_px": 128, "step_px": 32}},
         "train": {"epochs": None, "steps": 3}, "lr_schedule": {"warmup_steps": 0},
         "samples": {"every_steps": 2, "steps": 2}}  # fmt: skip


def make_small(config: Path, tokenizer: Path) -> None:
    """Smaller sizes, and a tokenizer in place of the one that the page downloads; all else as `init` wrote it."""
    sections = dict(parse(config.read_text(encoding="utf-8")).value)
    for name, values in {**SMALL, "model": {"tokenizer": str(tokenizer)}}.items():
        sections[name] = sections.get(name, {}) | values
    config.write_text(dump(sections), encoding="utf-8")


def look_at_live(words: list[str], folder: Path) -> None:
    """The page that is served while the run trains: fetched once, then ended as a reader does."""
    command = [sys.executable, "-m", "trainer", *words, "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as live:
        assert live.stdout
        address = urlsplit(live.stdout.readline().split()[0])
        asked = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=120)
        asked.request("GET", "/")
        assert asked.getresponse().status == 200
        live.send_signal(signal.SIGINT)
        assert live.wait(120) in (0, 130)


def follow(commands: list[str], folder: Path, tokenizer: Path) -> list[str]:
    """Types the commands in the folder; the first word of each.

    `doctor` is left out: it looks at this machine, which is as it is, and tests/doctor has machines of all kinds.
    """
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for words in map(words_of, commands):
            if "--live" in words:
                look_at_live(words, folder)
            elif words[0] != "doctor":
                assert main(words) == 0, words
            if words[0] == "init":
                make_small(Path("foxes.yaml"), tokenizer)
            done.append(words[0])
    return done


COMMANDS = list(shown_commands(PAGE.read_text(encoding="utf-8")))
TRAINING = COMMANDS.index("sdxl-train foxes.yaml")


@pytest.fixture(scope="module")
def prepared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands before the training have been typed."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "foxes").mkdir()
    for number in range(8):
        picture = Image.effect_noise((96, 64 + 16 * (number % 3)), 30 + number).convert("RGB")
        picture.save(folder / "foxes" / f"IMG_{number:04}.jpg")
        (folder / "foxes" / f"IMG_{number:04}.txt").write_text("a red fox in snow, looking up")
    (folder / "models").mkdir()
    assert main(["export", str(model_folder), "-o", str(folder / "models" / "sd_xl_base_1.0.safetensors")]) == 0
    done = follow(COMMANDS[:TRAINING], folder, model_folder / "tokenizer")
    assert done == ["--version", "doctor", "init", "plan", "prepare", "data", "data"]
    return folder


def test_up_to_the_training(prepared: Path) -> None:
    assert (prepared / "runs" / "foxes-prepared" / "browse.html").is_file()
    assert (prepared / "runs" / "foxes-prepared" / "stats.png").is_file()


def test_from_the_training_on(prepared: Path, model_folder: Path) -> None:
    done = follow(COMMANDS[TRAINING:], prepared, model_folder / "tokenizer")
    assert done == ["foxes.yaml", "report", "report", "sample", "eval", "export", "inspect"]
    assert (prepared / "runs" / "foxes" / "report.html").is_file() and (prepared / "foxes.safetensors").is_file()
    assert list((prepared / "runs" / "foxes" / "samples" / "drawn").rglob("*.png"))
