"""kohya's latents used where they lie train the run that they give when they are repacked, and nothing needs a VAE."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from tests.data.kohya_files import entry, kohya_npz, write_files, write_metadata
from tests.train.real_run import Watched, model_of, run_config, watched_run
from trainer.cli.prepare_set import prepare
from trainer.config.schema import Config
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_repack
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import current_snapshot
from trainer.model_files.diffusers_folder import read_config
from trainer.train.workers import prepare_worker as preparation

BUCKETS = [(64, 64), (64, 128)]


def _prepare(config: Config, **options: bool) -> int:
    return prepare(config, model_of(config), **options)


def _config(tmp_path: Path, model_folder: Path, run_dir: str) -> Config:
    source = {"type": "kohya_json", "path": str(tmp_path / "meta.json"), "latents": str(tmp_path / "latents")}
    return run_config(
        model_folder, tmp_path / "prepared", tmp_path / run_dir, data={"sources": [{**source, "repeats": 2}]}, epochs=1
    )


def _write(tmp_path: Path, count: int) -> None:
    entries = {f"d/{i}": entry(i, BUCKETS[i % 2], image_size=[300, 200]) for i in range(count)}
    write_metadata(tmp_path / "meta.json", entries)
    write_files(tmp_path / "latents", {f"d/{i}.npz": kohya_npz(i, BUCKETS[i % 2]) for i in range(count)})


def _told(run: Watched) -> list[tuple[float, float]]:
    return [(float(result.loss), float(result.grad_norm)) for result in run.results]


@pytest.mark.e2e
def test_in_place_and_repacked_give_the_same_run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 9)
    monkeypatch.setattr(preparation, "encode_share", lambda *_: pytest.fail("a worker was started"))
    config = _config(tmp_path, model_folder, "in-place")
    assert _prepare(config) == 0
    in_place = watched_run(config)
    assert Counter(chain(*in_place.keys)) == Counter({f"meta/d/{i}": 2 for i in range(9)})
    plan_repack(tmp_path / "prepared")
    encode_shards(tmp_path / "prepared", 0, 1, encode=None)
    commit(tmp_path / "prepared")
    assert current_snapshot(tmp_path / "prepared") == "000002.json"
    (tmp_path / "latents").rename(tmp_path / "moved")
    repacked = watched_run(_config(tmp_path, model_folder, "repacked"))
    assert repacked.keys == in_place.keys
    assert _told(repacked) == _told(in_place)


def test_it_is_read_from_any_current_directory(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    source = {"type": "kohya_json", "path": "meta.json", "latents": "latents"}
    config = run_config(model_folder.absolute(), tmp_path / "prepared", tmp_path / "run", data={"sources": [source]})
    assert _prepare(config) == 0
    monkeypatch.chdir("/")
    prepared = PreparedSet.open(tmp_path / "prepared")
    assert all(prepared.read("train", bucket, np.arange(2)).ok.all() for bucket in range(2))


def test_scaling_is_that_of_the_models_vae(tmp_path: Path, model_folder: Path) -> None:
    _write(tmp_path, 2)
    assert _prepare(_config(tmp_path, model_folder, "run")) == 0
    prepared = PreparedSet.open(tmp_path / "prepared")
    assert prepared.scaling_factor == read_config(model_folder / "vae")["scaling_factor"]
    (shard,) = (tmp_path / "prepared").rglob("*64x64*.safetensors")
    assert b'"vae":"as given"' in shard.read_bytes()[:4096]
