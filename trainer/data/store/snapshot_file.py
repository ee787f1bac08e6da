"""The snapshot file: which shards a prepared data set consists of, as JSON; `CURRENT` names the newest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.buckets import Bucket
from trainer.data.store.shards import SECTIONS, ShardInfo
from trainer.errors import UserError

SNAPSHOT_FORMAT = "sdxl-train snapshot 1"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the snapshot lists it; `name` is relative to the prepared folder."""

    name: str
    split: str
    bucket: Bucket
    info: ShardInfo


@dataclass(frozen=True)
class Snapshot:
    """What one snapshot file holds."""

    number: int
    generations: tuple[int, ...]
    settings: dict[str, Any]
    shards: tuple[ShardEntry, ...]


def snapshot_name(number: int) -> str:
    """File name of a snapshot; later ones sort later."""
    return f"{number:06d}.json"


def current_snapshot(prepared: Path) -> str | None:
    """The name that CURRENT holds, such as `000001.json`; None where nothing has been committed."""
    try:
        return (prepared / "CURRENT").read_text().strip()
    except FileNotFoundError:
        return None


def snapshot_to_json(snapshot: Snapshot) -> str:
    """One list per column, so that thousands of shards stay small and quick to read."""
    shards, infos = snapshot.shards, [shard.info for shard in snapshot.shards]
    present = [name for name in SECTIONS if any(info.offsets[name] >= 0 for info in infos)]
    document = {
        "format": SNAPSHOT_FORMAT,
        "number": snapshot.number,
        "generations": snapshot.generations,
        "settings": snapshot.settings,
        "shards": {
            "name": [shard.name for shard in shards],
            "split": [shard.split for shard in shards],
            "bucket_hw": [[shard.bucket.height_px, shard.bucket.width_px] for shard in shards],
            "rows": [info.rows for info in infos],
            "virtual_rows": [info.virtual_rows for info in infos],
            "uniform_repeats": [info.uniform_repeats for info in infos],
            "file_bytes": [info.file_bytes for info in infos],
            "header_crc32c": [info.header_crc32c for info in infos],
            "text_shape": next((info.text_shape for info in infos if info.text_shape), None),
            "offsets": {name: [info.offsets[name] for info in infos] for name in present},
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n"


def read_snapshot(prepared: Path, name: str) -> Snapshot:
    """UserError where the file is missing or is no snapshot that this version reads."""
    path = prepared / "snapshots" / name
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such snapshot of the prepared data set") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a snapshot ({error})") from error
    if document.get("format") != SNAPSHOT_FORMAT:
        raise UserError(f"{path}: is of format '{document.get('format')}', this version reads '{SNAPSHOT_FORMAT}'")
    columns = document["shards"]
    offsets, text_shape = columns["offsets"], columns["text_shape"]
    entries = tuple(
        ShardEntry(
            name=shard_name,
            split=columns["split"][i],
            bucket=Bucket(*columns["bucket_hw"][i]),
            info=ShardInfo(
                rows=columns["rows"][i],
                virtual_rows=columns["virtual_rows"][i],
                uniform_repeats=columns["uniform_repeats"][i],
                file_bytes=columns["file_bytes"][i],
                header_crc32c=columns["header_crc32c"][i],
                offsets={name: offsets[name][i] if name in offsets else -1 for name in SECTIONS},
                text_shape=tuple(text_shape) if text_shape else None,
                excluded=(),
            ),
        )
        for i, shard_name in enumerate(columns["name"])
    )
    return Snapshot(document["number"], tuple(document["generations"]), document["settings"], entries)
