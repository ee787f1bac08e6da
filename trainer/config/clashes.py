"""How a rule between keys says which of them do not go together."""

import os
from pathlib import Path

from pydantic import BaseModel

from trainer.config.fields import Key, Problem
from trainer.config.schema import Config
from trainer.config.wording import shown


def clash(config: Config, names: tuple[str, ...], rule: str) -> Problem:
    """A problem of the keys `names`, which are shown with their values."""
    said = []
    for name in names:
        default = "" if is_written(config, name) else " (the default)"
        said.append(f"{name} = {shown(plain(get(config, name)))}{default}")
    return Problem(tuple(map(as_key, names)), f"{' with '.join(said)}: {rule}")


def as_key(name: str) -> Key:
    """Its parts."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def get(config: Config, name: str) -> object:
    """The value at a dotted key."""
    value: object = config
    for part in as_key(name):
        value = value[part] if isinstance(value, list) and isinstance(part, int) else getattr(value, str(part))
    return value


def is_written(config: Config, name: str) -> bool:
    """Whether the user has written the key."""
    at: object = config
    for part in as_key(name):
        if isinstance(at, BaseModel) and part not in at.model_fields_set:
            return False
        at = at[part] if isinstance(at, list) and isinstance(part, int) else getattr(at, str(part))
    return True


def is_given(config: Config, name: str) -> bool:
    """Whether the user has written the key, with a value other than the default."""
    section, _, field = name.rpartition(".")
    holder = get(config, section)
    if not isinstance(holder, BaseModel) or not is_written(config, name):
        return False
    return getattr(holder, field) != type(holder).model_fields[field].get_default()


def plain(value: object) -> object:
    """As it is shown; of a section what was written."""
    if isinstance(value, BaseModel):
        return {
            name: plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def full(path: Path) -> Path:
    """Absolute, links followed."""
    return Path(os.path.realpath(path))
