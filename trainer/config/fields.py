"""Walks the schema: which keys exist, which are sections, and what their documentation says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel
from pydantic import Tag as PydanticTag
from pydantic.fields import FieldInfo

from trainer.config.schema import Config

Key = tuple[str | int, ...]
"""The place of a value in the configuration: `("data", "sources", 0, "path")`."""


class Tag(str):
    """A part of a key that stands in no file: which type the entry before it is of."""

    __slots__ = ()


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
    return ".".join(map(str, untagged(key)))


def untagged(key: Key) -> Key:
    """The key as it stands in a file."""
    return tuple(part for part in key if not isinstance(part, Tag))


def is_under(key: Key, ancestor: Key) -> bool:
    """Whether `key` is `ancestor` or lies within it."""
    return key[: len(ancestor)] == ancestor


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a field of this type holds, if it holds one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def entries_of(annotation: object) -> dict[str | None, type[BaseModel]]:
    """The sections that an entry of a field of this type may be; under None where there is but one.

    Empty if the field is no list of sections.
    """
    if get_origin(annotation) is not list:
        return {}
    (entry,) = get_args(annotation)
    if section := section_of(entry):
        return {None: section}
    members = get_args(get_args(entry)[0]) if get_origin(entry) is Annotated else ()
    tagged = [get_args(member) for member in members if get_origin(member) is Annotated]
    return {Tag(tag.tag): section for section, tag in tagged if isinstance(tag, PydanticTag)}


def entry_of(annotation: object, value: object) -> type[BaseModel] | None:
    """The section that `value` is to be read as, if the field is a list of sections: the one that its `type` names, or
    the first."""
    entries = entries_of(annotation)
    named = value.get("type") if isinstance(value, dict) else None
    first = next(iter(entries.values()), None)
    return entries.get(named, first) if isinstance(named, str) else first


def section_at(key: Key) -> type[BaseModel] | None:
    """The section that lies at `key`, or None where there is a value or nothing.

    An entry of a list whose entries may be of several types is told by a `Tag` behind its number.
    """
    section: type[BaseModel] | None = Config
    entries: dict[str | None, type[BaseModel]] = {}
    for part in key:
        if isinstance(part, int):
            section = entries.get(None)
        elif isinstance(part, Tag):
            section, entries = entries.get(part), {}
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section, entries = section_of(annotation), entries_of(annotation)
        else:
            return None
    return section


def field_at(key: Key) -> FieldInfo | None:
    """The declaration of the field at `key`; for an entry of a list, that of the list."""
    while key and isinstance(key[-1], int | Tag):
        key = key[:-1]
    section = section_at(key[:-1]) if key else None
    return section.model_fields.get(str(key[-1])) if section else None


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys of a section, its own before those that others of its kind have as well."""
    shared = {name for base in section.__mro__[1:] if issubclass(base, BaseModel) for name in base.model_fields}
    return sorted(section.model_fields, key=lambda name: name in shared)


def all_keys(section: type[BaseModel] = Config, at: Key = ()) -> Iterator[Key]:
    """Every key of the schema that holds a value; entries of a list of sections stand under index 0."""
    for name in keys_of(section):
        field = section.model_fields[name]
        inner, entries = section_of(field.annotation), entries_of(field.annotation)
        if inner:
            yield from all_keys(inner, (*at, name))
        for tag, entry in entries.items():
            yield from all_keys(entry, (*at, name, 0) if tag is None else (*at, name, 0, Tag(tag)))
        if not inner and not entries:
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
