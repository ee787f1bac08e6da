"""How fast each weight of a part trains, if it does, by the part's section of the configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.config.sections.trainable_config import TextEncoderPart, UnetPart
from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.model.freeze import frozen_names, meant_by
from trainer.model.selection.model_blocks import Blocks
from trainer.model.selection.unet_presets import preset_names


@dataclass(frozen=True)
class Rate:
    """What a weight's learning rate and weight decay are times those of its part."""

    lr_scale: float = 1.0
    decay_scale: float = 1.0


@dataclass(frozen=True)
class PartNames:
    """The weights of a part by name.

    Attributes:
        key: of the part in the configuration, such as `trainable.unet`.
        names: of all weights; of text encoders without `text_model.` before them.
        original: the same in the original checkpoint's terms, where these differ.
        blocks: of these weights.
        unused: weights that can have no gradients.
    """

    key: str
    names: Sequence[str]
    blocks: Blocks
    original: Mapping[str, str] = field(default_factory=dict)
    unused: Collection[str] = ()


def weight_rates(part: TextEncoderPart, named: PartNames) -> dict[str, Rate]:
    """The rates of the weights that train, by name, in the order of all names; {} of a part that does not train.

    A weight trains if the preset has it, `only` means it, `freeze` does not, and its learning rate is above 0.

    Raises:
        UserError: a pattern means nothing, or nothing that it could be for, or nothing is left to train.
    """
    if not part.train:
        return {}
    chosen, last = _chosen(part, named)
    scales: dict[str, float] = {}
    trained = [name for name in named.names if name in chosen]
    if trained:
        scales = _last_that_means(part.lr_scale, trained, named, "lr_scale")
        trained = [name for name in trained if scales.get(name, 1.0)]
        last = last if trained else "lr_scale"
    if not trained:
        raise UserError(f"{named.key}.{last}: leaves nothing to train; write `{named.key}.train: false`")
    decays = _last_that_means(part.weight_decay_scale, trained, named, "weight_decay_scale")
    rates = {}
    for name in trained:
        from_output = named.blocks.from_output[named.blocks.of[name]]
        scale = scales.get(name, 1.0) * part.layer_decay**from_output
        rates[name] = Rate(scale, decays.get(name, 1.0))
    return rates


def _chosen(part: TextEncoderPart, named: PartNames) -> tuple[set[str], str]:
    """By preset, `only` and `freeze`; and the last of these keys that was given."""
    chosen, last = {*named.names} - {*named.unused}, "freeze"
    if isinstance(part, UnetPart) and part.preset != "all":
        of_preset, missing = preset_names(part.preset, named.names, named.original, named.blocks)
        if missing:
            line = f"{named.key}.preset = {part.preset}: is for SDXL's UNet; this one has no `{missing[0]}`"
            raise UserError(line)
        chosen, last = chosen & of_preset, "preset"
    if part.only:
        chosen, last = chosen & _named(part.only, named, "only"), "only"
    if part.freeze:
        chosen, last = chosen - _named(part.freeze, named, "freeze"), "freeze"
    return chosen, last


def _named(patterns: Sequence[str], named: PartNames, option: str) -> set[str]:
    meant, idle = frozen_names(named.names, patterns, named.original)
    if idle:
        raise _means_nothing(idle[0], named, option)
    return meant


def _last_that_means(
    scales: Mapping[str, float], trained: Sequence[str], named: PartNames, option: str
) -> dict[str, float]:
    """The number of the last pattern that means a weight, for those that train and that any pattern means."""
    found, deciding, among = dict[str, float](), dict[str, str](), {*trained}
    for pattern, meant in meant_by(named.names, scales, named.original).items():
        if not meant:
            raise _means_nothing(pattern, named, option)
        if not meant & among:
            raise UserError(f"{named.key}.{option}: `{pattern}` means only weights that do not train")
        for name in meant & among:
            found[name], deciding[name] = scales[pattern], pattern
    idle = [pattern for pattern in scales if pattern not in deciding.values()]
    if idle:
        rule = "counts for no weight, for patterns after it mean all of its own; write the general ones first"
        raise UserError(f"{named.key}.{option}: `{idle[0]}` {rule}")
    return found


def _means_nothing(pattern: str, named: PartNames, option: str) -> UserError:
    names = (*named.names, *named.original.values())
    offers = {name.rsplit(".", cut)[0] for name in names for cut in range(1, 6)}
    offers |= {word for name in names for word in name.split(".") if not word.isdecimal()}
    offer = nearest(pattern, offers)
    mend = f"; did you mean `{offer}`?" if offer else ""
    return UserError(f"{named.key}.{option}: `{pattern}` is the beginning of no weight's name{mend}")
