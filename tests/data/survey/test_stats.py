"""Tables and histograms of a prepared set: `data stats` from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data.kohya_files import entry, kohya_npz, settings_of, write_files, write_metadata
from tests.data.small_set import write_small_set
from trainer.cli.main import main
from trainer.config.sections.data.sources import KohyaJsonSource
from trainer.data.buckets import Bucket
from trainer.data.captions import PLAIN
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.stats import Sample, bucket_counts, sample
from trainer.evaluate.data_chart import DataChart, data_chart_png

SQUARE, TALL = Bucket(64, 64), Bucket(128, 64)


def _sampled(root: Path, count: int) -> Sample:
    *steps, last = sample(PreparedSet.open(root), count, PLAIN)
    assert len(steps) <= count and last is not None
    return last


def test_buckets_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 11, TALL: 1}, repeats=3)
    counts = bucket_counts(PreparedSet.open(root))
    assert [(c.bucket, c.images, c.per_epoch, c.shards) for c in counts] == [(SQUARE, 11, 33, 3), (TALL, 1, 3, 1)]
    reasons = [*(f"is {n}x{n} px, but was 1x1" for n in range(4)), "is empty"]
    lines = [json.dumps({"path": "a.png", "key": "a", "reason": reason}) + "\n" for reason in reasons]
    (root / "bad.jsonl").write_text("".join(lines))
    (root / "left-out.jsonl").write_text(lines[-1].replace("is empty", "least side 32 px"))
    assert main(["data", "stats", str(root)]) == 0
    out = capsys.readouterr().out
    assert "  64 x 64                           11            33  91.67 %       3\n" in out
    assert "  all 2                             12            36 100.00 %       4\n" in out
    assert "left out: 5 images" in out and "           4  is NxN px, but was NxN\n" in out
    assert "left out by filters: 1 images" in out and "           1  least side N px\n" in out
    assert f"histograms of all 36 training images: {root / 'stats.png'}\n" in out
    with Image.open(root / "stats.png") as image:
        assert image.size[0] > 1000


def test_a_sample_is_spread_evenly_and_says_so(tmp_path: Path) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 30, TALL: 10})
    found = _sampled(root, 5)
    assert found.rows == 40 and found.unreadable == 0
    assert found.texts == ("photo 0", "photo 9", "photo 19", "photo 29", "photo 9")
    assert found.target_hw.tolist() == [[64, 64]] * 4 + [[128, 64]]
    assert np.array_equal(found.original_hw[:, 0], [0, 9, 19, 29, 9])
    (root / "64x64-5.safetensors").unlink()
    assert _sampled(root, 100).unreadable == 5


@pytest.mark.e2e
def test_the_size_of_an_image_is_not_guessed_from_its_latents(tmp_path: Path) -> None:
    write_files(tmp_path / "latents", {f"{i}.npz": kohya_npz(i, (64, 64)) for i in range(3)})
    entries = {"0": entry(0, (64, 64)), "1": entry(1, (64, 64), image_size=[300, 200]), "2": entry(2, (64, 64))}
    write_metadata(tmp_path / "meta.json", entries)
    root = tmp_path / "prepared"
    plan_prepare(
        settings_of(
            root, KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "latents")
        ),
        show_progress=False,
    )
    encode_shards(root, 0, 1, None)
    commit(root)
    found = _sampled(root, 10)
    assert found.original_hw.tolist() == [[0, 0], [200, 300], [0, 0]]
    assert found.target_hw.tolist() == [[64, 64]] * 3
    for known in (found.original_hw, np.zeros((3, 2), dtype=np.int64)):
        chart = DataChart("title", "subtitle", known, found.target_hw, [3, 4, 5], "tokens", 75, np.array([0.5, 1, 3]))
        data_chart_png(chart, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").stat().st_size > 10_000


@pytest.mark.e2e
def test_lengths_are_tokens_where_a_config_names_the_model(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 3})
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model_folder)},
        "data": {"sources": [{"path": "."}], "prepared": str(root)},
        "train": {"steps": 1},
        "optimizer": {"lr": 1e-4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "drawn.png"
    assert main(["data", "stats", str(tmp_path / "config.yaml"), "--out", str(out), "--sample", "2"]) == 0
    assert f"histograms of a sample of 2 of 3 training images: {out}" in capsys.readouterr().out
    assert out.is_file() and not (root / "stats.png").exists()


def test_what_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 3})
    assert main(["data", "stats", str(root), "--out", str(tmp_path / "no/stats.png")]) == 2
    said = capsys.readouterr()
    assert "left out: none\n" in said.out and "there is no folder" in said.err
    assert main(["data", "stats", str(root), "--model", str(tmp_path)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
