"""Folders that lie elsewhere now than when shards were written that refer to files in them.

`moved.json` of a prepared folder: where that folder was, and in their order the moves of sources. Shards never change,
and neither do the paths in them; a reader takes each path through the moves.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.guards import Refused, read_json

Move = tuple[str, str]
"""The place before and the place now of a folder, or of a file."""

_FILE = "moved.json"
_ENDS = ("", "/", ":")  # what may follow the place of a folder, of a file, and of a table with one of its columns


def moved(path: str, moves: Iterable[Move]) -> str:
    """Where the file lies now."""
    for before, now in moves:
        if path.startswith(before) and path[len(before) : len(before) + 1] in _ENDS:
            path = now + path[len(before) :]
    return path


def read_moves(prepared: Path) -> tuple[Move, ...]:
    """All that have happened since the set was begun, that of the prepared folder itself the last.

    Raises UserError where the file cannot be read.
    """
    record = _read(prepared)
    if record is None:
        return ()
    here, was = os.path.realpath(prepared), record["prepared"]
    return (*_pairs(record), *(() if here == was else ((was, here),)))


def note_moves(prepared: Path, moves: Sequence[Move]) -> str | None:
    """The text of `moved.json` with these added; None if it is as it should be already."""
    record = _read(prepared)
    known = () if record is None else read_moves(prepared)
    is_noted = known[len(known) - len(moves) :] == tuple(moves)
    new = {"prepared": os.path.realpath(prepared), "moves": [*known, *(() if is_noted else moves)]}
    text = json.dumps(new, ensure_ascii=False) + "\n"
    return None if record is not None and json.dumps(record, ensure_ascii=False) + "\n" == text else text


def moves_file(prepared: Path) -> Path:
    """Where they are kept."""
    return prepared / _FILE


def _pairs(record: dict[str, Any]) -> tuple[Move, ...]:
    return tuple((before, now) for before, now in record["moves"])


def _read(prepared: Path) -> dict[str, Any] | None:
    path = moves_file(prepared)
    try:
        record = read_json(path)
        if not isinstance(record["prepared"], str):
            raise TypeError("prepared is no path")
        if not all(isinstance(place, str) for move in _pairs(record) for place in move):
            raise TypeError("a move is not two paths")
    except FileNotFoundError:
        return None
    except (Refused, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: was altered or is damaged ({str(error).removeprefix(f'{path}: ')})") from error
    return record
