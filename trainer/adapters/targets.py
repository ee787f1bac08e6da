"""Which layers of the model an adapter changes: kohya's choice, or what the user's patterns mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import translate
from typing import NamedTuple

from torch import nn

from trainer.adapters.adapter_names import Place
from trainer.config.sections.adapter_config import AdapterConfig, changes_convolutions
from trainer.config.spelling import nearest
from trainer.errors import UserError

_TRANSFORMERS = ("Transformer2DModel", "CLIPAttention", "CLIPMLP")
_CONVOLUTIONAL = ("ResnetBlock2D", "Downsample2D", "Upsample2D")


class Target(NamedTuple):
    """A layer that is changed; `is_conv`: a convolution larger than 1 x 1."""

    place: Place
    is_conv: bool


def find_targets(
    parts: Mapping[str, nn.Module], config: AdapterConfig, original: Mapping[str, str], unused: frozenset[str]
) -> list[Target]:
    """The layers that `config` means, in the order of the model.

    Args:
        parts: those of the model that may be changed, by name.
        original: the UNet's modules in the original checkpoint's terms.
        unused: modules of the first text encoder that nothing depends on.
    Raises:
        UserError: a pattern means no layer.
    """
    candidates = [target for part, module in parts.items() for target in _candidates(part, module, config, unused)]
    if not config.targets:
        return candidates
    chosen: list[Target] = []
    matchers = {pattern: _matcher(pattern) for pattern in config.targets}
    idle = dict.fromkeys(config.targets)
    for target in candidates:
        part, module = target.place
        names = (module, f"{part}.{module}", *((original[module],) if part == "unet" and module in original else ()))
        meant = [pattern for pattern, match in matchers.items() if any(match.match(name) for name in names)]
        for pattern in meant:
            idle.pop(pattern, None)
        if meant:
            chosen.append(target)
    if idle:
        wrong = next(iter(idle))
        known = {n for t in candidates for n in (t.place.module, original.get(t.place.module, ""), ".".join(t.place))}
        offer = nearest(wrong, {name.rsplit(".", cut)[0] for name in known if name for cut in range(5)})
        meant = f"; did you mean `{offer}`?" if offer else ""
        raise UserError(f"adapter.targets: `{wrong}` is the beginning of no layer that can be changed{meant}")
    return chosen


def _candidates(part: str, module: nn.Module, config: AdapterConfig, unused: frozenset[str]) -> Iterator[Target]:
    wide, anywhere = changes_convolutions(config), bool(config.targets)
    holders = (*_TRANSFORMERS, *(_CONVOLUTIONAL if wide else ()))
    inside = {
        f"{holder}.{name}"
        for holder, each in module.named_modules()
        if type(each).__name__ in holders
        for name, _ in each.named_modules()
    }
    for name, layer in module.named_modules():
        if (name not in inside and not anywhere) or (part == "text_encoder_1" and name in unused):
            continue
        if isinstance(layer, nn.Linear):
            yield Target(Place(part, name), is_conv=False)
        elif isinstance(layer, nn.Conv2d) and wide:
            yield Target(Place(part, name), is_conv=tuple(layer.kernel_size) != (1, 1))


def _matcher(pattern: str) -> re.Pattern[str]:
    """Whole names, or beginnings that end before a dot."""
    return re.compile(f"{translate(pattern)}|{translate(pattern.rstrip('.') + '.*')}")
