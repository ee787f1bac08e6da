"""CLIP's features of images and texts, from a local folder; torch and transformers alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel

from trainer.evaluate.quality.clip_folder import ClipFolder
from trainer.evaluate.quality.fill_network import fill_network
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model.text import load_tokenizers
from trainer.model_files.components import Component, require_unscaled
from trainer.model_files.model_source import open_tensors

_BATCH = 16


class ClipFeatures:
    """Features [n, size] float32 on the CPU, before any scaling."""

    def __init__(self, folder: ClipFolder, device: torch.device | str, limits: Limits = DEFAULT_LIMITS) -> None:
        """Read the weights, in fp32.

        Raises:
            UserError: they do not fit the configuration, or the tokenizer cannot be read.
        """
        self._folder, self._device = folder, device
        self.size: int = folder.config["projection_dim"]
        self._tokenizer = load_tokenizers((folder.path, None))
        self._model = _load_model(folder, device, limits)

    @torch.inference_mode()
    def of_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """[n, size]; the shorter side is resized to the model's, and the middle is taken."""
        found = []
        for begin in range(0, len(images), _BATCH):
            pixels = torch.stack([model_pixels(image, self._folder) for image in images[begin : begin + _BATCH]])
            found.append(_projected(self._model.get_image_features(pixel_values=pixels.to(self._device))))
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[n, size]; what a text has beyond 75 tokens is left out."""
        found = []
        for begin in range(0, len(texts), _BATCH):
            ids = torch.from_numpy(self._tokenizer(texts[begin : begin + _BATCH])[:, 0, 0])
            found.append(_projected(self._model.get_text_features(input_ids=ids.to(self._device))))
        return torch.cat(found).numpy()


def _projected(output: Any) -> Tensor:
    """Of what transformers 5 gives, which its annotations do not tell."""
    return output.pooler_output.cpu()


def model_pixels(image: Image.Image, folder: ClipFolder) -> Tensor:
    """An image as CLIP was shown images (github.com/openai/CLIP, clip.py): [3, side, side] float32."""
    side, (width, height) = folder.image_px, image.size
    scale = side / min(width, height)
    size = max(side, int(width * scale)), max(side, int(height * scale))
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    levels = torch.from_numpy(np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32))
    mean, std = torch.tensor(folder.mean), torch.tensor(folder.std)
    return ((levels / 255 - mean) / std).permute(2, 0, 1).contiguous()


def _load_model(folder: ClipFolder, device: torch.device | str, limits: Limits) -> CLIPModel:
    tensors = {}
    for file in folder.weights:
        stored = open_tensors(file, limits)
        require_unscaled(file, stored)
        tensors |= {name: tensor for name, tensor in stored.items() if not name.endswith("position_ids")}
    part = Component("CLIP model", folder.path, folder.config, tensors)
    return fill_network(lambda: CLIPModel(CLIPConfig(**folder.config)), part, device)
