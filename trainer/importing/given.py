"""Options that somebody gave, what became of each, and the configuration that grows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.importing.kohya_options import FLAG, NOTHING_HERE, NUMBER, TYPES, WHOLE, WORDS


@dataclass
class Draft:
    """A configuration in the making.

    Attributes:
        given: options by name.
        sections: what is to be written, as nested dictionaries.
        became: by option, the keys that it went into, or why it went nowhere.
        notes: what a person should know, in the order of its weight.
        reasons: why options become nothing; `mark`: what stands before an option's name.
    """

    given: Mapping[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)
    became: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reasons: Mapping[str, str] = field(default_factory=lambda: NOTHING_HERE)
    mark: str = "--"
    _keys: dict[str, dict[str, str]] = field(default_factory=dict)

    def take(self, name: str, default: Any = None) -> Any:
        """An option's value."""
        return self.given.get(name, default)

    def put(self, key: str, value: Any, *options: str) -> None:
        """Set a key such as `train.steps`, because of these options."""
        at = self.sections
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
        for option in options:
            if option in self.given:
                keys = self._keys.setdefault(option, {})
                keys[key] = f"{key}: {_shown(value)}"
                self.became[option] = ", ".join(keys.values())

    def leave(self, option: str, reason: str) -> None:
        """An option goes nowhere, and why."""
        if option in self.given:
            self.became.setdefault(option, f"- {reason}")

    def finish(self) -> None:
        """Options that nobody has taken: those for which there is nothing here, and those that had no effect."""
        for name in self.given:
            self.leave(name, self.reasons.get(name, "had no effect beside the others, or is the default"))


@dataclass(frozen=True)
class OptionTable:
    """What a script takes.

    Attributes:
        types: of its options, by name.
        scripts: what it is called.
    """

    types: Mapping[str, str]
    scripts: str


_OF_KOHYA = OptionTable(TYPES, "sdxl_train.py or sdxl_train_network.py")


def parse_options(words: Sequence[str], place: str, table: OptionTable = _OF_KOHYA) -> dict[str, Any]:
    """Options as Python's parser reads them: `--key value`, `--key=value`, flags, lists, beginnings of names.

    Raises:
        UserError: an option is not known, or its value is none of its type.
    """
    given: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--"):
            unset = "is set nowhere in the script; put in what it stands for" if word[:1] in "$%{" else ""
            raise UserError(f"{place}: `{word}` {unset or 'stands alone; options are `--name value`'}")
        name, has_value, value = word[2:].partition("=")
        name = _whole_name(name, place, table)
        values = [value] if has_value else []
        while not has_value and i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
        given[name] = _value_of(name, values, place, table)
    return given


def typed_options(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Options of a TOML file, whose tables are only headings.

    Names that are no options are kept as they are: sd-scripts passes over them without a word, and the files that its
    windows write are full of them.

    Raises:
        UserError: an option's value is none of its type.
    """
    given: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            given |= typed_options(value, place)
        elif name not in TYPES:
            given[name] = value
        elif value is not False and value != "":
            values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
            if name == "resolution" and isinstance(value, list):
                values = [",".join(values)]
            if isinstance(value, float) and value.is_integer() and TYPES[name] == WHOLE:
                values = [str(int(value))]
            given[name] = _value_of(name, [] if value is True else values, place, _OF_KOHYA)
    return given


def passed_over(given: Mapping[str, Any]) -> dict[str, str]:
    """Why names of a TOML file that are no options become nothing."""
    reasons = {}
    for name in given:
        if name not in TYPES:
            near = nearest(name, TYPES)
            reasons[name] = f"is no option of sd-scripts, and has no effect there{f'; {near} is' if near else ''}"
    return reasons


def _whole_name(name: str, place: str, table: OptionTable) -> str:
    """An option's whole name; a beginning of one is as good, if it is of one alone."""
    if name in table.types:
        return name
    fits = [each for each in table.types if each.startswith(name)] if name else []
    if len(fits) == 1:
        return fits[0]
    near = nearest(name, table.types)
    mend = f"; did you mean --{near}?" if near else ""
    raise UserError(f"{place}: --{name}: is no option of {table.scripts}{mend}")


def _value_of(name: str, values: Sequence[str], place: str, table: OptionTable) -> Any:
    kind = table.types[name]
    if kind == WORDS:
        return list(values)
    if kind == FLAG:
        if values:
            raise UserError(f"{place}: --{name} {values[0]}: takes no value")
        return True
    if len(values) != 1:
        raise UserError(f"{place}: --{name}: takes one value, and {len(values)} are given")
    try:
        if kind == WHOLE:
            return int(values[0])
        return float(values[0]) if kind == NUMBER else values[0]
    except ValueError:
        raise UserError(f"{place}: --{name} {values[0]}: must be a {kind}") from None


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        first = ", ".join(_shown(each) for each in [*value[0].values()][:2])  # kind and path, word and number
        return f"{first}, and {len(value) - 1} more" if len(value) > 1 else first
    if isinstance(value, dict | list):
        text = str(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
