"""The Inception-v3 network that FID is defined by, as its published weights have it; PyTorch alone.

Szegedy et al. 2016 (arXiv 1512.00567), in the TensorFlow graph of 2015-12-05 that Heusel et al. 2017 took. It departs
from the paper, and from torchvision's network of the same layers, in three places: average pooling counts no padding,
the last block pools by the maximum, and there are 1008 classes. Libraries that have it need torchvision.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_Kernel = int | tuple[int, int]
_Conv = tuple[int, _Kernel]  # channels that come out, and the kernel's height and width
_WIDE, _HIGH = (1, 7), (7, 1)


class _StoredNorm(nn.Module):
    """Batch normalization at rest, without the counter of training, which not every file of weights has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(x, mean, var, self.weight, self.bias, eps=0.001)


class _ConvUnit(nn.Module):
    """Convolution, normalization by stored statistics, ReLU."""

    def __init__(self, channels: int, out: int, kernel: _Kernel, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if padded else 0
        self.conv = nn.Conv2d(channels, out, size, stride, padding, bias=False)
        self.bn = _StoredNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches beside one another whose channels are joined, the pooled one at the end.

    Args:
        branches: the convolutions of each, by its name in the weights.
        forks: whether the 3x3 branches end in two convolutions side by side, over rows and over columns.
        pool: `average` and `maximum` keep the size, and are followed by a convolution to `pooled` channels; `half`:
            every branch halves the size by its last step, and the pooled one has no convolution.
    """

    def __init__(
        self, channels: int, branches: Mapping[str, Sequence[_Conv]], pool: str, pooled: int = 0, forks: bool = False
    ) -> None:
        super().__init__()
        self._pool, self._plan = pool, list[tuple[list[str], list[str]]]()
        for name, convs in branches.items():
            chain, ends, before = list[str](), list[str](), channels
            fork = forks and name != "branch1x1"
            for place, (out, kernel) in enumerate(convs, 1):
                chain.append(f"{name}_{place}" if len(convs) > 1 or fork else name)
                halves = pool == "half" and place == len(convs)
                self.add_module(chain[-1], _ConvUnit(before, out, kernel, 2 if halves else 1, not halves))
                before = out
            for letter, kernel in (("a", (1, 3)), ("b", (3, 1))) if fork else ():
                ends.append(f"{name}_{len(convs) + 1}{letter}")
                self.add_module(ends[-1], _ConvUnit(before, 384, kernel))
            self._plan.append((chain, ends))
        self.branch_pool = _ConvUnit(channels, pooled, 1) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain, ends in self._plan:
            y = x
            for name in chain:
                y = self.get_submodule(name)(y)
            found += [self.get_submodule(name)(y) for name in ends] or [y]
        if self._pool == "half":
            pooled = functional.max_pool2d(x, 3, 2)
        elif self._pool == "maximum":
            pooled = functional.max_pool2d(x, 3, 1, 1)
        else:
            pooled = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*found, self.branch_pool(pooled) if self.branch_pool else pooled], dim=1)


def _block_5(channels: int, pooled: int) -> _Block:
    branches = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return _Block(channels, branches, "average", pooled)


def _block_6(inner: int) -> _Block:
    double = [(inner, 1), (inner, _HIGH), (inner, _WIDE), (inner, _HIGH), (192, _WIDE)]
    single = [(inner, 1), (inner, _WIDE), (192, _HIGH)]
    return _Block(768, {"branch1x1": [(192, 1)], "branch7x7": single, "branch7x7dbl": double}, "average", 192)


def _block_7(channels: int, pool: str) -> _Block:
    branches = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1)], "branch3x3dbl": [(448, 1), (384, 3)]}
    return _Block(channels, branches, pool, 192, forks=True)


class FidInception(nn.Module):
    """[n, 3, 299, 299] of levels from 0 to 255 to features [n, 2048]: the last layer before the classes, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvUnit(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = _ConvUnit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = _ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = _ConvUnit(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_5(192, 32), _block_5(256, 64), _block_5(288, 64)
        halved = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
        self.Mixed_6a = _Block(288, halved, "half")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_block_6, (128, 160, 160, 192))
        halved = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, _WIDE), (192, _HIGH), (192, 3)]}
        self.Mixed_7a = _Block(768, halved, "half")
        self.Mixed_7b, self.Mixed_7c = _block_7(1280, "average"), _block_7(2048, "maximum")

    def forward(self, levels: Tensor) -> Tensor:
        """Features; the network is meant to be in `eval` mode."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3((levels - 128) / 128)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = functional.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))
