"""Small pictures of what the model sees: from the image's file where there is one, else from the latents."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.data.buckets import Placement, source_box

CROP_PX = 150
"""Side of a square with as many pixels as the picture of the crop."""
LEAST_PX = 320
"""Sides that `images.load_reduced` is to give, from which both pictures are made."""
_WHOLE_PX = 64  # longer side of the picture of the whole image
_CROP_QUALITY, _WHOLE_QUALITY = 70, 50

# SDXL's latents, scaled, to R, G and B of 0..255: T. A. Vass, "Explaining the SDXL latent space" (Hugging Face, 2023).
# A linear approximation, without detail; of another VAE's latents the colours are wrong.
_LATENTS_TO_RGB = np.array([[60, 60, 60], [-60, -5, 10], [25, 15, -5], [-70, -50, -35]], dtype=np.float32)
_RGB_OF_ZERO = np.array([150, 140, 130], dtype=np.float32)


@dataclass(frozen=True)
class Thumbnail:
    """A picture of what the model sees, and where that lies in the image.

    Attributes:
        crop, whole: WebP files; no `whole` where only latents are at hand.
        crop_wh: size of the crop's picture, in pixels.
        box: left, top, width and height of the crop as shares of the image, None where it is not known.
        fingerprint: a perceptual hash of 64 bits: few of them differ between pictures that look alike.
        from_latents: an approximation, made of latents.
    """

    crop: bytes
    crop_wh: tuple[int, int]
    whole: bytes | None
    box: tuple[float, float, float, float] | None
    fingerprint: int
    from_latents: bool


def thumbnail_of_image(image: Image.Image, original_hw: tuple[int, int], placement: Placement) -> Thumbnail:
    """Of an image as displayed, which may be reduced from `original_hw`, with the crop that training takes."""
    top, left, bottom, right = source_box(original_hw, placement)
    height, width = original_hw
    box = left / width, top / height, (right - left) / width, (bottom - top) / height
    scale_x, scale_y = image.width / width, image.height / height
    pixels = left * scale_x, top * scale_y, min(right * scale_x, image.width), min(bottom * scale_y, image.height)
    size = _crop_size(placement.bucket.width_px, placement.bucket.height_px)
    crop = image.resize(size, Image.Resampling.LANCZOS, box=pixels)
    factor = _WHOLE_PX / max(image.size)
    whole = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    return Thumbnail(
        _webp(crop, _CROP_QUALITY), size, _webp(whole, _WHOLE_QUALITY), box, fingerprint_of(crop), from_latents=False
    )


def thumbnail_of_latents(latents: np.ndarray, scaling_factor: float) -> Thumbnail:
    """Of unscaled latents f16 [4, h, w]."""
    picture = rgb_of_latents(latents, scaling_factor)
    size = _crop_size(picture.width, picture.height)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    return Thumbnail(_webp(picture, _CROP_QUALITY), size, None, None, fingerprint_of(picture), from_latents=True)


def rgb_of_latents(latents: np.ndarray, scaling_factor: float) -> Image.Image:
    """About what the VAE would decode of unscaled latents f16 [4, h, w], at an eighth of the size."""
    scaled = np.nan_to_num(latents.astype(np.float32)) * scaling_factor
    rgb = np.tensordot(scaled, _LATENTS_TO_RGB, axes=(0, 0)) + _RGB_OF_ZERO
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def fingerprint_of(image: Image.Image) -> int:
    """The signs of the lowest frequencies of the image in grey, 64 bits."""
    from imagehash import phash  # takes SciPy along, which is not needed elsewhere

    return int(str(phash(image)), 16)


def _crop_size(width: int, height: int) -> tuple[int, int]:
    scale = CROP_PX / (width * height) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))


def _webp(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()
