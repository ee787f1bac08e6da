"""From the caption record that a shard stores to the text that the tokenizers see.

A record holds an image's natural-language caption and its tags as they were found. What becomes of them, anything
random included, is decided each time a sample is read, as a function of its draw seed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from typing import Any, Literal

from trainer.data.tag_groups import TagGroup, taken_out
from trainer.data.wildcards import count_groups, expand
from trainer.keyed import draw_words

MOST_LOSS_WEIGHT = 100.0
"""No image counts more, whatever its weights are multiplied to."""
MOST_CAPTION_WEIGHT = 1000.0
"""Of one of an image's captions."""
Captions = tuple[tuple[str, float], ...]
"""Several captions of an image, each a line, with the weights by which one of them is drawn."""
WEIGHT_MARK = '"loss_weight":'
"""What stands before an image's own loss weight in a record, and nowhere else: within a text the quotes are escaped."""
SCORE_MARK = '"score":'
"""The same before its score, which only the filters of `prepare` read."""
_NO_TEXT = ('{"caption":"",' + WEIGHT_MARK, '{"caption":"",' + SCORE_MARK)
_NUMBERS = ("loss_weight", "score")
_JOINT = ", "
_MARK = "\ufdd0"
"""Stands for the caption while the tags beside it are cut: a code point that is set aside for such use."""


def caption_record(
    caption: str | Captions = "", tags: str = "", loss_weight: float = 1.0, score: float | None = None
) -> bytes:
    """What a shard stores for an image: a UTF-8 JSON object; empty tags, a loss weight of 1 and no score are left
    out.

    Captions of different weights are `"captions": [[text, weight], ...]` in place of `caption`.
    """
    # Written out, because `json.dumps` takes ten times as long, and there may be millions.
    if isinstance(caption, str):
        fields = f'"caption":{encode_basestring(caption)}'
    else:
        fields = f'"captions":{json.dumps(caption, ensure_ascii=False, separators=(",", ":"))}'
    fields += f',"tags":{encode_basestring(tags)}' if tags else ""
    fields += f",{WEIGHT_MARK}{loss_weight!r}" if loss_weight != 1 else ""
    return f"{{{fields}{'' if score is None else f',{SCORE_MARK}{score!r}'}}}".encode()


def has_no_text(record: str) -> bool:
    """Whether a record that `caption_record` gave holds neither a caption nor tags."""
    return record == '{"caption":""}' or record.startswith(_NO_TEXT)


def holds_several(fields: Mapping[str, Any]) -> bool:
    """Whether a caption record has several captions, or a field of several lines."""
    texts = (fields.get(name) or "" for name in ("caption", "tags"))
    return len(fields.get("captions") or ()) > 1 or any("\n" in text.strip() for text in texts)


def is_record(fields: object) -> bool:
    """Whether a JSON value that somebody may have altered is a caption record, so that `compose` can take it."""
    return isinstance(fields, dict) and all(map(_is_field, fields, fields.values()))


def _is_field(name: str, value: object) -> bool:
    if name == "captions":
        return isinstance(value, list) and bool(value) and all(map(_is_weighted, value))
    return value is None or isinstance(value, float | int if name in _NUMBERS else str)


def _is_weighted(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    text, weight = pair
    return isinstance(text, str) and type(weight) in (int, float) and 0 < weight <= MOST_CAPTION_WEIGHT


@dataclass(frozen=True)
class CaptionRules:
    """How records become texts; the fields are those of the configuration's `captions` section.

    A field of several lines gives one of them: a random one with `several: random` or `wildcards`, else the first; of
    captions with weights one is drawn by its weight, or the first is taken. The order of what is
    done is kohya's (sd-scripts, `process_caption`), with these differences: prefix and suffix go to whichever line is
    chosen; a caption beside tags is one piece, neither cut at its commas nor shuffled nor dropped; empty tags are left
    out; wildcards may be nested.
    """

    use: Literal["caption", "tags", "both", "mix"] = "caption"
    caption_probability: float = 0.5
    both_order: Literal["caption_first", "tags_first"] = "caption_first"
    both_separator: str = _JOINT
    prefix: str = ""
    suffix: str = ""
    several: Literal["first", "random"] = "first"
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    tag_separator: str = ","
    secondary_separator: str | None = None
    tag_dropout_rate: float = 0.0
    tag_groups: tuple[TagGroup, ...] = ()
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    settled: bool = False
    """Nothing is random: nothing is dropped, tags stay in their order, and of several choices the first is taken."""

    @property
    def is_random(self) -> bool:
        """Whether a record may give another text at another draw or in another epoch."""
        mixes = self.use == "mix" and 0 < self.caption_probability < 1
        drops = self.dropout_rate > 0 or self.dropout_every_n_epochs > 0
        cuts = self.shuffle_tags or self.tag_dropout_rate > 0 or any(group.is_random for group in self.tag_groups)
        return not self.settled and (mixes or drops or self.draws_one or cuts)

    @property
    def draws_one(self) -> bool:
        """Whether one of several captions or lines is drawn."""
        return not self.settled and (self.wildcards or self.several == "random")

    @property
    def cuts_tags(self) -> bool:
        """Whether tags are handled one by one."""
        return self.shuffle_tags or self.tag_dropout_rate > 0 or bool(self.tag_groups)

    def as_settled(self) -> "CaptionRules":
        """The same without anything random, as validation and sample prompts use it."""
        return replace(self, settled=True)


PLAIN = CaptionRules()
"""The caption as it is, or the tags where there is none."""


def compose(record_json: str | bytes, rules: CaptionRules, seed: int, epoch: int) -> str:
    """The text of one sample: a function of the arguments alone, on every machine and in every version.

    Args:
        record_json: what `caption_record` gave; null stands for a missing field as well.
        seed: of this draw of the sample; not used where the rules are not random.
        epoch: counted from 0, but as users count, from 1, for `dropout_every_n_epochs`.
    """
    if not rules.settled and _is_dropped(rules, seed, epoch):
        return ""
    caption, tags = _chosen_fields(json.loads(record_json), rules, seed)
    caption = _one_line(caption, rules, seed, b"caption line")
    tags = _one_line(tags, rules, seed, b"tags line")
    prefix, suffix = rules.prefix, rules.suffix
    if rules.wildcards:
        caption = _expanded(caption, rules, seed, b"caption wildcards")
        tags = _expanded(tags, rules, seed, b"tags wildcards")
        prefix = _expanded(prefix, rules, seed, b"prefix wildcards")
        suffix = _expanded(suffix, rules, seed, b"suffix wildcards")
    if rules.cuts_tags:
        text = _with_cut_tags(prefix, caption, tags, suffix, rules, seed)
    else:
        text = _joined(prefix, _in_order(caption, tags, rules, rules.both_separator), suffix)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.tag_separator)
    return text.strip()


def _is_dropped(rules: CaptionRules, seed: int, epoch: int) -> bool:
    if rules.dropout_rate > 0 and draw_words(seed, b"dropout", 1)[0] < rules.dropout_rate * 2**32:
        return True
    return rules.dropout_every_n_epochs > 0 and (epoch + 1) % rules.dropout_every_n_epochs == 0


def _chosen_fields(record: dict[str, Any], rules: CaptionRules, seed: int) -> tuple[str, str]:
    """The caption and the tags to use, either maybe empty; the one stands in where the other is missing."""
    caption, tags = _caption(record, rules, seed).strip(), (record.get("tags") or "").strip()
    use = rules.use
    if use == "both" or not caption or not tags:
        return caption, tags
    if use == "mix":
        draw = 0 if rules.settled else draw_words(seed, b"mix", 1)[0]
        use = "caption" if draw < rules.caption_probability * 2**32 else "tags"
    return (caption, "") if use == "caption" else ("", tags)


def _caption(record: Mapping[str, Any], rules: CaptionRules, seed: int) -> str:
    """The record's caption, or one of its captions."""
    captions = record.get("captions")
    if not captions:
        return record.get("caption") or ""
    if not rules.draws_one:
        return captions[0][0]
    # Additions and a product of the same numbers in the same order: equal on every machine.
    left = draw_words(seed, b"caption", 1)[0] / 2**32 * math.fsum(weight for _, weight in captions)
    for text, weight in captions:
        left -= weight
        if left < 0:
            return text
    return captions[-1][0]


def _one_line(text: str, rules: CaptionRules, seed: int, purpose: bytes) -> str:
    if "\n" not in text:
        return text
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if rules.draws_one:
        return lines[draw_words(seed, purpose, 1)[0] * len(lines) >> 32]
    return lines[0]


def _expanded(text: str, rules: CaptionRules, seed: int, purpose: bytes) -> str:
    count = count_groups(text)
    return expand(text, draw_words(seed, purpose, count) if count and not rules.settled else (0,) * count)


def _in_order(caption: str, tags: str, rules: CaptionRules, separator: str) -> str:
    if not caption or not tags:
        return caption or tags
    first, second = (caption, tags) if rules.both_order == "caption_first" else (tags, caption)
    return f"{first}{separator}{second}"


def _joined(prefix: str, text: str, suffix: str) -> str:
    return " ".join(part for part in (prefix, text, suffix) if part)


def _with_cut_tags(prefix: str, caption: str, tags: str, suffix: str, rules: CaptionRules, seed: int) -> str:
    """The text with its tags shuffled, those of groups in their place, and some left out."""
    tags = tags.replace(_MARK, "")
    text = _joined(prefix, _in_order(caption and _MARK, tags, rules, rules.tag_separator), suffix)
    head, loose, tail, is_marked = _cut(text, rules)
    if caption:
        at = next((i for i, tag in enumerate(loose) if _MARK in tag), None)
        if not tags:
            head, loose = head + loose, []
        elif at is not None and rules.both_order == "caption_first":
            head, loose = head + loose[: at + 1], loose[at + 1 :]
        elif at is not None:
            loose, tail = loose[:at], loose[at:] + tail
    if rules.keep_tokens and not is_marked:
        head, loose = head + loose[: rules.keep_tokens], loose[rules.keep_tokens :]
    if rules.tag_groups:
        grouped, free = taken_out(loose, rules.tag_groups, None if rules.settled else seed)
        head, loose, tail = head + grouped["first"], free, grouped["last"] + tail
    if not rules.settled:
        if rules.shuffle_tags:
            loose = _shuffled(loose, seed)
        if rules.tag_dropout_rate > 0:
            limit = rules.tag_dropout_rate * 2**32
            draws = draw_words(seed, b"tag dropout", len(loose))
            loose = [tag for tag, draw in zip(loose, draws, strict=True) if draw >= limit]
    text = _JOINT.join(head + loose + tail)
    if caption and tags:
        between = (_MARK, _JOINT) if rules.both_order == "caption_first" else (_JOINT, _MARK)
        text = text.replace("".join(between), "".join(between).replace(_JOINT, rules.both_separator), 1)
    return text.replace(_MARK, caption) if caption else text


def _cut(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str], bool]:
    """The tags before, between and after the keep separators, and whether there was one."""
    mark, separator = rules.keep_tokens_separator, rules.tag_separator
    if mark is None or mark not in text:
        return [], _tags(text, separator), [], False
    head, _, rest = text.partition(mark)
    loose, _, tail = rest.partition(mark)
    return _tags(head, separator), _tags(loose, separator), _tags(tail, separator), True


def _tags(text: str, separator: str) -> list[str]:
    return [*filter(None, map(str.strip, text.split(separator)))]


def _shuffled(tags: list[str], seed: int) -> list[str]:
    """Fisher and Yates' shuffle; that 2^32 is no multiple of the number of tags shifts no chance by 1e-7."""
    tags = tags.copy()
    for i, draw in enumerate(draw_words(seed, b"shuffle", len(tags))):
        j = draw * (i + 1) >> 32
        tags[i], tags[j] = tags[j], tags[i]
    return tags
