"""Tensors of a checkpoint that its writers could get wrong."""

import torch
from torch import Tensor


def odd_tensors() -> dict[str, Tensor]:
    """Of several widths, a scalar, an empty one, and one that is larger than a piece."""
    generator = torch.Generator().manual_seed(1)
    return {
        "large": torch.randn(301, 35, generator=generator),
        "half": torch.randn(77, 3, generator=generator).to(torch.bfloat16),
        "bytes": torch.randint(0, 255, (1001,), generator=generator, dtype=torch.uint8),
        "scalar": torch.tensor(5.0),
        "empty": torch.zeros(0, 4),
        "channels": torch.randn(9, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "one row": torch.randn(1, 50, generator=generator),
    }
