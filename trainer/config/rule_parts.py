"""What rules between fields are made of: which values were given, and a problem that shows them."""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from trainer.config.fields import Key, Problem
from trainer.config.schema import Config
from trainer.config.wording import shown


def clash(config: Config, names: Sequence[str], rule: str) -> Problem:
    """A problem of the keys `names`, which are shown with their values."""
    said = []
    for name in names:
        default = "" if _is_written(config, name) else " (the default)"
        said.append(f"{name} = {shown(_plain(value_at(config, name)))}{default}")
    return Problem(tuple(map(key_of, names)), f"{' with '.join(said)}: {rule}")


def key_of(name: str) -> Key:
    """`data.sources.0` as `("data", "sources", 0)`."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def value_at(config: Config, name: str) -> object:
    """What the configuration holds at a key such as `data.sources.0.path`."""
    value: object = config
    for part in key_of(name):
        value = value[part] if isinstance(value, list) and isinstance(part, int) else getattr(value, str(part))
    return value


def _is_written(config: Config, name: str) -> bool:
    at: object = config
    for part in key_of(name):
        if isinstance(at, BaseModel) and part not in at.model_fields_set:
            return False
        at = at[part] if isinstance(at, list) and isinstance(part, int) else getattr(at, str(part))
    return True


def is_given(config: Config, name: str) -> bool:
    """Whether the user wrote the key, with a value other than the default."""
    section, _, field = name.rpartition(".")
    holder = value_at(config, section)
    if not isinstance(holder, BaseModel) or not _is_written(config, name):
        return False
    return getattr(holder, field) != type(holder).model_fields[field].get_default()


def _plain(value: object) -> object:
    """As it stands in a file; of a section what was written."""
    if isinstance(value, BaseModel):
        return {
            name: _plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def full_path(path: Path) -> Path:
    """Without links, whether it is there or not."""
    return Path(os.path.realpath(path))
