"""kohya's `alpha_mask` beside its latents: in place, mirrored, in tars, repacked; and damaged ones."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.kohya_files import entry, latents_of, npz_bytes, settings_of, write_files, write_metadata, write_tar
from trainer.config.sections.data.sources import KohyaJsonSource, LatentTarsSource, Source
from trainer.data.augment import View
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare, plan_repack
from trainer.data.store.snapshot import PreparedSet

BUCKET = (64, 128)
WRONG = {"shape": np.ones((64, 64), dtype=np.float32), "range": np.full(BUCKET, 2.0, dtype=np.float32)}


def alpha_of(number: int) -> np.ndarray:
    """f32 [64, 128]: a box and a slope."""
    values = np.zeros(BUCKET, dtype=np.float32)
    values[8 : 20 + number, 5 : 40 + 7 * number] = 1
    values[:, 100:] = np.linspace(0, 1, 64, dtype=np.float32)[:, None]
    return values


def expected_of(number: int) -> np.ndarray:
    """u8 [8, 16]: means of 8 x 8 pixels."""
    return np.rint(255 * alpha_of(number).astype(np.float64).reshape(8, 8, 16, 8).mean(axis=(1, 3)))


def kohya_files() -> dict[str, bytes]:
    """Image 4 has no mask."""
    files = {}
    for i in range(5):
        alpha = {} if i == 4 else {"alpha_mask": alpha_of(i)}
        latents = latents_of(i, BUCKET)
        files[f"{i}.npz"] = npz_bytes(latents=latents, latents_flipped=latents[:, :, ::-1], **alpha)
    return files


@pytest.fixture(params=["files", "tars"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    write_metadata(tmp_path / "meta.json", {str(i): entry(i, BUCKET) for i in range(5)})
    if request.param == "files":
        write_files(tmp_path / "latents", kohya_files())
        latents = tmp_path / "latents"
        return KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=latents, masks="alpha")
    write_tar(tmp_path / "tars/0.tar", kohya_files())
    return LatentTarsSource(type="latent_tars", metadata=tmp_path / "meta.json", tars=tmp_path / "tars", masks="alpha")


def _prepare(settings: PrepareSettings) -> Committed:
    counts = plan_prepare(settings, show_progress=False)
    assert counts.masks is None  # not known before they are read
    encode_shards(settings.prepared, 0, 1, encode=None)
    return commit(settings.prepared)


def test_masks_of_latents(tmp_path: Path, source: Source) -> None:
    settings = settings_of(tmp_path / "prepared", source)
    assert _prepare(settings).masks is None
    for repacked in (False, True):
        if repacked:
            plan_repack(settings.prepared)
            encode_shards(settings.prepared, 0, 1, encode=None)
            done = commit(settings.prepared)
            assert done.masks is not None and done.masks[:2] == (5, 4)
            shares = [expected_of(i).mean() / 255 for i in range(4)]
            assert done.masks.trained == pytest.approx((sum(shares) + 1) / 5, abs=1e-3)
        prepared = PreparedSet.open(settings.prepared)
        for flipped in (False, True):
            rows = prepared.read(
                "train", 0, np.arange(5), choose_view=lambda k, r, p, f=flipped: View(p, f), with_masks=True
            )
            assert rows.ok.all() and rows.masks is not None and rows.latents is not None
            mirrored = flipped and not repacked
            for key, latents, mask in zip(rows.keys, rows.latents, rows.masks, strict=True):
                number = int(key.rpartition("/")[2])
                expected = np.full((8, 16), 255) if number == 4 else expected_of(number)
                stored = latents_of(number, BUCKET).astype(np.float16)
                assert np.abs(mask - (expected[:, ::-1] if mirrored else expected)).max() <= 1
                assert np.array_equal(latents, stored[:, :, ::-1] if mirrored else stored)


def test_masks_named_with_the_size_of_the_latents(tmp_path: Path) -> None:
    write_metadata(tmp_path / "meta.json", {"a": entry(1, BUCKET)})
    content = npz_bytes(latents_8x16=latents_of(1, BUCKET), alpha_mask_8x16=alpha_of(1), alpha_mask_4x4=alpha_of(2))
    write_files(tmp_path / "latents", {"a.npz": content})
    source = KohyaJsonSource(
        type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "latents", masks="alpha"
    )
    _prepare(settings_of(tmp_path / "prepared", source))
    rows = PreparedSet.open(tmp_path / "prepared").read("train", 0, np.arange(1), with_masks=True)
    assert rows.masks is not None and np.abs(rows.masks[0] - expected_of(1)).max() <= 1


def test_a_mask_that_does_not_fit_costs_its_row(tmp_path: Path) -> None:
    write_metadata(tmp_path / "meta.json", {name: entry(i, BUCKET) for i, name in enumerate(WRONG)})
    contents = {f"{n}.npz": npz_bytes(latents=latents_of(0, BUCKET), alpha_mask=v) for n, v in WRONG.items()}
    write_files(tmp_path / "latents", contents)
    source = KohyaJsonSource(
        type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "latents", masks="alpha"
    )
    _prepare(settings_of(tmp_path / "prepared", source))
    prepared = PreparedSet.open(tmp_path / "prepared")
    rows = prepared.read("train", 0, np.arange(2), with_masks=True)
    assert not rows.ok.any() and rows.masks is not None and not rows.masks.any()
    reasons = {Path(problem.file).stem: problem.reason for problem in rows.problems}
    assert reasons["shape"] == "alpha_mask of shape [64, 64], but its latents are 8 x 16"
    assert reasons["range"] == "alpha_mask with values beyond 0..1"
    # A run that uses no masks does not look at them.
    assert prepared.read("train", 0, np.arange(2)).ok.all()
