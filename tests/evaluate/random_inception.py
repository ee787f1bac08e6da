"""Weights of FID's Inception network drawn at random, in the names and the form of its published file."""

from pathlib import Path

import torch

from trainer.evaluate.quality.inception import FidInception


def write_random_inception(path: Path, classes: int = 1008) -> Path:
    """A checkpoint of torch whose features of different images differ."""
    torch.manual_seed(11)
    state = {}
    for name, tensor in FidInception().state_dict().items():
        if name.endswith("conv.weight"):  # He et al. 2015, so that values keep their size from layer to layer
            state[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape) + 0.5
        elif name.endswith("bn.weight"):
            state[name] = torch.rand(tensor.shape) * 0.5 + 0.75
        else:
            state[name] = torch.randn(tensor.shape) * 0.1
    state |= {"fc.weight": torch.randn(classes, 2048) * 0.02, "fc.bias": torch.zeros(classes)}
    torch.save(state, path)
    return path
