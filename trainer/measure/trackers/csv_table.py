"""`metrics.csv`: the run's records as a table for spreadsheets, a row for each."""

import csv
from collections.abc import Sequence
from typing import IO, Any

from trainer.measure.trackers.tracked_run import Mark, Record, TrackedRun, Tracker

CSV_FILE = "metrics.csv"
_FIRST = ("kind", "step", "time")


class CsvTable:
    """The table; written anew when a column is new, which is seldom."""

    id = ""

    def __init__(self, run: TrackedRun) -> None:
        self._path = run.run_dir / CSV_FILE
        self._columns: list[str] = [*_FIRST]
        self._write_anew([])

    def add(self, records: Sequence[Record]) -> None:
        """Append rows."""
        new = list(dict.fromkeys(key for record in records for key in record if key not in self._columns))
        if new:
            before = self._read()
            self._columns += new
            self._write_anew([*before, *records])
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            self._writer(file).writerows(records)

    def close(self) -> None:
        """All is written already."""

    def _read(self) -> list[dict[str, Any]]:
        with self._path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _writer(self, file: IO[str]) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="")

    def _write_anew(self, rows: Sequence[Record]) -> None:
        partial = self._path.with_name(f"{CSV_FILE}.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self._path)


def open_csv(run: TrackedRun, mark: Mark) -> tuple[Tracker, Mark]:
    """An empty table, which wants all records: the file may have been changed, or cut off, by anybody."""
    return CsvTable(run), Mark()
