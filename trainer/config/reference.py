"""The schema as others read it: JSON Schema for editors, and the table of `docs/config.md`."""

from typing import Any

from trainer.config.schema import Config
from trainer.config.values import LARGEST
from trainer.config.yaml_source import dump

Schema = dict[str, Any]

_HEAD = """\
# Configuration

Every key of a configuration file, written by `sdxl-train schema --markdown` from the schema in
`trainer/config/schema.py`.

- A file is YAML: sections with keys below them. Numbers, `true`/`false` and `null` are read as in YAML 1.2: `1e-4` is
  a number, and `no`, `010` (ten) or `12:30` hold no surprise. Flags also take `yes`, `no`, `on` and `off`.
- An unknown key, a key given twice, a wrong type, a missing folder or an option that would do nothing stops the
  program with one line for each mistake.
- Relative paths are relative to the current directory, and `~` is your home directory.
- On the command line, `section.key=value` overrides a key: `train.steps=100`, `samples.prompts='[a cat, a dog]'`,
  `data.sources.0.path=photos`. Giving a whole section or list replaces it.
- For completion and help in an editor with a YAML language server, write `sdxl-train schema > sdxl-train.schema.json`
  and begin the configuration with `# yaml-language-server: $schema=sdxl-train.schema.json`.
"""


def json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a configuration file."""
    schema = Config.model_json_schema()
    _tidy(schema)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sdxl-train configuration"}
    return head | {name: part for name, part in schema.items() if name != "title"}


def field_docs() -> str:
    """The text of `docs/config.md`: a table of the keys of each section."""
    schema = json_schema()
    return _HEAD + "".join(_section("", name, part, schema["$defs"]) for name, part in schema["properties"].items())


def _tidy(schema: Any) -> None:
    """Descriptions on one line; no titles that only repeat the key."""
    if isinstance(schema, list):
        for part in schema:
            _tidy(part)
    elif isinstance(schema, dict):
        if isinstance(schema.get("description"), str):
            schema["description"] = " ".join(schema["description"].split())
        if isinstance(schema.get("title"), str):
            del schema["title"]
        for part in schema.values():
            _tidy(part)


def _section(above: str, name: str, part: Schema, definitions: Schema, of_type: str = "") -> str:
    """The table of one section, followed by those of the sections in it."""
    body = _body(part, definitions)
    path = f"{above}{name}"
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    below = ""
    for key, field in body["properties"].items():
        inner = field["items"] if field.get("type") == "array" else field
        for member in inner.get("oneOf", ()):
            kind = _body(member, definitions)["properties"]["type"]
            described = {"description": kind["description"], **member}
            below += _section(f"{path}.", f"{key}[]", described, definitions, of_type=kind["const"])
        if "oneOf" in inner:
            continue
        if "$ref" in inner:
            suffix = "[]" if inner is not field else ""
            described = {"description": field.get("description", ""), **inner}
            below += _section(f"{path}.", f"{key}{suffix}", described, definitions)
            continue
        cells = (f"`{key}`", _values(field), _default(key, field, body), field.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"`{path}` of type `{of_type}`" if of_type else f"`{path}`"
    return f"\n## {title}\n\n{part.get('description', '')}\n\n" + "\n".join(rows) + "\n" + below


def _body(part: Schema, definitions: Schema) -> Schema:
    return definitions[part["$ref"].rsplit("/", 1)[1]]


def _default(key: str, field: Schema, section: Schema) -> str:
    return "**required**" if key in section.get("required", ()) else f"`{dump(field.get('default'), flow=True)}`"


def _values(field: Schema) -> str:
    """The values that a field takes, in words."""
    if "anyOf" in field:
        flag = {"type": "boolean"} in field["anyOf"]
        choices = [choice for choice in field["anyOf"] if not (flag and "yes" in choice.get("enum", ()))]
        return " or ".join(_values(choice) for choice in choices)
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        entries = f", {field['minItems']} of them" if field.get("minItems") == field.get("maxItems", 0) else ""
        return f"list of {_values(field['items'])}{entries}"
    if field["type"] == "object":
        return f"pattern: {_values(field['additionalProperties'])}, ..."
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "null": "`null`"}
    name = "path" if field.get("format") == "path" else words.get(field["type"], "text")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:.15g}" for key, sign in signs.items() if field.get(key, LARGEST) < LARGEST]
    return f"{name} {' and '.join(bounds)}".rstrip()
