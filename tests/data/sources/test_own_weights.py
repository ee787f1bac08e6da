"""An image's own weight from every kind of source: stored by `prepare`; an image whose weight is none is left out."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.kohya_files import entry, kohya_npz, write_files, write_metadata, write_tar
from tests.data.photographs import astronaut, pooled, settings_for
from trainer.config.sections.data.sources import (
    FolderSource,
    HfSource,
    KohyaJsonSource,
    LatentTarsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from trainer.config.sections.objective_config import LossWeightsConfig
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.loss_weights import TagSeparators
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.data.sources.columns import loss_weight_of
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import image_weights

WEIGHTS = {"a": 0.5, "b": None, "c": 3, "d": 100.0}
BAD = {"e": 0, "f": -1.0, "g": float("nan"), "h": 1e9}
REASON = "not a number above 0 and at most 100"


def _jpeg() -> bytes:
    file = io.BytesIO()
    astronaut().resize((96, 96)).save(file, "JPEG")
    return file.getvalue()


def _folder(root: Path) -> Source:
    for name, weight in {**WEIGHTS, **BAD}.items():
        write_files(root / "photos", {f"{name}.jpg": _jpeg(), f"{name}.txt": f"photo {name}".encode()})
        if weight is not None:
            (root / f"photos/{name}.weight").write_text(f" {weight}\n")
    return FolderSource(path=root / "photos", weight_extension=".weight")


def _metadata(root: Path, field: str) -> None:
    weights = {**WEIGHTS, **BAD, "g": "NaN"}  # which no JSON number may be
    entries = {name: entry(i, (64, 64), **{field: weight}) for i, (name, weight) in enumerate(weights.items())}
    write_metadata(root / "meta.json", entries)


def _kohya(root: Path) -> Source:
    _metadata(root, "loss_weight")
    write_files(root / "npz", {f"{name}.npz": kohya_npz(0, (64, 64)) for name in (*WEIGHTS, *BAD)})
    return KohyaJsonSource(type="kohya_json", path=root / "meta.json", latents=root / "npz", weight_field="loss_weight")


def _latent_tars(root: Path) -> Source:
    _metadata(root, "w")
    write_tar(root / "tars/0.tar", {f"{name}.npz": kohya_npz(0, (64, 64)) for name in (*WEIGHTS, *BAD)})
    return LatentTarsSource(type="latent_tars", metadata=root / "meta.json", tars=root / "tars", weight_field="w")


def _webdataset(root: Path) -> Source:
    members: dict[str, bytes] = {}
    for name, weight in {**WEIGHTS, **BAD}.items():
        fields = {"caption": f"photo {name}"} | ({} if weight is None else {"score": weight})
        members |= {f"{name}.jpg": _jpeg(), f"{name}.json": json.dumps(fields).encode()}
    write_tar(root / "wds/0.tar", members)
    return WebdatasetSource(type="webdataset", tars=root / "wds", weight_field="score")


def _columns() -> dict[str, list]:
    weights = {**WEIGHTS, **BAD}
    return {
        "name": [*weights],
        "image": [{"bytes": _jpeg(), "path": None}] * len(weights),
        "text": [f"photo {name}" for name in weights],
        "weight": [weight if weight is None else float(weight) for weight in weights.values()],
    }


def _parquet(root: Path) -> Source:
    pq.write_table(pa.table(_columns()), root / "t.parquet")
    return ParquetSource(
        type="parquet", files=root / "t.parquet", caption_column="text", key_column="name", weight_column="weight"
    )


def _hf(root: Path) -> Source:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(_columns()).cast_column("image", datasets.Image()).save_to_disk(root / "set")
    return HfSource(type="hf", path=str(root / "set"), key_column="name", weight_column="weight")


def _prepare(settings: PrepareSettings) -> PreparedSet:
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, pooled)
    commit(settings.prepared)
    return PreparedSet.open(settings.prepared)


@pytest.mark.parametrize(
    "make", [_folder, _kohya, _latent_tars, _webdataset, _parquet, pytest.param(_hf, marks=pytest.mark.e2e)]
)
def test_every_kind_of_source(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    settings = settings_for(tmp_path / "prepared", sources=(source,))
    prepared = _prepare(settings)
    weights = image_weights([source], LossWeightsConfig(), TagSeparators(), prepared)
    assert weights is not None
    found: dict[str, float] = {}
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        rows = prepared.read("train", bucket, np.arange(count))
        assert rows.ok.all()
        names = [key.rpartition(":")[2].rpartition("/")[2] for key in rows.keys]
        found |= dict(zip(names, weights.of(rows.keys, rows.captions).tolist(), strict=True))
        assert all(json.loads(record)["caption"] for record in rows.captions)
    assert found == {name: 1.0 if weight is None else weight for name, weight in WEIGHTS.items()}
    left_out = [json.loads(line) for line in (settings.prepared / "bad.jsonl").read_text().splitlines()]
    assert sorted(row["key"][-1] for row in left_out) == [*BAD]
    assert all("its loss weight is " in row["reason"] and REASON in row["reason"] for row in left_out)
    again = plan_prepare(settings, show_progress=False).scan
    assert (again.new, again.changed, again.known, again.bad) == (0, 0, len(WEIGHTS), len(BAD))
    off = image_weights([source], LossWeightsConfig(per_image=False), TagSeparators(), prepared)
    assert off is None


@pytest.mark.parametrize("value", ["0.5", True, [1.0], {"a": 1}, float("inf"), "x" * 1000])
def test_what_is_no_weight(value: object) -> None:
    with pytest.raises(ValueError, match=REASON) as raised:
        loss_weight_of(value)
    assert len(str(raised.value)) < 130


def test_a_weight_file_of_a_folder(tmp_path: Path) -> None:
    source = _folder(tmp_path)
    for name, text in {"e": "", "f": "1,5", "g": "0x2", "h": "1" * 1_000_000}.items():
        (tmp_path / f"photos/{name}.weight").write_text(text)
    (tmp_path / "photos/b.weight").write_text("\ufeff.25", encoding="utf-8")
    settings = settings_for(tmp_path / "prepared", sources=(source,))
    counts = plan_prepare(settings, show_progress=False)
    assert (counts.scan.new, counts.scan.bad, counts.scan.ignored.total()) == (4, 4, 0)
    assert counts.empty_captions == 0
    encode_shards(settings.prepared, 0, 1, pooled)
    commit(settings.prepared)
    (tmp_path / "photos/a.weight").write_text("0.75")  # only the weight differs, and the image stays as it was
    assert plan_prepare(settings, show_progress=False).scan.captions == 1


def test_a_folder_of_tags_and_words(tmp_path: Path) -> None:
    write_files(
        tmp_path / "kohya", {"2_sks girl/a.jpg": _jpeg(), "2_sks girl/a.weight": b"2", "2_sks girl/b.jpg": _jpeg()}
    )
    source = FolderSource(
        path=tmp_path / "kohya", kohya_repeats=True, caption_files_hold="tags", weight_extension=".weight"
    )
    prepared = _prepare(settings_for(tmp_path / "prepared", sources=(source,)))
    rows = prepared.read("train", 0, np.arange(4))
    records = dict(zip(rows.keys, map(json.loads, rows.captions), strict=True))
    assert records["kohya/2_sks girl/a"] == {"caption": "", "tags": "sks girl", "loss_weight": 2.0}
    assert records["kohya/2_sks girl/b"] == {"caption": "", "tags": "sks girl"}


def test_weights_of_sources_change_without_preparing_and_own_weights_do_not(tmp_path: Path) -> None:
    _metadata(tmp_path, "loss_weight")
    write_files(tmp_path / "npz", {f"{name}.npz": kohya_npz(0, (64, 64)) for name in (*WEIGHTS, *BAD)})
    plain = KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "npz")
    settings = settings_for(tmp_path / "prepared", sources=(plain,))
    prepared = _prepare(settings)
    (stored,) = json.loads((tmp_path / "prepared/settings.json").read_text())["data.sources"]
    assert {*stored} == {"name", "type", "path", "latents", "images", "repeats"}  # as sets of before weights have it
    for change in ({"loss_weight": 0.5}, {"prior": True}):
        weighted = plain.model_copy(update=change)
        assert is_current(settings_for(tmp_path / "prepared", sources=(weighted,)))
        weights = image_weights([weighted], LossWeightsConfig(prior=0.5), TagSeparators(), prepared)
        assert weights is not None and weights.of(["meta/a", "other/a"], ["{}", "{}"]).tolist() == [0.5, 1.0]
    own = settings_for(tmp_path / "prepared", sources=(plain.model_copy(update={"weight_field": "loss_weight"}),))
    assert not is_current(own)
    counts = plan_prepare(own, show_progress=False)
    assert (counts.scan.new, counts.new_rows) == (0, 0) and counts.scan.captions == 3
    commit(own.prepared)
    assert is_current(own)
