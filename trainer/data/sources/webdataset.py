"""WebDataset tars: the files of one image share a name up to the first dot (`0001.jpg`, `0001.txt`, `0001.json`).

The files of a sample stand next to each other, as all writers of the format put them. Images stay in their tar and
are found by offset; captions, which are small, are read while listing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trainer.data.captions import Captions, caption_record
from trainer.data.images import EXTENSIONS
from trainer.data.sources.columns import captions_of, files_below, loss_weight_of, score_of, text_of
from trainer.data.sources.source import OWN_MASK, ForeignText, MaskPlace, SourceItem, read_bytes
from trainer.data.sources.tar_members import BadTar, TarMember, walk_tar
from trainer.errors import printable
from trainer.guards import DEFAULT_LIMITS, Limits, Refused, decode_text

if TYPE_CHECKING:
    from trainer.config.sections.data.sources import WebdatasetSource

_CAPTIONS = (".txt", ".caption", ".json")


def list_webdataset(
    source: WebdatasetSource,
    name: str,
    ignored: Counter[str],
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """All images of all tars. A key is `<name>/<tar below the folder, without .tar>/<name within the tar>`.

    A tar that is damaged gives what lies before the damage and an item that says where it is.
    """
    for path, stem in files_below(source.tars, ".tar", "tars", ignored, limits):
        damage: list[str] = []
        for sample, members in groupby(_members(path, ignored, damage), key=_sample):
            yield from _items(source, path, f"{name}/{stem}/{sample}", list(members), ignored, limits)
        for problem in damage:
            yield SourceItem(f"{name}/{stem}/", path, problem=problem)


def _members(path: str, ignored: Counter[str], damage: list[str]) -> Iterator[TarMember]:
    """The images and captions of a tar; ends where it cannot be read on, and then puts the reason into `damage`."""
    try:
        for member in walk_tar(path):
            ending = _ending(member.name)
            if member.problem:
                yield member
            elif os.path.basename(member.name).startswith("."):  # noqa: PTH119 - a name, not a path
                ignored["(hidden)"] += 1
            elif ending in EXTENSIONS or ending in _CAPTIONS:
                yield member
            else:
                ignored[printable(ending[:20]) or "(none)"] += 1
    except BadTar as error:
        damage.append(str(error))
    except Refused as error:
        damage.append(error.reason_for(path))
    except OSError as error:
        damage.append(f"cannot be read: {error.strerror}")


def _items(
    source: WebdatasetSource, path: str, key: str, members: list[TarMember], ignored: Counter[str], limits: Limits
) -> Iterator[SourceItem]:
    """The item of one sample, if it has an image."""
    if problem := next((member.problem for member in members if member.problem), ""):
        yield SourceItem(key, path, problem=problem)
        return
    masks = [member for member in members if member.name.endswith(source.mask_suffix)]
    members = [member for member in members if not member.name.endswith(source.mask_suffix)] if masks else members
    by_ending = {_ending(member.name): member for member in reversed(members)}
    images = [member for member in members if _ending(member.name) in EXTENSIONS]
    if not images:
        ignored["(caption without image)"] += 1
        return
    mask = OWN_MASK if source.masks == "alpha" else None
    if masks and source.masks == "files":
        mask = MaskPlace(path, masks[0].offset, masks[0].size)
    elif masks:
        ignored["(mask that is not used)"] += 1
    if len(images) > 1:
        ignored["(further image of a sample)"] += len(images) - 1
    image, caption, foreign, problem = images[0], None, None, ""
    if not image.size:  # told at once, because a small tar may hold any number of them
        yield SourceItem(key, path, image.offset, 0, problem="is empty")
        return
    try:
        caption, foreign = _caption(source, path, by_ending, limits.caption_bytes)
    except (ValueError, OSError, EOFError, RecursionError, Refused) as error:
        problem = f"its caption cannot be read: {printable(str(error))}"
    yield SourceItem(
        key,
        path,
        image.offset,
        image.size,
        caption=caption,
        repeats=source.repeats,
        file_bytes=image.size,
        mtime_ns=image.mtime_ns,
        mask=mask,
        problem=problem,
        foreign=foreign,
    )


def _caption(
    source: WebdatasetSource, path: str, by_ending: dict[str, TarMember], most_bytes: int
) -> tuple[str, ForeignText | None]:
    """The caption record: the field of several captions in `.json`, else the text of `.txt` or `.caption`, else the
    field of `.json`; tags, weight and score from `.json`. And which member is not UTF-8."""
    texts, foreign = {}, None
    for ending in _CAPTIONS:
        member = by_ending.get(ending)
        if member is not None:
            if member.size > most_bytes:
                raise ValueError(f"{member.name} has {member.size:,} bytes; at most {most_bytes:,} are read")
            data = read_bytes(path, member.offset, member.size)
            decoded = decode_text(data, member.name)
            texts[ending] = decoded.text.strip()
            if foreign is None and not decoded.is_utf_8:
                foreign = ForeignText(decoded.encoding, f"{member.name} in {path}")
    fields: dict[str, Any] = {}
    if ".json" in texts:
        fields = json.loads(texts[".json"])
        if not isinstance(fields, dict):
            raise ValueError("its .json is no object")
    several: str | Captions = captions_of(fields.get(source.captions_field)) if source.captions_field else ""
    text = several or texts.get(".txt") or texts.get(".caption") or text_of(fields.get(source.caption_field))
    weight = loss_weight_of(fields.get(source.weight_field)) if source.weight_field else 1.0
    score = score_of(fields.get(source.score_field)) if source.score_field else None
    return caption_record(text, text_of(fields.get(source.tags_field)), weight, score).decode(), foreign


def _ending(name: str) -> str:
    """The last ending, in lower case."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _sample(member: TarMember) -> str:
    """The sample that a member belongs to: its name up to the first dot after the last slash."""
    folder, slash, base = member.name.rpartition("/")
    return folder + slash + base.partition(".")[0]
