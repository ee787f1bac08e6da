"""Looking at sources: entries that come twice, a look that failed, and a look at a part of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.kohya_files import entry, kohya_npz, settings_of, write_files, write_metadata
from trainer.config.sections.data.sources import KohyaJsonSource
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError


def _bad(prepared: Path) -> dict[str, str]:
    lines = (prepared / "bad.jsonl").read_text().splitlines()
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def _latents(tmp_path: Path, count: int) -> Path:
    write_files(tmp_path / "latents", {f"{i}.npz": kohya_npz(i) for i in range(count)})
    return tmp_path / "latents"


def test_an_entry_that_comes_twice_counts_once(tmp_path: Path) -> None:
    latents = _latents(tmp_path, 3)
    lines = [{"image_path": str(i % 3), "caption": f"line {i}"} for i in range(7)]
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepared = tmp_path / "prepared"
    settings = settings_of(prepared, KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.jsonl", latents=latents))
    for new, known in ((3, 0), (0, 3)):
        counts = plan_prepare(settings, show_progress=False).scan
        assert (counts.listed, counts.new, counts.known, counts.bad, counts.removed) == (7, new, known, 4, 0)
        assert _bad(prepared) == {f"meta/{i}": "is listed more than once; its first entry counts" for i in range(3)}
        encode_shards(prepared, 0, 1, None)
        commit(prepared)
    captions = PreparedSet.open(prepared).read("train", 0, [0, 1, 2]).captions  # type: ignore[arg-type]
    assert [json.loads(caption)["caption"] for caption in captions] == ["line 0", "line 1", "line 2"]


def test_a_look_that_failed_binds_nobody(tmp_path: Path) -> None:
    latents = _latents(tmp_path, 10)
    write_metadata(tmp_path / "meta.json", {str(i): entry(i) for i in range(10)})
    (tmp_path / "cut.json").write_text((tmp_path / "meta.json").read_text()[:600])
    prepared = tmp_path / "prepared"
    with pytest.raises(UserError, match="is not valid JSON"):
        plan_prepare(
            settings_of(prepared, KohyaJsonSource(type="kohya_json", path=tmp_path / "cut.json", latents=latents)),
            show_progress=False,
        )
    settings = settings_of(prepared, KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=latents))
    assert not is_current(settings)
    assert plan_prepare(settings, show_progress=False).new_rows == 10
    with pytest.raises(UserError, match="was prepared with"):
        plan_prepare(replace(settings, vae="xxh3:ffff fp32"), show_progress=False)


def test_a_look_at_a_part_forgets_nothing_of_the_rest(tmp_path: Path) -> None:
    latents = _latents(tmp_path, 6)
    (latents / "5.npz").write_bytes(b"")
    write_metadata(tmp_path / "meta.json", {str(i): entry(i) for i in range(8)})
    prepared = tmp_path / "prepared"
    settings = settings_of(prepared, KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=latents))
    plan_prepare(settings, show_progress=False)
    bad = _bad(prepared)
    assert list(bad) == ["meta/5", "meta/6", "meta/7"]
    assert plan_prepare(settings, show_progress=False, limit=2).scan.listed == 2
    assert _bad(prepared) == bad
