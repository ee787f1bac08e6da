"""Reads YAML 1.2's core types with the line of every key, and writes them back.

PyYAML composes the nodes; the meaning of plain words is decided here, because YAML 1.1 reads `1e-4` as
text, `no` as false, `010` as 8 and `12:30` as 750.
"""

import re
from dataclasses import dataclass, field
from typing import cast

import yaml

from trainer.config.fields import Key, Problem, dotted

MAX_DEPTH = 32
MAX_VALUES = 20_000  # after aliases are followed: an alias bomb is small on disk

_WORDS: dict[str, object] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INT = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")  # longer ones cost quadratic time
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")


class YamlError(Exception):
    """The text is no YAML that this program reads.

    Args:
        line: where, counted from 1.
        rule: what is wrong, in one line.
    """

    def __init__(self, line: int, rule: str) -> None:
        super().__init__(rule)
        self.line = line
        self.rule = rule


@dataclass
class Document:
    """What a text holds: plain Python values, the line of each key (from 1), and mistakes that allow to go on."""

    value: object = None
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[tuple[int, Problem]] = field(default_factory=list)


class _Composer(yaml.BaseLoader):
    depth = 0
    nodes = 0

    def resolve(self, kind: object, value: object, implicit: object) -> str:
        return ""  # marks a node without a tag of its own

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(_line(self.peek_event().start_mark), f"nested more than {MAX_DEPTH} levels deep")
        if self.nodes > 2 * MAX_VALUES:  # keys are nodes too
            raise YamlError(_line(self.peek_event().start_mark), f"more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def plain_value(word: str) -> object:
    """The value of an unquoted word under the core schema of YAML 1.2 (section 10.3.2)."""
    if word in _WORDS:
        return _WORDS[word]
    if _INT.fullmatch(word):
        return int(word, {"0o": 8, "0x": 16}.get(word[:2], 10))
    if _FLOAT.fullmatch(word):
        return float(word.replace(".", "", 1) if word.lower().endswith(("inf", "nan")) else word)
    return word


def parse(text: str, at: Key = ()) -> Document:
    """The one document in `text`, whose keys are counted from `at`.

    Raises:
        YamlError: bad syntax, several documents, a tag, or values that refer to themselves.
    """
    try:
        loader = _Composer(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not valid YAML: the character U+{_code(error):04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from None
    document = Document()
    if node is not None:
        document.value = _value(node, at, document, ())
    return document


def _value(node: yaml.Node, key: Key, document: Document, ancestors: tuple[yaml.Node, ...]) -> object:
    line = _line(node.start_mark)
    if any(node is ancestor for ancestor in ancestors):
        raise YamlError(line, f"`{dotted(key)}`: an alias refers to itself")
    if node.tag:
        raise YamlError(line, f"the tag `{node.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported")
    document.lines.setdefault(key, line)
    if len(document.lines) > MAX_VALUES:
        raise YamlError(line, f"more than {MAX_VALUES} values, with aliases followed")
    if isinstance(node, yaml.ScalarNode):
        value = plain_value(node.value) if node.style is None else node.value
        if isinstance(value, str) and _SURROGATE.search(value):
            raise YamlError(line, f"`{dotted(key)}`: holds half a character (a lone surrogate)")
        return value
    inside = (*ancestors, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(entry, (*key, i), document, inside) for i, entry in enumerate(node.value)]
    return _mapping(cast(yaml.MappingNode, node), key, document, inside)


def _mapping(node: yaml.MappingNode, key: Key, document: Document, inside: tuple[yaml.Node, ...]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name_node, value_node in node.value:
        line = _line(name_node.start_mark)
        plain = isinstance(name_node, yaml.ScalarNode) and name_node.style is None
        name = plain_value(name_node.value) if plain else name_node.value
        where = f"{dotted(key)}: " if key else ""
        if not isinstance(name, str):
            given = f"`{name_node.value}` is a value" if plain else "this is no word"
            document.problems.append((line, Problem((key,), f"{where}a key must be a word; {given}")))
        elif plain and name == "<<":
            text = f"{where}merge keys (`<<`) are not supported; write the keys out"
            document.problems.append((line, Problem((key,), text)))
        elif name in values:
            text = f"{dotted((*key, name))}: given twice; first on line {document.lines[(*key, name)]}"
            document.problems.append((line, Problem(((*key, name),), text)))
        else:
            document.lines[(*key, name)] = line
            values[name] = _value(value_node, (*key, name), document, inside)
    return values


def _line(mark: yaml.Mark | None) -> int:
    return mark.line + 1 if mark else 1


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


def _syntax_error(error: yaml.MarkedYAMLError) -> YamlError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "cannot be read"
    mend = ""
    if "'\\t'" in problem:
        problem, mend = "a tab", "indent with spaces"
    elif "but found another document" in problem:
        problem, mend = "a second document starts here", "one file holds one configuration"
    elif "mapping values are not allowed" in problem:
        problem, mend = "a `:` where none can stand", "check the indentation, or put the value in quotes"
    elif "cannot start any token" in problem:
        mend = "put the value in quotes"
    elif "could not find expected ':'" in problem:
        mend = "each line is `key: value`"
    elif "expected <block end>" in problem:
        problem, mend = "does not line up with the lines above", "check the indentation, dashes and quotes"
    elif "found unexpected end of stream" in problem or "<stream end>" in problem:
        mark = error.context_mark or mark
        problem = "a quote or bracket that opens here is not closed"
    elif "expected ',' or" in problem:
        problem = "a comma or a closing bracket is missing"
    elif "expected '<document start>'" in problem:
        problem = "text after the end of the configuration"
    elif error.context:
        problem = f"{problem} ({error.context})"
    return YamlError(_line(mark), f"not valid YAML: {problem}" + (f"; {mend}" if mend else ""))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quotes what would not read back as the same text: PyYAML goes by YAML 1.1 and leaves `1e-4` bare."""
    style = None if isinstance(plain_value(text), str) else "'"
    if not text.isprintable():
        style = '"'  # with escapes: other styles fold line breaks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: object, flow: bool = False) -> str:
    """YAML text that `parse` reads back to the same value; on one line if `flow`."""
    width = float("inf") if flow else 110
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=cast(int, width)
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text
