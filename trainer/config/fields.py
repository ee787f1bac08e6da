"""Walks the schema: which keys exist, which are sections, and what their documentation says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.schema import Config

Key = tuple[str | int, ...]
"""The place of a value in the configuration: `("data", "sources", 0, "path")`."""


@dataclass(frozen=True)
class Problem:
    """One mistake, said in one line.

    Args:
        keys: the keys it is about; the first one that the user wrote gives the place.
        text: the line without the place.
        explains: keys of which nothing more need be said, such as the one that was misspelt.
    """

    keys: tuple[Key, ...]
    text: str
    explains: tuple[Key, ...] = ()


def dotted(key: Key) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(map(str, key))


def is_under(key: Key, ancestor: Key) -> bool:
    """Whether `key` is `ancestor` or lies within it."""
    return key[: len(ancestor)] == ancestor


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a field of this type holds, if it holds one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def entry_of(annotation: object) -> type[BaseModel] | None:
    """The section that each entry of a field of this type is, if the field is a list of sections."""
    return section_of(get_args(annotation)[0]) if get_origin(annotation) is list else None


def section_at(key: Key) -> type[BaseModel] | None:
    """The section that lies at `key`, or None where there is a value or nothing."""
    section: type[BaseModel] | None = Config
    entries: type[BaseModel] | None = None
    for part in key:
        if isinstance(part, int):
            section, entries = entries, None
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section, entries = section_of(annotation), entry_of(annotation)
        else:
            return None
    return section


def field_at(key: Key) -> FieldInfo | None:
    """The declaration of the field at `key`; for an entry of a list, that of the list."""
    while key and isinstance(key[-1], int):
        key = key[:-1]
    section = section_at(key[:-1]) if key else None
    return section.model_fields.get(str(key[-1])) if section else None


def all_keys(section: type[BaseModel] = Config, at: Key = ()) -> Iterator[Key]:
    """Every key of the schema that holds a value; entries of a list of sections stand under index 0."""
    for name, field in section.model_fields.items():
        inner, entries = section_of(field.annotation), entry_of(field.annotation)
        if inner:
            yield from all_keys(inner, (*at, name))
        elif entries:
            yield from all_keys(entries, (*at, name, 0))
        else:
            yield (*at, name)


def meaning(key: Key) -> str:
    """What the field at `key` is for: the first sentence of its documentation, to stand in brackets."""
    field = field_at(key)
    text = " ".join((field.description or "").split()) if field else ""
    sentence = text.split(". ")[0].removesuffix(".")
    first, _, rest = sentence.partition(" ")
    if len(first) == 1 or first[1:].islower():
        first = first.lower()
    return f"{first} {rest}".strip()
