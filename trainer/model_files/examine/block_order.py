"""The order of a network's blocks, and their short names; without torch."""

from __future__ import annotations

import re

_PLACES = (
    "time_embed",
    "label_emb",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "out",
    "text_encoder_1.embeddings",
    "text_encoder_1.layers",
    "text_encoder_1.final_layer_norm",
    "text_encoder_2.embeddings",
    "text_encoder_2.layers",
    "text_encoder_2.final_layer_norm",
    "text_encoder_2.text_projection",
    "text_encoder_2.logit_scale",
    "vae.encoder.conv_in",
    "vae.encoder.down",
    "vae.encoder.mid",
    "vae.encoder.norm_out",
    "vae.encoder.conv_out",
    "vae.quant_conv",
    "vae.post_quant_conv",
    "vae.decoder.conv_in",
    "vae.decoder.mid",
    "vae.decoder.up",
    "vae.decoder.norm_out",
    "vae.decoder.conv_out",
)


def block_order(block: str) -> tuple[int, str, tuple[int, ...]]:
    """A sort key that puts blocks of `key_map.block_of` in the order in which the network computes them."""
    plain = re.sub(r"(\.\d+)+$", "", block)
    place = _PLACES.index(plain) if plain in _PLACES else len(_PLACES)
    numbers = tuple(int(number) for number in re.findall(r"\d+", block.removeprefix("text_encoder_")))
    # The decoder counts its levels from the image.
    return place, plain, tuple(-n for n in numbers) if plain == "vae.decoder.up" else numbers
