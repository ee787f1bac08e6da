"""Which block of the model each gradient belongs to, for norms by block."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.parallel.strategy import Strategy


@dataclass(frozen=True, eq=False)
class GradientBlocks:
    """The blocks of what trains.

    Attributes:
        names: such as `unet.down_blocks.1`, `text_encoder_1.encoder.layers.3`.
        index: of each trained parameter's block among them, [parameters] int64 on the gradients' device.
    """

    names: tuple[str, ...]
    index: Tensor

    def of(self, present: Iterable[bool]) -> Tensor:
        """The index of the parameters that have a gradient."""
        there = list(present)
        return self.index if all(there) else self.index[torch.tensor(there, device=self.index.device)]


def gradient_blocks(strategy: Strategy, device: torch.device) -> GradientBlocks:
    """Blocks by name: down to the first number in a parameter's name, or its first two words where there is none."""
    of_parameters = [_block_of(name) for name in strategy.parameters]
    names = tuple(dict.fromkeys(of_parameters))
    return GradientBlocks(names, torch.tensor([names.index(name) for name in of_parameters], device=device))


def _block_of(parameter: str) -> str:
    words = parameter.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdecimal()]
    in_the_middle = len(words) > 1 and words[1] == "mid_block"
    return ".".join(words[: numbers[0] + 1] if numbers and not in_the_middle else words[:2])
