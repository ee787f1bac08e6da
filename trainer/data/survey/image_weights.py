"""From the sources of a run and its `objective.loss_weights` to the weight of each image of the prepared set."""

import os
from collections.abc import Iterator, Sequence

from trainer.config.sections.data.sources import Source
from trainer.config.sections.objective_config import LossWeightsConfig
from trainer.data.loss_weights import LossWeights, TagBalance, TagSeparators
from trainer.data.sources.listing import source_names
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.tag_counts import Report, TagCounts, balanced, tag_counts
from trainer.data.survey.tag_file import read_tag_file
from trainer.errors import UserError

_WEIGHT_KEYS = ("weight_extension", "weight_field", "weight_column")
_COUNTERS = 8
_SHOWN = 3


def weighs_images(sources: Sequence[Source], section: LossWeightsConfig) -> bool:
    """Whether any image may count more or less than another."""
    by_source = any(weight_of(source, section) != 1 for source in sources)
    return by_source or section.weighs_tags or (section.per_image and holds_weights(sources))


def weight_of(source: Source, section: LossWeightsConfig) -> float:
    """What each image of a source counts."""
    return section.prior if source.prior else source.loss_weight


def holds_weights(sources: Sequence[Source]) -> bool:
    """Whether any source says where its images' own weights stand."""
    return any(getattr(source, key, None) is not None for source in sources for key in _WEIGHT_KEYS)


def image_weights(
    sources: Sequence[Source], section: LossWeightsConfig, separators: TagSeparators, prepared: PreparedSet
) -> LossWeights | None:
    """The weights of a run over a prepared set; None where all images count the same.

    Counts the set's tags where that was not done yet.

    Raises:
        UserError: the tags' weights have no effect, or their file cannot be read.
    """
    if not weighs_images(sources, section):
        return None
    listed = balance = None
    if section.weighs_tags:
        listed, balance = weights_of_tags(section, counted(prepared, separators), prepared)
    per_image = section.per_image and holds_weights(sources)
    return LossWeights(_of_sources(sources, section), per_image, listed, balance, separators)


def counted(prepared: PreparedSet, separators: TagSeparators, report: Report = lambda images: None) -> TagCounts:
    """The counts of the set's tags, on all cores where they were not kept."""
    return tag_counts(prepared, separators, min(_COUNTERS, len(os.sched_getaffinity(0))), report)


def weights_of_tags(
    section: LossWeightsConfig, counts: TagCounts, prepared: PreparedSet
) -> tuple[dict[str, float] | None, TagBalance | None]:
    """The weights that the file lists, and those that balance the tags; None for what is not asked for.

    Raises:
        UserError: no image has tags, or none of those that the file lists.
    """
    power, listed = section.tag_balance.power, None
    if not counts.images:
        asked = f"tag_balance.power = {power}" if power else f"tag_file = {section.tag_file}"
        raise UserError(
            f"objective.loss_weights.{asked}: has no effect; no image of {prepared.path} has tags: if the caption "
            "files hold tags, write `caption_files_hold: tags`"
        )
    if section.tag_file is not None:
        listed = read_tag_file(section.tag_file)
        if not listed.keys() & counts.images.keys():
            raise UserError(
                f"objective.loss_weights.tag_file = {section.tag_file}: has no effect; no image of {prepared.path} has "
                f"any of its tags, such as {_some(listed)}; the most usual tags there are {_usual(counts)}"
            )
    balance = balanced(counts, power, section.tag_balance.min, section.tag_balance.max) if power else None
    return listed, balance


def describe_tags(section: LossWeightsConfig, counts: TagCounts, prepared: PreparedSet) -> Iterator[str]:
    """What was found of the tags, in lines for people; raises as `weights_of_tags` does."""
    listed, balance = weights_of_tags(section, counts, prepared)
    images = counts.tagged + counts.untagged
    yield (
        f"tags: {len(counts.images):,} different ones, {counts.untagged / images:.1%} of {images:,} images an epoch "
        "have none"
    )
    if balance:
        least = min(balance.common.values(), default=balance.rare)
        yield (
            f"  balanced with power {section.tag_balance.power:g}: the typical tag is on {counts.typical_count:,} "
            f"images; tags weigh {least:.3g} to {balance.rare:.3g}, images 1 on average"
        )
    if listed:
        unknown = [tag for tag in listed if tag not in counts.images]
        rest = f"; {len(unknown):,} are on no image, such as {_some(unknown)}" if unknown else ""
        yield f"  {section.tag_file}: weights of {len(listed):,} tags{rest}"


def describe_loss_weights(sources: Sequence[Source], section: LossWeightsConfig) -> list[str]:
    """What weighs images, in a line for people; none where all count the same."""
    if not weighs_images(sources, section):
        return []
    names = source_names(tuple(sources))
    parts = [
        f"{name} {weight_of(source, section):g}{' (prior)' if source.prior else ''}"
        for source, name in zip(sources, names, strict=True)
        if weight_of(source, section) != 1
    ]
    if section.per_image and holds_weights(sources):
        parts.append("images' own weights")
    if section.tag_file is not None:
        parts.append(f"tags as in {section.tag_file}")
    if section.tag_balance.power:
        parts.append(f"tags balanced by their counts with power {section.tag_balance.power:g}")
    return [f"  loss weights: {'; '.join(parts)}"]


def _of_sources(sources: Sequence[Source], section: LossWeightsConfig) -> dict[str, float]:
    """The weights that are not 1, by the name that keys begin with."""
    weights: dict[str, float] = {}
    for source, name in zip(sources, source_names(tuple(sources)), strict=True):
        weight = weight_of(source, section)
        if weights.setdefault(name, weight) != weight:
            raise UserError(
                f"data.sources: the images of two sources have keys that begin with {name}/ and cannot be told apart; "
                "rename a folder to give them different loss weights"
            )
    return {name: weight for name, weight in weights.items() if weight != 1}


def _some(tags: Sequence[str] | dict[str, float]) -> str:
    return ", ".join(f"'{tag}'" for tag in [*tags][:_SHOWN])


def _usual(counts: TagCounts) -> str:
    return _some(sorted(counts.images, key=lambda tag: (-counts.images[tag], tag)))
