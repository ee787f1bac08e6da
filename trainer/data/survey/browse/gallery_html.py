"""The gallery of a page in HTML, its filters, and the groups of pictures that look alike."""

import base64
from collections.abc import Iterable
from html import escape
from typing import TypeVar

from trainer.data.buckets import Bucket
from trainer.data.survey.browse.gallery import GalleryImage
from trainer.data.survey.browse.page_facts import PageFacts
from trainer.data.survey.browse.page_parts import count, shown_text
from trainer.data.survey.browse.thumbnails import Thumbnail
from trainer.errors import printable

_T = TypeVar("_T", str, Bucket)
_MOST_TEXT = 1500
_OPEN, _MOST_GROUPS, _MOST_OF_A_GROUP = 9, 60, 12


def filters(facts: PageFacts) -> str:
    """The choices of source and bucket, by number."""
    sources = _numbered(image.source for image in facts.gallery)
    buckets = _numbered(image.bucket for image in facts.gallery)
    of_sources = "".join(f'<option value="{n}">{escape(printable(name, 60))}</option>' for name, n in sources.items())
    of_buckets = "".join(f'<option value="{n}">{b.width_px} × {b.height_px}</option>' for b, n in buckets.items())
    return (
        f'<label>Source <select id="source"><option value="">all {len(sources)}</option>{of_sources}</select></label>'
        f'<label>Bucket <select id="bucket"><option value="">all {len(buckets)}</option>{of_buckets}</select></label>'
    )


def gallery_items(facts: PageFacts) -> str:
    """A list item for each image of the gallery."""
    sources = _numbered(image.source for image in facts.gallery)
    buckets = _numbered(image.bucket for image in facts.gallery)
    unit = facts.measure.unit.partition(" (")[0]
    return "\n".join(
        f'<li class="card" id="image-{i}" data-source="{sources[image.source]}" data-bucket="{buckets[image.bucket]}">'
        f"{_card(image, f'{count(length)} {unit}')}</li>"
        for i, (image, length) in enumerate(zip(facts.gallery, facts.gallery_lengths, strict=True))
    )


def near_duplicate_list(facts: PageFacts) -> str:
    """The groups; each picture is a link to its place in the gallery."""
    shown = count(len(facts.gallery))
    if not facts.duplicates:
        return f"<p>No two of the {shown} pictures below look alike, as far as a perceptual hash tells.</p>"
    groups = []
    for group in facts.duplicates[:_MOST_GROUPS]:
        links = "".join(
            f'<a class="twin" href="#image-{i}">{shown_text(facts.gallery[i].key, 80)}</a>'
            for i in group[:_MOST_OF_A_GROUP]
        )
        rest = len(group) - _MOST_OF_A_GROUP
        groups.append(f"<li>{links}{f'<span>and {count(rest)} more</span>' if rest > 0 else ''}</li>")
    first, others = (f'<ul class="twins">{"".join(some)}</ul>' for some in (groups[:_OPEN], groups[_OPEN:]))
    folded = (
        f"<details><summary>{count(len(groups) - _OPEN)} more</summary>{others}</details>" if groups[_OPEN:] else ""
    )
    more = len(facts.duplicates) - _MOST_GROUPS
    note = f"<p>and {count(more)} more groups</p>" if more > 0 else ""
    groups_told = f"{count(len(facts.duplicates))} group{'s' if len(facts.duplicates) > 1 else ''}"
    of_others = "" if len(facts.gallery) == facts.images[0] else "; images that are not shown may have twins as well"
    return (
        f"<p>{groups_told} among the {shown} pictures below that look alike, by a perceptual hash{of_others}.</p>"
        f"{first}{folded}{note}"
    )


def _card(image: GalleryImage, length: str) -> str:
    name = escape(printable(image.key, 200), quote=True)
    if image.thumbnail is None:
        picture = '<span class="crop none">no picture</span>'
    else:
        width, height = image.thumbnail.crop_wh
        picture = (
            f'<img class="crop" src="{_data_url(image.thumbnail.crop)}" width="{width}" height="{height}" '
            f'alt="" decoding="async">'
        )
    text = shown_text(image.text, _MOST_TEXT) if image.text else '<em class="faint">(empty)</em>'
    height_px, width_px = image.original_hw
    bucket = f"{image.bucket.width_px} × {image.bucket.height_px}"
    facts = [
        ("source", shown_text(image.source, 200)),
        ("size", f"{width_px} × {height_px} px, in bucket {bucket}" if height_px else f"in bucket {bucket}"),
        ("length", length),
        ("file", shown_text(image.path, 400) if image.path else "not known"),
        *([("note", shown_text(image.problem, 300))] if image.problem else []),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return (
        f'<button type="button" class="open" aria-label="Enlarge {name}">'
        f'<span class="pictures">{picture}</span></button>'
        f'<div class="about"><p class="key">{shown_text(image.key, 200)}</p><p class="text">{text}</p>'
        f'<dl class="more">{rows}</dl><div class="foot"><span class="size">{bucket}{_flag(image)}</span>'
        f"{_whole(image.thumbnail)}</div></div>"
    )


def _flag(image: GalleryImage) -> str:
    if image.thumbnail is None:
        return ' <span class="flag">unreadable</span>'
    return ' <span class="flag">latents</span>' if image.thumbnail.from_latents else ""


def _whole(thumbnail: Thumbnail | None) -> str:
    """The whole image with its crop drawn, in shares of a thousand; the drawing has the image's shape."""
    if thumbnail is None or thumbnail.whole is None or thumbnail.box is None:
        return ""
    left, top, box_w, box_h = thumbnail.box
    crop_w, crop_h = thumbnail.crop_wh
    width, height = crop_w / box_w, crop_h / box_h  # of the image, in pixels of the crop's picture
    scale = 1000 / max(width, height)
    width, height = width * scale, height * scale
    x, y = left * width, top * height
    return (
        f'<svg class="whole" viewBox="0 0 {width:.0f} {height:.0f}" aria-hidden="true">'
        f'<image href="{_data_url(thumbnail.whole)}" width="{width:.0f}" height="{height:.0f}" '
        'preserveAspectRatio="none"></image>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{box_w * width:.0f}" height="{box_h * height:.0f}"></rect></svg>'
    )


def _data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _numbered(values: Iterable[_T]) -> dict[_T, int]:
    """What there is, in its order."""
    return {value: number for number, value in enumerate(sorted(set(values)))}
