"""A file of prompts as entries of `samples.images`: lines with kohya's flags, or tables in JSON or TOML.

They are read as sd-scripts reads them (library/train_util.py, `load_prompts` and `line_to_prompt_dict`); what it passes
over without a word is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config.prompt_settings import BY_FLAG, BY_NAME, unknown_flag, unknown_name
from trainer.config.schema import Config
from trainer.config.section_rules.rules_samples import sample_rules
from trainer.config.sections.samples_config import SampleImageConfig
from trainer.config.spelling import nearest, nearest_path
from trainer.errors import UserError, printable
from trainer.guards import decode_text, parse_json, parse_toml, read_bytes

_MOST_BYTES = 1 << 20
_MOST_PROMPTS = 500  # of which one sheet is made
_MOST_TOLD = 20
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_SHAPE = "a file of prompts holds [prompt], for all, and a [[prompt.subset]] for each"


def with_prompts_read(config: Config) -> Config:
    """The configuration with what `samples.prompt_file` holds in `samples.images`, so that the file may go.

    Raises:
        UserError: as `read_prompts`; or a prompt asks for what has no effect.
    """
    samples = config.samples
    if samples.prompt_file is None:
        return config
    read, before = read_prompts(samples.prompt_file), len(samples.images)
    images = [*samples.images, *read.values()]
    read_in = samples.model_copy(update={"images": images, "prompt_file": None})
    config = config.model_copy(update={"samples": read_in})
    places = list(read)
    wrong = list[str]()
    for problem in sample_rules(config):
        number = next((key[2] for key in problem.keys if key[:2] == ("samples", "images")), -1)
        if isinstance(number, int) and number >= before:
            wrong.append(f"{places[number - before]}: " + problem.text.replace(f"samples.images.{number}.", ""))
    if wrong:
        raise UserError(*wrong)
    return config


def read_prompts(path: Path) -> dict[str, SampleImageConfig]:
    """The prompts of a file, each by its place, such as `prompts.txt:4`.

    A text file: `PROMPT [--n NEGATIVE] [--w PX] [--h PX] [--d SEED] [--s STEPS] [--l SCALE] [--ss SAMPLER]` on a line;
    empty lines and those that begin with `#` are passed over. `.json`: a list of such lines, and of tables with
    `prompt`, `negative_prompt`, `width` and the other names of `BY_NAME`. `.toml`: `[[prompt.subset]]` with the same
    names, over those of `[prompt]`.

    Raises:
        UserError: the file cannot be read or holds no prompt; or a line for each thing that is not understood.
    """
    ending = path.suffix.lower()
    if ending in (".yaml", ".yml"):
        raise UserError(f"{path}: must be .txt, .json or .toml; lists of settings in YAML go into samples.images")
    try:
        text = decode_text(read_bytes(path, _MOST_BYTES), str(path)).text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    entries = {".json": _of_json, ".toml": _of_toml}.get(ending, _of_lines)(text, str(path))
    if not entries:
        hint = "" if ending in (".json", ".toml") else "; a line holds one, and those that begin with # are comments"
        raise UserError(f"{path}: holds no prompt{hint}")
    if len(entries) > _MOST_PROMPTS:
        raise UserError(f"{path}: holds {len(entries):,} prompts; at most {_MOST_PROMPTS} are drawn")
    found, wrong = dict[str, SampleImageConfig](), list[str]()
    for place, entry in entries.items():
        read = _read(entry)
        if isinstance(read, SampleImageConfig):
            found[place] = read
        else:
            wrong += [f"{place}: {line}" for line in read]
    if wrong:
        more = [f"{path}: and {len(wrong) - _MOST_TOLD:,} more lines"] if len(wrong) > _MOST_TOLD else []
        raise UserError(*wrong[:_MOST_TOLD], *more)
    return found


def _read(entry: str | Mapping[str, Any]) -> SampleImageConfig | Sequence[str]:
    """What an entry says, or what is wrong with it."""
    try:
        return prompt_of_line(entry) if isinstance(entry, str) else prompt_of_table(entry)
    except ValueError as error:
        return error.args


def prompt_of_line(line: str) -> SampleImageConfig:
    """The prompt and the settings of one line.

    Raises:
        ValueError: it says what of the line is wrong, without its place.
    """
    prompt, *flags = (part.strip() for part in _FLAG.split(line.strip()))
    if not prompt:
        raise ValueError("has no prompt before its flags")
    settings: dict[str, object] = dict(BY_NAME["prompt"].read(prompt))
    for flag in flags:
        name, value = [*flag.split(None, 1), ""][:2]
        if name.lower() not in BY_FLAG:
            raise ValueError(unknown_flag(name))
        setting = BY_FLAG[name.lower()]
        if not value and name.lower() != "n":
            raise ValueError(f"--{name}: has no value")
        try:
            _add(settings, setting.read(setting.typed(value)))
        except ValueError as error:
            raise ValueError(f"--{name} {value}: {error}") from None
    return SampleImageConfig.model_validate(settings)


def prompt_of_table(table: Mapping[str, Any]) -> SampleImageConfig:
    """The prompt and the settings of one table; what is null is as if it were not there. Flags in its prompt are words.

    Raises:
        ValueError: its arguments are a line for each name with which something is wrong, without its place.
    """
    settings: dict[str, object] = {}
    wrong = list(islice(_wrong_in(table, settings), _MOST_TOLD))  # looking for the nearest of thousands takes long
    if "prompt" not in settings and not any(line.startswith("prompt ") for line in wrong):
        wrong.append("prompt: missing (what is drawn)")
    if wrong:
        raise ValueError(*wrong)
    return SampleImageConfig.model_validate(settings)


def _wrong_in(table: Mapping[str, Any], settings: dict[str, object]) -> Iterator[str]:
    """What is wrong with the names of a table; what is right is put into `settings`."""
    for name, value in table.items():
        if name not in BY_NAME:
            yield unknown_name(name)
        elif value is not None:
            try:
                _add(settings, BY_NAME[name].read(value))
            except ValueError as error:
                yield f"{name} = {_shown(value)}: {error}"


def _add(settings: dict[str, object], more: Mapping[str, object]) -> None:
    for key, said in more.items():
        if key in settings:
            raise ValueError(f"{key} is said twice")
        settings[key] = said


def _shown(value: object) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 60)


def _of_lines(text: str, file: str) -> dict[str, str]:
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return {f"{file}:{n}": line for n, line in lines if line.strip() and not line.lstrip().startswith("#")}


def _of_json(text: str, file: str) -> dict[str, str | dict[str, Any]]:
    data = text.encode()
    entries = parse_json(data, file, most_bytes=len(data), most_items=100_000)
    if not isinstance(entries, list):
        raise UserError(f"{file}: must be a list of prompts, each a line of text or an object")
    return _checked(f"{file}: prompt", entries, (str, dict), "must be a line of text or an object")


def _of_toml(text: str, file: str) -> dict[str, dict[str, Any]]:
    tables = parse_toml(text, file)
    if others := [name for name in tables if name != "prompt"]:
        mend = "did you mean `prompt`?" if nearest(others[0], ["prompt"]) else _SHAPE
        wrong = "belongs below [prompt]" if others[0] in BY_NAME else f"unknown key; {mend}"
        raise UserError(f"{file}: {others[0]}: {wrong}")
    of_all = tables.get("prompt")
    if not isinstance(of_all, dict):
        raise UserError(f"{file}: prompt: {'missing' if of_all is None else 'must be one table'}; {_SHAPE}")
    subsets = of_all.pop("subset", None)
    if not isinstance(subsets, list):
        like = nearest("subset", of_all)
        mend = f"; did you mean it by `{like}`?" if like else f"; {_SHAPE}"
        raise UserError(f"{file}: prompt.subset: {'missing' if subsets is None else 'must be a list of tables'}{mend}")
    if wrong := [f"{file}: prompt.{line}" for line in islice(_wrong_in(of_all, {}), _MOST_TOLD)]:
        raise UserError(*wrong)
    found = _checked(f"{file}: prompt.subset", subsets, (dict,), "must be a table")
    return {place: _with(of_all, subset) for place, subset in found.items()}


def _with(of_all: dict[str, Any], subset: dict[str, Any]) -> dict[str, Any]:
    """A subset, and what holds for all images, unless the subset says it by that or another name."""
    said = {BY_NAME[name].read for name in subset if name in BY_NAME}
    return {name: value for name, value in of_all.items() if BY_NAME[name].read not in said} | subset


def _checked(place: str, entries: list[Any], kinds: tuple[type, ...], rule: str) -> dict[str, Any]:
    """Entries by place, counted from 1, if all are of these kinds."""
    wrong = [f"{place} {n}: {rule}" for n, entry in enumerate(entries, start=1) if not isinstance(entry, kinds)]
    if wrong:
        raise UserError(*wrong[:_MOST_TOLD])
    return {f"{place} {n}": entry for n, entry in enumerate(entries, start=1)}
