"""The catalogue: grouping into shards, generations, and a plan that interruptions do not change."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.buckets import Bucket, Placement
from trainer.data.catalog import catalog, planned_shards
from trainer.data.catalog.catalog import BadRow, CatalogRow, FileStamp
from trainer.errors import UserError

BUCKETS = [Bucket(64, 128), Bucket(128, 64), Bucket(96, 96)]


def _row(key: str, bucket: Bucket, split: str = "train") -> CatalogRow:
    return CatalogRow(
        key=key,
        path=f"/images/{key}.jpg",
        offset=0,
        length=-1,
        payload="encode",
        stamp=FileStamp(10, 20, 30),
        caption='{"caption":"☕"}',
        repeats=2,
        split=split,
        original_hw=(300, 400),
        placement=Placement(bucket, (150, 200), (1, 2)),
    )


def test_rows_are_grouped_by_split_bucket_and_key(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        _row(f"p/{i:03d}", BUCKETS[rng.integers(3)], "validation" if rng.random() < 0.2 else "train")
        for i in rng.permutation(200)
    ]
    with catalog.open_catalog(tmp_path) as connection:
        with catalog.transaction(connection):
            catalog.add_rows(connection, 1, rows[:120])
        assert catalog.has_open_rows(connection)
        with catalog.transaction(connection):
            catalog.add_rows(connection, 1, rows[120:])
        assert catalog.count_new(connection) == (200, 0)
        planned_shards.plan_generation(connection, rows_per_shard=16)
        assert not catalog.has_open_rows(connection) and planned_shards.pending_generations(connection) == [1]
        shards = planned_shards.pending_shards(connection)
        found = []
        for shard in shards:
            members = planned_shards.rows_of_shard(connection, shard)
            assert len(members) == shard.rows <= 16
            assert {(row.split, row.placement.bucket) for row in members} == {(shard.split, shard.bucket)}
            assert [row.key for row in members] == sorted(row.key for row in members)
            found += members
        assert sorted(found, key=lambda row: row.key) == sorted(rows, key=lambda row: row.key)
        # At most one shard of a group is not full, its last.
        for split in ("train", "validation"):
            for bucket in BUCKETS:
                sizes = [s.rows for s in shards if (s.split, s.bucket) == (split, bucket)]
                assert all(size == 16 for size in sizes[:-1])
        assert shards[0].name == "shards/000001/train-128x64-000000.safetensors"


def test_a_later_generation_leaves_the_first_alone(tmp_path: Path) -> None:
    with catalog.open_catalog(tmp_path) as connection:
        catalog.add_rows(
            connection, catalog.open_generation(connection), [_row("b", BUCKETS[0]), _row("d", BUCKETS[0])]
        )
        planned_shards.plan_generation(connection, 10)
        (first,) = planned_shards.pending_shards(connection)
        assert planned_shards.plan_generation(connection, 10) == 0  # nothing new: no generation
        assert catalog.open_generation(connection) == 2
        catalog.add_rows(connection, 2, [_row("c", BUCKETS[0])])
        planned_shards.plan_generation(connection, 10)
        assert planned_shards.pending_generations(connection) == [1, 2]
        assert planned_shards.pending_shards(connection)[0] == first
        assert [row.key for row in planned_shards.rows_of_shard(connection, first)] == ["b", "d"]
        excluded = [BadRow("/images/d.jpg", "d", 10, 20, "is cut off")]
        with catalog.transaction(connection):
            planned_shards.leave_excluded_out(connection, excluded)
            planned_shards.mark_committed(connection, [1])
        assert planned_shards.pending_generations(connection) == [2]
        assert list(catalog.bad_rows(connection)) == excluded
        assert sum(catalog.count_rows(connection).values()) == 2
    with catalog.open_catalog(tmp_path, read_only=True) as connection:
        assert len(planned_shards.pending_shards(connection)) == 1


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    with catalog.open_catalog(tmp_path) as connection:
        with pytest.raises(KeyError), catalog.transaction(connection):
            catalog.add_rows(connection, 1, [_row("a", BUCKETS[0])])
            raise KeyError
        assert not catalog.count_rows(connection)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with catalog.open_catalog(tmp_path) as connection, catalog.transaction(connection):
        catalog.add_rows(connection, 1, [_row("a", BUCKETS[0])])
    with pytest.raises(UserError, match=r"full; .*Make room"), catalog.open_catalog(tmp_path) as connection:
        connection.execute("PRAGMA max_page_count = 40")  # SQLite then fails as on a full disk
        with catalog.transaction(connection):
            catalog.add_rows(connection, 1, [_row(f"p/{i:05d}", BUCKETS[0]) for i in range(5000)])
    with catalog.open_catalog(tmp_path) as connection:
        assert sum(catalog.count_rows(connection).values()) == 1


def test_a_catalogue_that_another_command_writes_is_one_line(tmp_path: Path) -> None:
    with (
        catalog.open_catalog(tmp_path) as other,
        catalog.transaction(other),
        pytest.raises(UserError, match=r"catalog\.sqlite: another command"),
        catalog.open_catalog(tmp_path) as connection,
    ):
        connection.execute("PRAGMA busy_timeout = 1")  # in place of a minute
        catalog.add_rows(connection, 1, [_row("a", BUCKETS[0])])


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_text("this is no database, but long enough to be looked at\n" * 100)
    with pytest.raises(UserError, match=r"catalog\.sqlite: cannot be read"), catalog.open_catalog(tmp_path):
        pass
    with pytest.raises(UserError), catalog.open_catalog(tmp_path / "nowhere", read_only=True):
        pass


@pytest.mark.parametrize("altered", ["DROP TABLE rows", "ALTER TABLE rows RENAME COLUMN key TO kex", "a page"])
def test_an_altered_catalogue_is_one_line(tmp_path: Path, altered: str) -> None:
    with catalog.open_catalog(tmp_path) as connection:
        with catalog.transaction(connection):
            catalog.add_rows(connection, 1, [_row(f"p/{i:03d}", BUCKETS[0]) for i in range(300)])
        if altered != "a page":
            connection.execute(altered)
    if altered == "a page":
        path = tmp_path / "catalog.sqlite"
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with (
        pytest.raises(UserError, match=r"catalog\.sqlite: cannot be read"),
        catalog.open_catalog(tmp_path) as connection,
    ):
        catalog.count_new(connection)
        planned_shards.plan_generation(connection, rows_per_shard=16)
        planned_shards.pending_shards(connection)
