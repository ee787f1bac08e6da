"""SDXL without its weights: as large as the published model, on next to no disk, and enough for a plan."""

from pathlib import Path

import pytest

from trainer.cli import main as cli
from trainer.model.outline import published_outline

# The published files' own, which other tests read from headers of models that diffusers wrote.
COUNTS = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_sizes_of_the_published_model_on_no_disk(tmp_path: Path) -> None:
    model = published_outline(tmp_path)
    assert {name: model.count_weights(name) for name in COUNTS} == COUNTS
    files = [path.stat() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(file.st_size for file in files) > 2 * sum(COUNTS.values())
    assert sum(512 * file.st_blocks for file in files) < 2_000_000


@pytest.mark.slow
def test_a_plan_without_any_files(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that somebody tries in a fresh clone; figures as the configuration's own."""
    config = ROOT / "configs" / "4x3090.yaml"
    assert cli.main(["plan", str(config), "--sdxl", "launch.workers=4"]) == 0
    told = capsys.readouterr().out
    assert f"unet ({COUNTS['unet']:,} weights)" in told
    assert "chosen: zero2, 129 of 131 blocks recomputed: 22.96 of 23.00 GiB" in told
