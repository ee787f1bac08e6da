"""A prepared set of real photographs with what a page has to cope with: hostile texts, twins, bad images."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.data.photographs import pooled, settings_for, write_crops
from trainer.config.sections.data.sources import FolderSource
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "\"quotes\" 'quotes' &amp; <b>bold</b> {{script}} {{policy}}",
    "right \u202eto left\u202c \u2066isolated\u2069 \u200f",
    "control \x00\x07\x1b[31m \u2028 line",
    "]]> --> <!-- <style>*{display:none}</style> javascript:alert(3)",
    "emoji 👩‍🚀 ☕ and العربية",
)


@dataclass(frozen=True)
class BrowsedSet:
    """The prepared folder, the configuration that names it, and the folder of its sources."""

    prepared: Path
    config: Path
    root: Path


def write_browsed_set(root: Path, **source_options: object) -> BrowsedSet:
    """Thirty images with captions, of which some are hostile, and ten with tags; one image is there twice."""
    photos, tagged, prepared = root / "photos", root / "tagged", root / "prepared"
    write_crops(photos, 30)
    write_crops(tagged, 10, seed=1)
    for number, text in enumerate(HOSTILE):
        (photos / f"crop-0-{number:03d}.txt").write_text(text, encoding="utf-8")
    for number in range(10):
        tags = ["photograph", *(f"tag {k}" for k in range(number)), '<u onclick="alert(4)">']
        (tagged / f"crop-1-{number:03d}.txt").write_text(", ".join(tags), encoding="utf-8")
    shutil.copy(photos / "crop-0-007.jpg", tagged / "twin.jpg")
    shutil.move(photos / "crop-0-008.jpg", photos / "<b>&'bold'.jpg")
    (photos / "page.jpg").write_bytes(b"<html>not found</html>")
    sources = [
        {"path": photos, **source_options},
        {"path": tagged, "caption_files_hold": "tags", "repeats": 2},
    ]
    settings = settings_for(prepared, sources=tuple(FolderSource(**source) for source in sources))  # type: ignore[arg-type]
    plan_prepare(settings, show_progress=False)
    encode_shards(prepared, 0, 1, pooled)
    commit(prepared)
    left_out = {"path": "/x/<i>y</i>.jpg", "key": "photos/<i>y</i>", "reason": "</table><script>alert(5)</script> 12"}
    (prepared / "left-out.jsonl").write_text(json.dumps(left_out) + "\n" + "no JSON\n", encoding="utf-8")
    config = {
        "run": {"dir": str(root / "run"), "seed": 7},
        "model": {"path": str(root / "no-model")},
        "data": {
            "sources": [{**source, "path": str(source["path"])} for source in sources],
            "prepared": str(prepared),
            "buckets": {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64},
        },
        "captions": {"use": "both", "shuffle_tags": True, "tag_dropout_rate": 0.2, "dropout_rate": 0.2},
        "train": {"steps": 1},
        "optimizer": {"lr": 1e-6},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return BrowsedSet(prepared, root / "config.yaml", root)
