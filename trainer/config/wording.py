"""Says in plain words what pydantic found wrong: place, value, rule, mend."""

import re
from typing import Any

from pydantic import ValidationError

from trainer.config.fields import (
    Key,
    Problem,
    Tag,
    all_keys,
    dotted,
    entries_of,
    field_at,
    is_under,
    keys_of,
    meaning,
    section_at,
    untagged,
)
from trainer.config.spelling import nearest
from trainer.config.yaml_source import dump, plain_value

LONGEST = 80

_RULES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "dict_type": "must hold patterns with a number each, such as {attn2: 0.5}",
    "model_type": "must be a section",
}
_LIMITS = {
    "greater_than_equal": ("ge", "must be at least {}"),
    "greater_than": ("gt", "must be greater than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "less_than": ("lt", "must be less than {}"),
    "too_short": ("min_length", "must have at least {}"),
    "too_long": ("max_length", "must have at most {}"),
    "string_too_short": ("min_length", "must have at least {} character"),
}
_ALSO_CALLED = {  # words of other trainers
    "pretrained_model_name_or_path": "model.path",
    "train_data_dir": "data.sources.0.path",
    "image_dir": "data.sources.0.path",
    "num_repeats": "data.sources.0.repeats",
    "bucket_reso_steps": "data.buckets.step_px",
    "min_bucket_reso": "data.buckets.min_px",
    "max_bucket_reso": "data.buckets.max_px",
    "max_data_loader_n_workers": "data.workers",
    "output_dir": "run.dir",
    "shuffle_caption": "captions.shuffle_tags",
    "caption_separator": "captions.tag_separator",
    "caption_prefix": "captions.prefix",
    "caption_suffix": "captions.suffix",
    "caption_dropout_rate": "captions.dropout_rate",
    "caption_dropout_probability": "captions.dropout_rate",
    "caption_dropout_every_n_epochs": "captions.dropout_every_n_epochs",
    "caption_tag_dropout_rate": "captions.tag_dropout_rate",
    "enable_wildcard": "captions.wildcards",
    "batch_size": "train.batch_size_per_gpu",
    "train_batch_size": "train.batch_size_per_gpu",
    "max_train_steps": "train.steps",
    "max_train_epochs": "train.epochs",
    "mixed_precision": "train.precision",
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "lr_schedule.kind",
    "lr_warmup_steps": "lr_schedule.warmup_steps",
    "save_every_n_steps": "checkpoint.every_steps",
    "ema_decay": "ema.averages.0.decay",
    "sample_every_n_steps": "samples.every_steps",
    "sample_prompts": "samples.prompt_file",
    "sample_sampler": "samples.sampler",
}


def problems_of(error: ValidationError) -> list[Problem]:
    """One problem for each key that pydantic found wrong."""
    found: list[tuple[Key, dict[str, Any]]] = [
        (_real_key(item["loc"]), {**item}) for item in error.errors(include_url=False)
    ]
    unknown = [_unknown_key(key, item) for key, item in found if item["type"] == "extra_forbidden"]
    explained = [key for problem in unknown for key in problem.explains]
    missing: list[Problem] = []
    wrong_types: list[Problem] = []
    wrong: dict[Key, list[dict[str, Any]]] = {}
    for key, item in found:
        if item["type"] == "missing":
            missing += [_missing(k) for k in _required(key) if not any(is_under(untagged(k), e) for e in explained)]
        elif item["type"].startswith("union_tag_"):
            wrong_types.append(_wrong_type(key, item["input"]))
        elif item["type"] != "extra_forbidden":
            wrong.setdefault(key, []).append(item)
    return unknown + missing + wrong_types + [_wrong_value(key, items) for key, items in wrong.items()]


def shown(value: object) -> str:
    """A value as one would write it in YAML, on one line and not too long."""
    return short(dump(value, flow=True))


def _real_key(loc: Key) -> Key:
    """`loc` up to the part that names a member of a union: a word below something that is no section.

    A word that says of which type an entry of a list is becomes a `Tag`; at the end of a key it says nothing.
    """
    key: Key = ()
    for part in loc:
        if isinstance(part, str) and section_at(key) is None:
            if not _types_at(key):
                return key
            part = Tag(part)
        key = (*key, part)
    return key[:-1] if key and isinstance(key[-1], Tag) else key


def _types_at(key: Key) -> list[str]:
    """The types that the entry of a list at `key` may be of, if there are several."""
    field = field_at(key) if key and isinstance(key[-1], int) else None
    return [tag for tag in entries_of(field.annotation) if tag is not None] if field else []


def _required(key: Key) -> list[Key]:
    section = section_at(key)
    if section is None:
        return [key]
    fields = [name for name, field in section.model_fields.items() if field.is_required()]
    return [inner for name in fields for inner in _required((*key, name))]


def _missing(key: Key) -> Problem:
    return Problem((untagged(key),), f"{dotted(key)}: missing ({meaning(key)})")


def _unknown_key(key: Key, item: dict[str, Any]) -> Problem:
    section, name = key[:-1], str(key[-1])
    offered = _offered(section, name)
    here = section_at(section)
    if offered:
        names = [str(k[-1]) if k[:-1] == section and "." not in name else dotted(k) for k in offered]
        mend = "did you mean " + " or ".join(f"`{n}`" for n in names) + "?"
        if "." in name:
            mend = f"did you mean `{offered[0][-1]}` within `{dotted(offered[0][:-1])}`?"
    else:
        mend = f"`{dotted(section)}` has " if section else "the sections are "
        mend += ", ".join(keys_of(here)) if here else ""
    explains = tuple(map(untagged, offered))
    return Problem((untagged(key),), f"{short(dotted(key))}: unknown key; {mend}", explains=explains)


def _offered(section: Key, name: str) -> list[Key]:
    """The keys that a misspelt or misplaced key may have meant, best first; at most two."""
    here = section_at(section)
    known = {dotted(key): key for key in all_keys()}
    names = list(here.model_fields) if here else []
    if same := nearest(name, names, likeness=1.0):
        return [(*section, same)]
    if "." in name:
        found = nearest(name, known, likeness=0.8)
        return [known[found]] if found else []
    if name in _ALSO_CALLED:
        return [known[_ALSO_CALLED[name]]]
    if like := nearest(name, names, likeness=0.8):
        return [(*section, like)]
    like = nearest(name, (str(key[-1]) for key in known.values()), likeness=0.8)
    elsewhere = [key for key in known.values() if key[-1] == like and untagged(key[:-1]) != untagged(section)]
    # An entry of `samples.images` has the names of what it overrides, which is meant.
    elsewhere = [key for key in elsewhere if key[-2:-1] != (0,) or (*key[:-3], key[-1]) not in elsewhere]
    if 1 <= len(elsewhere) <= 2:
        return elsewhere
    like = nearest(name, names)
    return [(*section, like)] if like else []


def _wrong_type(key: Key, entry: dict[str, Any]) -> Problem:
    """The entry's `type` names none of those that its list may hold."""
    allowed, given = _types_at(key), entry["type"]
    like = nearest(given, allowed, likeness=0.5) if isinstance(given, str) else None
    mend = f" (did you mean `{like}`?)" if like else ""
    said = ": has no value;" if given is None else f" = {shown(given)}:"
    place = (*key, "type")
    return Problem((place,), f"{dotted(place)}{said} must be one of {', '.join(allowed)}{mend}")


def _wrong_value(key: Key, items: list[dict[str, Any]]) -> Problem:
    value = items[0]["input"]
    rules = [_rule(key, item) for item in items]
    rule = rules[0] + "".join(" or " + other.removeprefix("must be ") for other in rules[1:])
    if value is None:
        return Problem((untagged(key),), f"{dotted(key)}: has no value; {rule}")
    mend = _mend(items[0]["type"], value)
    is_secret = key[:1] == ("notify",) and "://" in str(value)
    said = f"{dotted(key)}:" if is_secret else f"{dotted(key)} = {shown(value)}:"
    return Problem((untagged(key),), f"{said} {rule}" + (f"; {mend}" if mend and not is_secret else ""))


def _rule(key: Key, item: dict[str, Any]) -> str:
    kind, bounds = item["type"], item.get("ctx", {})
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        limit = words.format(f"{bounds[name]:.15g}")
        if kind.startswith("too_"):
            limit += " entry" if bounds[name] == 1 else " entries"
        return f"{limit} ({meaning(key)})"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", bounds["expected"])
        like = nearest(item["input"], allowed, likeness=0.5) if isinstance(item["input"], str) else None
        mend = f" (did you mean `{like}`?)" if like else ""
        return ("must be one of " if len(allowed) > 1 else "must be ") + ", ".join(allowed) + mend
    if kind == "model_type":
        return f"must be a section: keys below it, such as `{_first_key(key)}`"
    return _RULES.get(kind) or str(item["msg"])


def _first_key(key: Key) -> str:
    section = section_at((*key, Tag(types[0])) if (types := _types_at(key)) else key)
    return next(iter(keys_of(section)), "") if section else ""


def _mend(kind: str, value: object) -> str:
    if kind in ("int_type", "float_type") and isinstance(value, str):
        number = plain_value(value.strip().replace("_", "").replace(",", ""))
        if isinstance(number, int) or (kind == "float_type" and isinstance(number, float)):
            return f"write {number} without quotes" if value.strip() == str(number) else f"write {number}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("string_type", "path_type") and not isinstance(value, list):
        return "put it in quotes"
    if kind == "list_type" and not isinstance(value, dict):
        return f"write {shown([value])}"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("true", "false"):
        return f"write {value.lower()} without quotes"
    return ""


def short(text: str) -> str:
    """`text` cut to a length that leaves the line readable."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
