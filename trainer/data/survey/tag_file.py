"""A user's own weights of tags, from a file."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.config.yaml_source import YamlError, parse
from trainer.data.captions import MOST_LOSS_WEIGHT
from trainer.errors import UserError, printable
from trainer.guards import Refused, read_bytes

MAX_BYTES = 32 << 20
MAX_YAML_BYTES = 4 << 20
"""YAML is parsed a hundred times more slowly than JSON."""
_MOST_OBJECTS = 1 << 20  # in the names of tags, too
_NUMBER = re.compile(r"\d*\.?\d+([eE][+-]?\d+)?")


def read_tag_file(path: Path) -> dict[str, float]:
    """The weight of each tag: `.json` and `.yaml` hold an object of them, `.csv` has lines `tag,weight`.

    The first line of a `.csv` may be a head. Tags are taken as they stand, without the space around them.

    Raises:
        UserError: it cannot be read, names a tag twice, or a weight is not above 0 and at most `MOST_LOSS_WEIGHT`.
    """
    said = f"objective.loss_weights.tag_file ({path})"
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml", ".csv"):
        raise UserError(f"{said}: must be a .json, .yaml or .csv file")
    try:
        text = read_bytes(path, MAX_BYTES if kind in (".json", ".csv") else MAX_YAML_BYTES).decode("utf-8-sig")
    except Refused as error:
        raise UserError(f"{said}: {error.reason_for(path)}") from error
    except OSError as error:
        raise UserError(f"{said}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{said}: is no UTF-8 text (byte {error.start:,})") from error
    try:
        pairs = list(_lines(text)) if kind == ".csv" else _object(text, kind)
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{said}: {_short(error, 200)}") from error
    weights: dict[str, float] = {}
    for tag, weight in pairs:
        tag = tag.strip()
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= MOST_LOSS_WEIGHT:
            rule = f"must be a number above 0 and at most {MOST_LOSS_WEIGHT:g}"
            shown = "an object" if isinstance(weight, list | dict) else repr(_short(weight))
            raise UserError(f"{said}: {_short(tag)!r} = {shown}: {rule}")
        if not tag or tag in weights:
            raise UserError(f"{said}: {f'names {_short(tag)!r} twice' if tag else 'names an empty tag'}")
        weights[tag] = float(weight)
    if all(weight == 1 for weight in weights.values()):
        raise UserError(f"{said}: has no effect; it holds no weight other than 1")
    return weights


def _object(text: str, kind: str) -> list[tuple[str, object]]:
    """The pairs of an object; a name that stands twice is given twice."""
    if kind == ".json":
        if text.count("{") + text.count("[") > _MOST_OBJECTS:
            raise ValueError("must hold one object of tags and weights, no others within it")
        found = json.loads(text, object_pairs_hook=list)
        if not isinstance(found, list) or not all(isinstance(pair, tuple) for pair in found):
            raise ValueError("must hold one object of tags and weights")
        return found
    try:
        document = parse(text)
    except YamlError as error:
        raise ValueError(f"line {error.line}: {error.rule}") from error
    if document.problems:
        line, problem = document.problems[0]
        raise ValueError(f"line {line}: {problem.text}")
    if not isinstance(document.value, dict):
        raise ValueError("must hold lines `tag: weight`")
    return [(str(tag), weight) for tag, weight in document.value.items()]


def _lines(text: str) -> Iterator[tuple[str, object]]:
    for number, fields in enumerate(csv.reader(text.splitlines(), strict=True), start=1):
        if not any(field.strip() for field in fields):
            continue
        if len(fields) != 2:
            raise ValueError(f"line {number}: must hold `tag,weight`; a tag with a comma stands in quotes")
        tag, weight = fields[0], fields[1].strip()
        is_number = _NUMBER.fullmatch(weight) is not None
        if is_number or number > 1:
            yield tag, float(weight) if is_number else weight


def _short(value: object, longest: int = 60) -> str:
    return printable(" ".join(str(value).split()), longest)
