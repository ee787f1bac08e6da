"""Weights of an SDXL folder straight into models of the final dtype on the final device.

A model is laid out without memory, then each tensor is read, converted and put in its place, so that
beside the model itself there is at most one tensor more. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.model.folder import check_model_folder, read_config, vae_folder, weight_files, weights_fingerprint
from trainer.model.text import TextEncoders

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

__all__ = [
    "check_model_folder",
    "empty_text_encoders",
    "empty_unet",
    "load_text_encoders",
    "load_unet",
    "load_vae",
    "read_weights",
    "vae_folder",
    "weights_fingerprint",
]

# Attention of VAEs that were saved before diffusers 0.17.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_unet(path: Path, dtype: torch.dtype, device: torch.device | str) -> UNet2DConditionModel:
    """The UNet in `path`/unet, in evaluation mode, its parameters asking for gradients.

    Raises:
        UserError: the weights do not fit the configuration beside them.
    """
    unet = empty_unet(path)
    _read_weights(unet, path / "unet", dtype, device)
    return unet.eval()


def empty_unet(path: Path) -> UNet2DConditionModel:
    """The UNet in `path`/unet without its weights: on the meta device, to be given memory and filled."""
    from accelerate import init_empty_weights
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(read_config(path / "unet"))
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def load_vae(path: Path, vae_override: Path | None, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKL:
    """The frozen VAE in `path`/vae, or in `vae_override` if that is given.

    Raises:
        UserError: the weights do not fit the configuration beside them.
    """
    from accelerate import init_empty_weights
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = vae_folder(path, vae_override)
    with init_empty_weights():
        vae = AutoencoderKL.from_config(read_config(folder))
    assert isinstance(vae, AutoencoderKL)
    _read_weights(vae, folder, dtype, device)
    return vae.requires_grad_(False).eval()


def load_text_encoders(path: Path, dtype: torch.dtype, device: torch.device | str) -> TextEncoders:
    """Both text encoders, frozen.

    Raises:
        UserError: the weights do not fit the configuration beside them.
    """
    encoders = empty_text_encoders(path)
    for model, name in ((encoders.one, "text_encoder"), (encoders.two, "text_encoder_2")):
        _read_weights(model, path / name, dtype, device)
        model.requires_grad_(False).eval()
    return encoders


def empty_text_encoders(path: Path) -> TextEncoders:
    """Both text encoders without their weights: on the meta device, to be given memory and filled."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights():
        return TextEncoders(
            CLIPTextModel(CLIPTextConfig.from_dict(read_config(path / "text_encoder"))),
            CLIPTextModelWithProjection(CLIPTextConfig.from_dict(read_config(path / "text_encoder_2"))),
        )


def _read_weights(model: torch.nn.Module, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fills a model whose parameters have no memory yet; every parameter must be found, in its shape."""
    import torch

    weights: dict[str, torch.Tensor] = {}

    def place(name: str, stored: torch.Tensor) -> None:
        # A copy even where the dtype is right: `stored` is a window on the file. Training would copy
        # it page by page, and the file's alignment may change the last bits of CPU kernels.
        weights[name] = torch.empty(stored.shape, dtype=dtype, device=device).copy_(stored)

    read_weights(model, folder, place)
    model.load_state_dict(weights, assign=True)
    model.to(device)  # the buffers that are not saved


def read_weights(model: torch.nn.Module, folder: Path, place: Callable[[str, torch.Tensor], None]) -> None:
    """Calls `place` with the name of every parameter of `model` and the tensor that `folder` holds for it.

    One tensor is in memory at a time, on the CPU and in the dtype of the file.

    Raises:
        UserError: a tensor is missing, has another shape, or is none of the model's.
    """
    from safetensors import safe_open

    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: set[str] = set()
    unknown: list[str] = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for stored_name in sorted(tensors.keys()):
                name = _name_in_model(stored_name, wanted)
                if name is None:
                    if not stored_name.endswith("position_ids"):
                        unknown.append(stored_name)
                    continue
                stored = tensors.get_tensor(stored_name)
                if stored.shape != wanted[name]:
                    shapes = f"{list(stored.shape)}, and config.json asks for {list(wanted[name])}"
                    raise UserError(f"model: {file}: {stored_name} has shape {shapes}")
                place(name, stored)
                found.add(name)
    missing = [name for name in wanted if name not in found]
    for fault, names in (("lack", missing), ("hold", unknown)):
        if names:
            rule = "that config.json asks for" if names is missing else "that config.json has no place for"
            raise UserError(f"model: {folder}: the weights {fault} {len(names)} tensors {rule}, such as {names[0]}")


def _name_in_model(stored_name: str, wanted: dict[str, torch.Size]) -> str | None:
    """The parameter that a stored tensor is for; None if the model has no such parameter.

    transformers 5 dropped the prefix `text_model.` of CLIPTextModel's parameters; folders have either form.
    """
    candidates = [stored_name, stored_name.removeprefix("text_model."), f"text_model.{stored_name}"]
    for old, new in _OLD_ATTENTION.items():
        if old in stored_name:
            candidates.append(stored_name.replace(old, new))
    return next((name for name in candidates if name in wanted), None)
