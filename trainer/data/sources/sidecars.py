"""The files beside an image of a folder that hold its words: a caption as text or JSON, and its tags.

They are read when the image is looked at, not while the folder is listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.data.captions import Captions, caption_record
from trainer.data.sources.columns import captions_of, loss_weight_of, text_of
from trainer.data.sources.source import ForeignText
from trainer.guards import Decoded, Limits, Refused, decode_text, parse_json, read_bytes

if TYPE_CHECKING:
    from trainer.config.sections.data.sources import FolderSource

_EMPTY = '{"caption":""}'


class BadCaption(ValueError):
    """A caption that cannot be used; the message says why."""


class JsonFields(NamedTuple):
    """Where in a JSON object the words of an image stand, and its loss weight, if it has one."""

    caption: str = "caption"
    captions: str | None = "captions"
    tags: str = "tags"
    weight: str | None = None


class FoundCaption(NamedTuple):
    """A caption record (JSON text), and that a file of it is not UTF-8."""

    record: str
    foreign: ForeignText | None


@dataclass(frozen=True)
class Sidecars:
    """How the files beside the images of a folder are read."""

    caption_extension: str = ".txt"
    fields: JsonFields | None = None
    """The caption files are JSON objects with these fields; None: they are the text itself."""
    tags_extension: str | None = None
    """Ending of files that hold nothing but tags."""

    @property
    def are_plain(self) -> bool:
        """Whether there is but one file, a text."""
        return self.fields is None and self.tags_extension is None

    def tags_path(self, caption_path: str) -> str:
        """The file of tags beside a caption file; nothing where there are none."""
        if self.tags_extension is None:
            return ""
        return caption_path.removesuffix(self.caption_extension) + self.tags_extension


PLAIN_TEXT = Sidecars()
"""A text beside each image."""


def sidecars_of(source: FolderSource) -> Sidecars:
    """As the source says."""
    names = JsonFields(source.caption_field, source.captions_field, source.tags_field, source.weight_field)
    return Sidecars(source.caption_extension, names if source.holds_json else None, source.tags_extension)


def read_caption(
    path: str, default: str | None = None, most_bytes: int = Limits.caption_bytes, sidecars: Sidecars = PLAIN_TEXT
) -> FoundCaption:
    """The caption file and those beside it as the record that shards hold, with `default`, or an empty caption, in
    place of a file that is not there.

    A default of tags alone says that the file holds tags as well; its loss weight is kept. A byte order mark and
    surrounding space are taken off; how bytes become text says `guards.decode_text`.

    Raises:
        BadCaption: it is no regular file, larger than `most_bytes`, no text, or not of the form that it should have.
        OSError: it cannot be read.
    """
    words: dict[str, Any] = json.loads(default or _EMPTY)
    weight = words.pop("loss_weight", 1.0)
    ((field, _),) = words.items()
    try:
        found = _read(path, most_bytes)
        if found is not None and sidecars.fields is None:
            words[field] = found.text.strip()
        elif found is not None and sidecars.fields is not None:
            data = found.text.encode()
            fields = parse_json(data, path, most_bytes=len(data), most_depth=Limits.json_depth)
            words, weight = _words_of_json(fields, sidecars.fields, weight)
        tags_path = sidecars.tags_path(path)
        if tags_path and (tags := _read(tags_path, most_bytes)) is not None:
            words["tags"] = _joined_lines(tags.text)
            path, found = (tags_path, tags) if found is None or found.is_utf_8 else (path, found)
        record = caption_record(words.get("caption", ""), words.get("tags", ""), weight).decode()
    except Refused as error:
        raise BadCaption(f"its caption {_reason(error, path, sidecars)}") from None
    except UnicodeEncodeError:  # an escape in JSON
        raise BadCaption("its caption holds half a character") from None
    except ValueError as error:
        raise BadCaption(str(error)) from None
    return FoundCaption(record, None if found is None or found.is_utf_8 else ForeignText(found.encoding, path))


def _read(path: str, most_bytes: int) -> Decoded | None:
    try:
        return decode_text(read_bytes(path, most_bytes), path)
    except FileNotFoundError:
        return None


def _reason(error: Refused, path: str, sidecars: Sidecars) -> str:
    """Without the path, where that is the caption file's; else with the name of the file beside it."""
    said = error.reason_for(path)
    tags_path = sidecars.tags_path(path)
    if tags_path and said.startswith(tags_path):
        return f"({Path(tags_path).name}) {error.reason_for(tags_path)}"
    return said


def _words_of_json(fields: Any, names: JsonFields, weight: float) -> tuple[dict[str, str | Captions], float]:
    """Caption and tags of a JSON object, and its weight where it holds one; ValueError says what is wrong."""
    if not isinstance(fields, dict):
        raise ValueError("its caption is no JSON object")
    several = captions_of(fields.get(names.captions)) if names.captions else ""
    caption = several or captions_of(fields.get(names.caption))
    tags = fields.get(names.tags)
    if not (
        tags is None or isinstance(tags, str) or (isinstance(tags, list) and all(isinstance(t, str) for t in tags))
    ):
        raise ValueError("its tags are neither text nor a list of texts")
    own = fields.get(names.weight) if names.weight else None
    return {"caption": caption, "tags": text_of(tags)}, weight if own is None else loss_weight_of(own)


def _joined_lines(text: str) -> str:
    """Tags of several lines as one."""
    lines = (line.strip().rstrip(",").rstrip() for line in text.split("\n"))
    return ", ".join(filter(None, lines))
