"""Which rows a validation scores: held-out ones, and as many that are trained on, to see how far the two part."""

from collections.abc import Sequence

from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.stretches import stretches_per_bucket
from trainer.keyed import draw_seed

Row = tuple[int, int]
"""The number of a bucket, and of a virtual row in it."""
_CANDIDATES = 4  # for each row that is wanted: records are read of so many, and not of millions


def held_out_rows(prepared: PreparedSet, most: int) -> list[Row]:
    """At most so many held-out rows, spread evenly over all."""
    return pick_rows(prepared.rows_per_bucket("validation"), most)


def rows_elsewhere(prepared: PreparedSet, rows: Sequence[Row]) -> dict[int, list[Row]]:
    """By further resolution the rows at which it holds the images of these held-out rows; {} where there is none."""
    if not prepared.has_other_resolutions:
        return {}
    stretches = stretches_per_bucket(prepared, "validation")
    found: dict[int, list[Row]] = {}
    for bucket, row in rows:
        for stretch in stretches[bucket]:
            if stretch.first <= row < stretch.first + stretch.rows:
                for resolution, (there, first) in stretch.elsewhere.items():
                    found.setdefault(resolution, []).append((there, first + row - stretch.first))
    return {resolution: sorted(found[resolution]) for resolution in sorted(found, reverse=True)}


def training_rows(prepared: PreparedSet, count: int) -> list[Row]:
    """Rows of so many different images that are trained on, if there are; always the same ones of a snapshot.

    Of four times as many rows, spread evenly over all, those of the least hashes of the keys.
    """
    found: dict[str, Row] = {}
    for bucket, row in pick_rows(prepared.rows_per_bucket("train"), _CANDIDATES * count):
        record = prepared.read_record("train", bucket, row)
        if record is not None:
            found.setdefault(record.key, (bucket, row))
    chosen = sorted(found, key=lambda key: draw_seed("validation of training images", key))[:count]
    return sorted(found[key] for key in chosen)


def in_batches(rows: Sequence[Row], batch_size: int) -> list[tuple[int, list[int]]]:
    """Batches of one bucket each; the same however many workers there are."""
    batches: list[tuple[int, list[int]]] = []
    for bucket, row in rows:
        if not batches or batches[-1][0] != bucket or len(batches[-1][1]) == batch_size:
            batches.append((bucket, []))
        batches[-1][1].append(row)
    return batches
