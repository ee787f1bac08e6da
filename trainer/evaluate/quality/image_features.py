"""Features of images by FID's Inception network or by DINOv2, from local weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from trainer.evaluate.quality.feature_model import FeatureModel
from trainer.evaluate.quality.fill_network import fill_network
from trainer.evaluate.quality.inception import FidInception
from trainer.evaluate.quality.inception_file import inception_tensors
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.components import Component, require_unscaled
from trainer.model_files.model_source import open_tensors

_BATCH = 16
_OLD_DINOV2_NAMES = {  # of transformers before 5.20, which are those of all files
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


class ImageFeatures:
    """Features [n, size] float32 on the CPU."""

    def __init__(self, model: FeatureModel, device: torch.device | str, limits: Limits = DEFAULT_LIMITS) -> None:
        """Read the weights, in fp32.

        Raises:
            UserError: they do not fit the network.
        """
        self._of, self._device = model, device
        self.size: int = model.features
        load = _load_dinov2 if model.kind == "dinov2" else _load_inception
        self._network = load(model, device, limits)

    @torch.inference_mode()
    def of_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """[n, size]; images are squeezed into the model's square."""
        found = []
        for begin in range(0, len(images), _BATCH):
            levels = torch.stack([square_levels(each, self._of.image_px) for each in images[begin : begin + _BATCH]])
            found.append(self._features(levels.to(self._device)).cpu())
        return torch.cat(found).numpy()

    def _features(self, levels: Tensor) -> Tensor:
        if self._of.kind == "inception":
            return self._network(levels)
        mean, std = (levels.new_tensor(values)[:, None, None] for values in (self._of.mean, self._of.std))
        output: Any = self._network((levels / 255 - mean) / std)
        return output.pooler_output  # the first token, normed, as DINOv2's own code returns


def square_levels(image: Image.Image, side: int) -> Tensor:
    """[3, side, side] float32 of levels from 0 to 255: bicubic with its kernel widened where it shrinks, each channel
    by itself and not rounded, as Parmar et al. 2022 (arXiv 2104.11222) and their clean-fid resize images for FID."""
    size, whole = (side, side), image.convert("RGB")
    planes = [
        np.asarray(Image.fromarray(np.asarray(plane, dtype=np.float32)).resize(size, Image.Resampling.BICUBIC))
        for plane in whole.split()
    ]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255)


def _load_inception(model: FeatureModel, device: torch.device | str, limits: Limits) -> nn.Module:
    """Without the layer of the classes, and counters that only training reads."""
    found = inception_tensors(model.path, limits).items()
    tensors = {n: tensor for n, tensor in found if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    return fill_network(FidInception, Component("Inception network", model.path, {}, tensors), device)


def _load_dinov2(model: FeatureModel, device: torch.device | str, limits: Limits) -> nn.Module:
    tensors = {}
    for file in model.weights:
        tensors |= open_tensors(file, limits)
    require_unscaled(model.path, tensors)
    part = Component("DINOv2 model", model.path, model.config, tensors)
    return fill_network(lambda: Dinov2Model(Dinov2Config(**model.config)), part, device, _OLD_DINOV2_NAMES)
