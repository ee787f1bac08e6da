"""Reads a configuration file and its overrides into a `Config`; every mistake is shown at once.

Relative paths are relative to the current directory, not to the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trainer.config.fields import Key, Problem, dotted, entries_of, entry_of, is_under, keys_of, section_of
from trainer.config.rules import bad_paths, broken_rules
from trainer.config.schema import Config
from trainer.config.spelling import nearest_path
from trainer.config.values import SecretText
from trainer.config.wording import problems_of, short, shown
from trainer.config.yaml_source import YamlError, dump, parse
from trainer.errors import UserError
from trainer.guards import Refused, open_regular

MAX_BYTES = 512 * 1024


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written. The order is that of the report: the file's lines, then the overrides."""

    source: int  # 0 is the file, n the n-th override
    line: int
    words: str


@dataclass
class Written:
    """What the user wrote, before it is checked.

    Args:
        tree: the file's values with the overrides in place.
        root: stands for what was written nowhere.
        places: where each key was written.
        problems: what is wrong so far, with the place.
    """

    tree: dict[str, object]
    root: Place
    places: dict[Key, Place]
    problems: list[tuple[Place, Problem]] = field(default_factory=list)


def load_config(path: Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Config:
    """The configuration in the file `path`, with `section.key=value` overrides applied in order.

    Args:
        path: a YAML file.
        overrides: the value is read as YAML (`samples.prompts=[a cat, a dog]`); the last one of a key
            counts; entries of a list are named by their number (`data.sources.0.path=photos`).
        check_paths: whether the model and the sources must exist.

    Raises:
        UserError: one line for each mistake.
    """
    written = _read(path)
    for number, text in enumerate(overrides, start=1):
        told = text.partition("=")[0] if "://" in text and text.startswith("notify") else short(text)
        _override(written, text, Place(number, 0, f"override '{told}'"))
    tree = _without_empty_sections(Config, written.tree)
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        written.problems += [(_place(written, problem), problem) for problem in problems_of(error)]
    settled = [key for _, problem in written.problems for key in (*problem.keys, *problem.explains) if key]
    checkable = config or Config.model_validate(_with_standins(Config, tree, settled))
    found = broken_rules(checkable) + (bad_paths(checkable) if check_paths else [])
    written.problems += [(_place(written, p), p) for p in found if not _touches(p, settled)]
    if config is None or written.problems:
        written.problems.sort(key=lambda pair: pair[0])
        raise UserError(*(f"{place.words}: {problem.text}" for place, problem in written.problems))
    return config


def to_yaml(config: Config) -> str:
    """The configuration with every key written out and paths made absolute; `load_config` reads it back."""
    return "# Every setting of this run; paths are absolute.\n" + dump(_plain(config))


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in keys_of(type(value))}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, SecretText):
        return value.stand_in
    return str(value.absolute()) if isinstance(value, Path) else value


def _read(path: Path) -> Written:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except Refused as refused:
        raise UserError(f"{refused.lines[0]}; give a YAML file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except (OSError, ValueError) as error:
        # Of a NUL in a path, each version of Python has words of its own.
        reason = error.strerror or str(error) if isinstance(error, OSError) else "no path holds a NUL"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES // 1024} KiB; this is no configuration")
    try:
        document = parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        told = f"not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        raise UserError(f"{path}:{line}: {told}") from None
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error.rule}") from None
    if document.value is None:
        raise UserError(f"{path}: empty; it must hold at least run, model, data, train and optimizer")
    if not isinstance(document.value, dict):
        line = document.lines[()]
        raise UserError(f"{path}:{line}: must hold sections, such as `run:`, not {shown(document.value)}")
    del document.lines[()]
    places = {key: Place(0, line, f"{path}:{line}") for key, line in document.lines.items()}
    problems = [(Place(0, line, f"{path}:{line}"), problem) for line, problem in document.problems]
    return Written(document.value, Place(0, 1 << 62, str(path)), places, problems)


def _override(written: Written, text: str, place: Place) -> None:
    """Puts `section.key=value` into the tree, or notes why it cannot be."""

    def refuse(rule: str) -> None:
        written.problems.append((place, Problem((tuple(names),), rule)))

    name, equals, value_text = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names):
        return refuse("write it as section.key=value")
    try:
        document = parse(value_text, tuple(names))
    except YamlError as error:
        return refuse(error.rule)
    at: Any = written.tree
    key: Key = ()
    for part in names[:-1]:
        step = _step(at, part)
        if step is None:
            return refuse(_no_entry(key, at))
        key = (*key, step)
        at = _descend(written, at, step, key, place)
    step = _step(at, names[-1])
    if step is None:
        return refuse(_no_entry(key, at))
    key = (*key, step)
    at[step] = document.value
    for old in [k for k in written.places if is_under(k, key)]:
        del written.places[old]
    written.places[key] = place
    written.problems += [(place, problem) for _, problem in document.problems]
    return None


def _step(at: object, part: str) -> str | int | None:
    """`part` as a key of the dict or a position in the list `at`; None if the list has no such entry."""
    if not isinstance(at, list):
        return part
    return int(part) if part.isdecimal() and int(part) < len(at) else None


def _no_entry(key: Key, at: object) -> str:
    entries = len(at) if isinstance(at, list) else 0
    last = f"its last is `{dotted(key)}.{entries - 1}`" if entries else "it is empty"
    return f"`{dotted(key)}` has no such entry ({last}); give the whole list to change their number"


def _descend(written: Written, at: Any, step: str | int, key: Key, place: Place) -> Any:
    """The section or list under `step`; a value that stands there gives way to an empty section."""
    inner = at.get(step) if isinstance(at, dict) else at[step]
    if not isinstance(inner, dict | list):
        inner = at[step] = {}
        written.places[key] = place
    return inner


def _place(written: Written, problem: Problem) -> Place:
    """The place of the first key that was written; else of the section around the first key; else the file."""
    for key in problem.keys:
        if key in written.places:
            return written.places[key]
    for key in problem.keys:
        for length in range(len(key) - 1, 0, -1):
            if key[:length] in written.places:
                return written.places[key[:length]]
    return written.root


def _touches(problem: Problem, settled: list[Key]) -> bool:
    return any(is_under(key, other) or is_under(other, key) for key in problem.keys for other in settled)


def _without_empty_sections(section: type[BaseModel], tree: dict[str, object]) -> dict[str, object]:
    """`train:` with nothing below it is an empty section, not a null."""
    filled = dict(tree)
    for name, declared in section.model_fields.items():
        inner = section_of(declared.annotation)
        if inner and name in filled and filled[name] is None:
            filled[name] = {}
        elif inner and isinstance(value := filled.get(name), dict):
            filled[name] = _without_empty_sections(inner, value)
    return filled


def _with_standins(section: type[BaseModel], tree: object, settled: list[Key], at: Key = ()) -> dict[str, object]:
    """A valid tree: keys with a known mistake are left out, required ones get any valid value.

    With it the rules between fields can be checked in the same run as the fields, so that the user sees
    all mistakes at once.
    """
    given = tree if isinstance(tree, dict) else {}
    filled: dict[str, object] = {}
    for name, declared in section.model_fields.items():
        key = (*at, name)
        inner, entries = section_of(declared.annotation), entries_of(declared.annotation)
        if inner and (name in given or declared.is_required()):
            filled[name] = _with_standins(inner, given.get(name), settled, key)
        elif entries and (name in given or declared.is_required()):
            listed = given.get(name)
            listed = listed if isinstance(listed, list) and listed else [{}]
            filled[name] = [
                _with_standins(member, entry, settled, (*key, i))
                for i, entry in enumerate(listed)
                if (member := entry_of(declared.annotation, entry))
            ]
        elif name in given and not any(is_under(bad, key) for bad in settled):
            filled[name] = given[name]
        elif declared.is_required():
            choices = get_args(declared.annotation)
            is_text = declared.annotation is str or Path in (declared.annotation, *choices)
            is_list = get_origin(declared.annotation) is list
            filled[name] = "." if is_text else ["."] if is_list else choices[0] if choices else 1
    return filled
