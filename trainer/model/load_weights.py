"""Weights of SDXL straight into models of the final dtype on the final device.

A model is laid out without memory, then each tensor is read, converted and put in its place, so that
beside the model itself there is at most one tensor more. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError, printable
from trainer.model.text import ChunkJoin, TextEncoders
from trainer.model_files.components import Component
from trainer.model_files.run_model import RunModel

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def load_unet(model: RunModel, dtype: torch.dtype, device: torch.device | str) -> UNet2DConditionModel:
    """The UNet, in evaluation mode, its parameters asking for gradients.

    Raises:
        UserError: the weights do not fit the configuration.
    """
    unet = empty_unet(model)
    _fill(unet, model.part("unet"), dtype, device)
    return unet.eval()


def empty_unet(model: RunModel) -> UNet2DConditionModel:
    """The UNet without its weights: on the meta device, to be given memory and filled by `read_weights`."""
    from accelerate.big_modeling import init_empty_weights
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with _built_from(model, "unet"), init_empty_weights():
        unet = UNet2DConditionModel.from_config(model.config("unet"))
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def load_vae(model: RunModel, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The frozen VAE.

    Raises:
        UserError: the weights do not fit the configuration.
    """
    vae = empty_vae(model)
    _fill(vae, model.part("vae"), dtype, device)
    return vae.requires_grad_(False).eval()


def empty_vae(model: RunModel) -> AutoencoderKL:
    """The VAE without its weights: on the meta device."""
    from accelerate.big_modeling import init_empty_weights
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with _built_from(model, "vae"), init_empty_weights():
        vae = AutoencoderKL.from_config(model.config("vae"))
    assert isinstance(vae, AutoencoderKL)
    return vae


def load_text_encoders(
    model: RunModel, dtype: torch.dtype, device: torch.device | str, join: ChunkJoin = "a1111"
) -> TextEncoders:
    """Both text encoders, frozen.

    Args:
        join: how the chunks of a long caption are put together.
    Raises:
        UserError: the weights do not fit the configuration.
    """
    encoders = empty_text_encoders(model, join)
    for module, name in ((encoders.one, "text_encoder"), (encoders.two, "text_encoder_2")):
        _fill(module, model.part(name), dtype, device)
        module.requires_grad_(False).eval()
    return encoders


def empty_text_encoders(model: RunModel, join: ChunkJoin = "a1111") -> TextEncoders:
    """Both text encoders without their weights: on the meta device, to be given memory and filled."""
    from accelerate.big_modeling import init_empty_weights
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights():
        with _built_from(model, "text_encoder"):
            one = CLIPTextModel(CLIPTextConfig.from_dict(_clip_config(model, "text_encoder")))
        with _built_from(model, "text_encoder_2"):
            two = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(_clip_config(model, "text_encoder_2")))
    return TextEncoders(one, two, join)


# All that CLIP's text model is made of. Other keys say how a library should load it, some of them from where.
_CLIP_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range",
    "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_CANNOT_BUILD = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
    ImportError, MemoryError,
)  # fmt: skip


def _clip_config(model: RunModel, component: str) -> dict[str, Any]:
    config = model.config(component)
    return {key: config[key] for key in _CLIP_KEYS if key in config}


@contextmanager
def _built_from(model: RunModel, component: str) -> Iterator[None]:
    """A configuration that the library builds nothing of is the file's mistake."""
    from huggingface_hub.errors import StrictDataclassError  # which checks the types in transformers' configurations

    try:
        yield
    except (*_CANNOT_BUILD, StrictDataclassError) as error:
        said = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(
            f"{model.source_of(component).path}: no network can be built by the {component}'s configuration: {said}"
        ) from None


def _fill(model: torch.nn.Module, part: Component, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fills a model whose parameters have no memory yet; every parameter must be found, in its shape."""
    import torch

    weights: dict[str, torch.Tensor] = {}

    def place(name: str, stored: torch.Tensor) -> None:
        # A copy also of what has the right dtype already: it may be a window on a file. Training would copy it page
        # by page, and the file's alignment may change the last bits of CPU kernels.
        weights[name] = torch.empty(stored.shape, dtype=dtype, device=device).copy_(stored)

    read_weights(model, part, place)
    model.load_state_dict(weights, assign=True)
    model.to(device)  # the buffers that are not saved


def read_weights(
    model: torch.nn.Module | Mapping[str, torch.Tensor], part: Component, place: Callable[[str, torch.Tensor], None]
) -> None:
    """Calls `place` with the name of every parameter of `model` and the tensor that `part` holds for it.

    One tensor is in memory at a time, on the CPU and in the dtype of the file.

    Args:
        model: or the tensors that are wanted, by their names in the part.
        part: from `RunModel.part`, or a checkpoint's.
    Raises:
        UserError: a tensor is missing, has another shape, is none of the model's, or is not finite.
    """
    tensors = model if isinstance(model, Mapping) else model.state_dict()
    wanted = {name: tensor.shape for name, tensor in tensors.items()}
    for fault, names in (
        ("lack", [name for name in wanted if name not in part.tensors]),
        ("hold", [name for name in part.tensors if name not in wanted]),
    ):
        if names:
            rule = "that its configuration " + ("asks for" if fault == "lack" else "has no place for")
            raise UserError(f"{part.origin}: the {part.name}'s weights {fault} {len(names)} tensors {rule}, "
                            f"such as {names[0]}")  # fmt: skip
    for name, stored in part.tensors.items():
        if stored.meta.shape != wanted[name]:
            shapes = f"{list(stored.meta.shape)}, and its configuration asks for {list(wanted[name])}"
            raise UserError(f"{part.origin}: the {part.name}'s {name} has shape {shapes}")
    for name, stored in part.tensors.items():
        tensor = stored.read()
        if not _is_finite(tensor):
            rule = "holds NaN or infinite values; take another file, `sdxl-train inspect` looks into it"
            raise UserError(f"{part.origin}: the {part.name}'s {name} {rule}")
        place(name, tensor)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is; by the least and the greatest, which NaN is among if there is any."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.half() if tensor.element_size() == 1 else tensor  # 8 bits: nothing compares them
    least, greatest = torch.aminmax(wide)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
