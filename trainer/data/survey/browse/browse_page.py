"""The page: one HTML file that holds its pictures, style and script, and that may ask no network for anything."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib import resources

import numpy as np

from trainer.data.survey.browse.gallery_html import filters, gallery_items, near_duplicate_list
from trainer.data.survey.browse.page_facts import PageFacts
from trainer.data.survey.browse.page_parts import (
    Bar,
    bar_table,
    count,
    histogram,
    percent,
    shown_text,
)
from trainer.data.survey.stats import BucketCounts

_OPEN_BUCKETS, _MOST_BUCKETS = 16, 400
_OPEN_SOURCES, _MOST_SOURCES = 16, 400
_MOST_REASONS = 100
_OPEN_TAGS = 15
_MARK = re.compile(r"\{\{(\w+)\}\}")


def page_html(facts: PageFacts) -> str:
    """The whole page of what was gathered."""
    style, script = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": style,
        "script": script,
        "title": shown_text(facts.prepared, 300).removeprefix("<bdi>").removesuffix("</bdi>"),
        "prepared": shown_text(facts.prepared, 300),
        "snapshot": shown_text(facts.snapshot),
        "tiles": _tiles(facts),
        "buckets": _buckets(facts),
        "sources": _sources(facts),
        "captions": _captions(facts),
        "tags": _tags(facts),
        "left_out": _left_out(facts),
        "duplicates": near_duplicate_list(facts),
        "gallery_note": _gallery_note(facts),
        "filters": filters(facts),
        "gallery": gallery_items(facts),
    }
    return _filled(_file("page.html"), parts)


def _file(name: str) -> str:
    return resources.files("trainer.data.survey.browse").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """In one pass: what is put in is not looked through."""
    replace: Callable[[re.Match[str]], str] = lambda mark: parts[mark[1]]  # noqa: E731
    return _MARK.sub(replace, template)


def _tiles(facts: PageFacts) -> str:
    train, validation = facts.images
    per_epoch = sum(bucket.per_epoch for bucket in _main_buckets(facts))
    tiles = [("training images", count(train))]
    if per_epoch != train:
        tiles.append(("seen in an epoch, with repeats", count(per_epoch)))
    if validation:
        tiles.append(("held out for validation", count(validation)))
    tiles.append(("buckets", count(len({bucket.bucket for bucket in facts.buckets}))))
    if facts.sources is not None:
        tiles.append(("sources", count(len(facts.sources))))
    tiles.append(("left out", count(sum(part.images for part in facts.left_out))))
    return "".join(f"<div><dd>{number}</dd><dt>{name}</dt></div>" for name, number in tiles)


def _main_buckets(facts: PageFacts) -> list[BucketCounts]:
    return [bucket for bucket in facts.buckets if bucket.split == "train" and bucket.is_main]


def _buckets(facts: PageFacts) -> str:
    buckets = sorted(_main_buckets(facts), key=lambda b: (-b.images, b.bucket))
    repeated = any(bucket.per_epoch != bucket.images for bucket in buckets)
    bars = [
        Bar(
            f"{bucket.bucket.width_px} × {bucket.bucket.height_px}",
            (bucket.images, bucket.per_epoch) if repeated else (bucket.images,),
        )
        for bucket in buckets
    ]
    heads = ["width × height, px", "images", *(["per epoch"] if repeated else [])]
    held = sum(bucket.images for bucket in facts.buckets if bucket.split != "train")
    note = (
        f"<p>{count(held)} more {'images are' if held > 1 else 'image is'} held out for validation.</p>" if held else ""
    )
    for resolution in sorted({bucket.resolution for bucket in facts.buckets} - {0}):
        ours = [bucket for bucket in facts.buckets if bucket.resolution == resolution]
        images, shapes = sum(bucket.images for bucket in ours), len(ours)
        note += f"<p>{count(images)} of them are held at {resolution} px as well, in {count(shapes)} buckets.</p>"
    return note + _folded("Training images by bucket", heads, bars, facts.images[0], _OPEN_BUCKETS, _MOST_BUCKETS)


def _sources(facts: PageFacts) -> str:
    if facts.sources is None:
        return (
            "<p>This snapshot was made before sources were counted; the next <code>prepare</code> that changes "
            "anything counts them.</p>"
        )
    repeated = any(source.per_epoch != source.images for source in facts.sources)
    bars = [
        Bar(source.name, (source.images, source.per_epoch) if repeated else (source.images,))
        for source in facts.sources
    ]
    heads = ["source", "images", *(["per epoch"] if repeated else [])]
    return _folded("Training images by source", heads, bars, facts.images[0], _OPEN_SOURCES, _MOST_SOURCES)


def _folded(caption: str, heads: list[str], bars: list[Bar], whole: int, shown: int, most: int) -> str:
    """The first of many bars, with the others below when they are asked for."""
    html = bar_table(caption, heads, bars[:shown], "images", whole)
    if rest := bars[shown:most]:
        table = bar_table(f"{caption}, the others", heads, rest, "images", whole)
        html += f"<details><summary>{count(len(bars) - shown)} more</summary>{table}"
        if beyond := bars[most:]:
            images = sum(bar.numbers[0] for bar in beyond)
            html += f"<p>and {count(len(beyond))} more with {count(images)} images</p>"
        html += "</details>"
    return html


def _captions(facts: PageFacts) -> str:
    texts, unit, used = facts.texts, facts.measure.unit, facts.measure.used
    sampled = len(texts.lengths)
    if not sampled:
        return "<p>No caption can be read.</p>"
    of = f"all {count(sampled)}" if sampled == texts.rows else f"a sample of {count(sampled)} of {count(texts.rows)}"
    median, most = np.quantile(texts.lengths, 0.5), texts.lengths.max()
    said = [
        f"half are longer than {count(median)}",
        f"the longest has {count(most)}",
        f"{percent((texts.lengths == 0).sum(), sampled)} are empty",
    ]
    if used:
        said.append(f"{percent((texts.lengths > used).sum(), sampled)} are longer than the {used} that are used")
    lost = f" {count(texts.unreadable)} of them cannot be read." if texts.unreadable else ""
    return (
        f"<p>Length in {shown_text(unit)} of {of} texts, as they are trained, without anything random.{lost}</p>"
        f"{histogram(texts.lengths, unit.partition(' (')[0], used)}<p>{'; '.join(said).capitalize()}.</p>"
    )


def _tags(facts: PageFacts) -> str:
    tags = facts.tags
    if tags.problem:
        return f"<p>{shown_text(tags.problem)}</p>"
    if not tags.different:
        return (
            "<p>No image has tags. Where caption files hold tags, write <code>caption_files_hold: tags</code> for "
            "their source.</p>"
        )
    of = f"a sample of {count(tags.looked_at)}" if tags.is_sample else f"all {count(tags.looked_at)}"
    few = [
        f"{count(number)} on {'one image' if most == 1 else f'at most {most} images'}"
        for most, number in tags.few
        if number
    ]
    told = f" Rare ones: {', '.join(few)}." if few else ""
    note = (
        f"<p>{count(tags.different)} different tags on {percent(tags.tagged, tags.looked_at)} of {of} images, "
        f"repeats counted.{told}</p>"
    )
    tables = [
        f"<div>{_folded(title, ['tag', 'images'], [Bar(t, (n,)) for t, n in found], 0, _OPEN_TAGS, len(found))}</div>"
        for title, found in (("The most common tags", tags.top), ("The rarest tags", tags.rare))
        if found
    ]
    return f'{note}<div class="pair">{"".join(tables)}</div>'


def _left_out(facts: PageFacts) -> str:
    if not facts.left_out:
        return "<p>Nothing was left out.</p>"
    rows = "".join(
        f'<tr><td class="number">{count(part.images)}</td><td class="reason">{shown_text(part.reason, 300)}</td>'
        f'<td class="examples">{", ".join(shown_text(example, 120) for example in part.examples)}</td>'
        f"<td>{shown_text(part.file)}</td></tr>"
        for part in facts.left_out[:_MOST_REASONS]
    )
    rest = facts.left_out[_MOST_REASONS:]
    more = f"<p>and {count(len(rest))} more reasons</p>" if rest else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="What was left out"><table class="plain"><thead><tr>'
        '<th scope="col" class="number">images</th><th scope="col">reason</th><th scope="col">such as</th>'
        f'<th scope="col">listed in</th></tr></thead><tbody>{rows}</tbody></table></div>{more}'
    )


def _gallery_note(facts: PageFacts) -> str:
    shown, of = len(facts.gallery), facts.images[0]
    what = f"All {count(of)} training images" if shown == of else f"A sample: {count(shown)} of {count(of)} images"
    latents = sum(image.thumbnail is not None and image.thumbnail.from_latents for image in facts.gallery)
    spread = "" if shown == of else ", as many of each bucket and source"
    note = f"{what}{spread}; each as training crops it, with the whole image and the crop beside it where it is known."
    if latents:
        note += (
            f" {count(latents)} pictures are made of the latents, by a linear approximation of SDXL's VAE: their "
            "colours are about right, details are missing."
        )
    return f"<p>{note}</p>"
