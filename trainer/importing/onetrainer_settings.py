"""OneTrainer's settings as one flat table, and why some of them become nothing here.

Names and defaults are those of OneTrainer in August 2026 (version 11 of its configuration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, parse_json
from trainer.importing.given import Draft

_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "optimizer", "embedding")
_SHOWS_IT = ("training_method", "model_type", "base_model_name", "concept_file_name", "output_model_destination")
_OTHER_MODELS = "belongs to other models than SDXL"
_AUTO_MEMORY = "the memory plan chooses this by itself (`memory`); see `sdxl-train plan`"
_VIEW = "nothing of the training hangs on it"
_LOADER = "readers need two processes a worker at most; `data.workers` changes it"
_CARDS = "cards exchange gradients in the precision of `train.precision`, beside the backward pass"
_LOKR = "lokr has `adapter.rank`, `alpha` and `lokr_factor`"
_CACHE = "what is prepared is checked by time and size, and kept in data.prepared"
_FILTER = "see layer_filter_preset"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("prior", "transformer", "unconditional_transformer", "text_encoder_3", "text_encoder_4", "effnet_encoder",
         "decoder", "decoder_text_encoder", "decoder_vqgan", "text_encoder_3_layer_skip", "text_encoder_4_layer_skip",
         "text_encoder_3_sequence_length", "text_encoder_sequence_length", "frames", "vb_loss_strength",
         "sample_video_format", "sample_audio_format", "dynamic_timestep_shifting", "custom_conditioning_image"),
        _OTHER_MODELS),
    **dict.fromkeys(
        ("debug_mode", "debug_dir", "tensorboard_expose", "tensorboard_always_on", "tensorboard_port",
         "sample_image_format", "samples_to_tensorboard", "prevent_overwrites", "include_train_config"), _VIEW),
    **dict.fromkeys(
        ("gradient_checkpointing", "async_offloading", "layer_offload_fraction", "enable_activation_offloading",
         "enable_async_offloading", "train_device", "temp_device", "enable_autocast_cache",
         "offload_fraction", "activation_offloading"), _AUTO_MEMORY),
    **dict.fromkeys(("gradient_reduce_precision", "fused_gradient_reduce", "async_gradient_reduce",
                     "async_gradient_reduce_buffer"), _CARDS),
    **dict.fromkeys(("cache_dir", "clear_cache_before_training", "only_cache"), _CACHE),
    **dict.fromkeys(("lokr_decompose_both", "lokr_use_tucker", "lokr_full_matrix", "lokr_vec_trick",
                     "lokr_dora_on_output", "lokr_weight_decompose"), _LOKR),
    **dict.fromkeys(("layer_filter", "layer_filter_regex", "lora_layers", "lora_layer_preset"), _FILTER),
    "optimizer_defaults": "settings of optimizers that are not used", "cloud": "runs are on this machine",
    "secrets": "keys belong into the environment", "huggingface_cache_dir": "the hub's own cache is used (HF_HOME)",
    "offline_mode": "HF_HUB_OFFLINE=1 does that", "continue_last_backup": "the same command goes on by itself",
    "attention_mechanism": "attention is always PyTorch's fused one", "dataloader_threads": _LOADER,
    "fallback_train_dtype": "the VAE is fp32 by default (`model.vae_precision`)",
    "force_circular_padding": "tiling images are not trained for", "quantization": "see model.frozen_weights",
    "custom_learning_rate_scheduler": "schedules of other libraries are not run", "scheduler_params": "see above",
    "learning_rate_cycles": "the schedule has one cycle", "loss_scaler": "the loss is a mean over the step's images, "
    "whatever batch and accumulation are", "generalized_offset_noise": "the offset is the same at all timesteps",
    "masked_prior_preservation_weight": "what is outside masks has objective.loss.unmasked_weight",
    "timestep_shift": "is of flow matching (objective.flow.shift)", "preserve_embedding_norm": "norms of new tokens "
    "are not held", "embedding_weight_dtype": "new tokens train in fp32", "bundle_additional_embeddings": "embeddings "
    "are files of their own", "lora_weight_dtype": "adapters train in fp32",
    "lora_decompose_norm_epsilon": "is not needed",
    "lora_decompose_output_axis": "is PEFT's axis", "oft_block_share": "blocks are not shared", "oft_scaled": "a "
    "rotation has no scale", "sample_skip_first": "samples begin with the first interval",
    "non_ema_sampling": "see ema",
    "backup_before_save": "every checkpoint is whole", "save_skip_first": "see save_every",
    "save_filename_prefix": "files are called by run and step",
    "text_encoder_layer_skip": "SDXL takes the layer before the last",
    "text_encoder_2_layer_skip": "SDXL takes the layer before the last", "text_encoder_2_sequence_length": "see "
    "captions.max_tokens", "validate_after": "validation goes by steps (validation.every_steps)",
    "validate_after_unit": "validation goes by steps (validation.every_steps)", "weight_dtype": "see unet.weight_dtype",
    "rolling_backup": "see rolling_backup_count", "vae.train": "the VAE is always frozen",
    "optimizer.stochastic_rounding": "bf16 weights are never rounded to the nearest (`train.precision`)",
    "include": _OTHER_MODELS, "attention_mask": _OTHER_MODELS, "guidance_scale": _OTHER_MODELS,
    "train_embedding": "see additional_embeddings", "embedding.uuid": "is of the window",
    "embedding.is_output_embedding": "new tokens are looked up before the text encoders",
    "embedding.stop_training_after": "new tokens train to the end",
    "embedding.stop_training_after_unit": "new tokens train to the end",
    "optimizer.fused": "updates are fused where that pays", "optimizer.foreach": "updates are fused where that pays",
    "optimizer.relative_step": "learning rates are those that are given",
    "optimizer.warmup_init": "learning rates are those that are given", "__version": "of the file",
}  # fmt: skip
"""Settings that change nothing, or that there is nothing for: why."""
_UNKNOWN = "nothing like it here, or the default"


def is_onetrainer(settings: Mapping[str, Any]) -> bool:
    """Whether these are settings of OneTrainer."""
    return any(name in settings for name in _SHOWS_IT)


def read_json_text(text: str, place: str) -> Any:
    """The value of a JSON file that OneTrainer wrote, with its infinities as text.

    Raises:
        UserError: it is none.
    """
    data = text.replace(": Infinity", ': "inf"').encode()
    return parse_json(data, place, most_bytes=DEFAULT_LIMITS.config_bytes, most_depth=DEFAULT_LIMITS.json_depth)


def draft_of(settings: Mapping[str, Any]) -> Draft:
    """Settings by name, those of a part as `unet.learning_rate`."""
    given: dict[str, Any] = {}
    for name, value in _modern(settings).items():
        if name in _PARTS and isinstance(value, dict):
            given |= {f"{name}.{inner}": each for inner, each in value.items() if each is not None}
        elif value is not None:
            given[name] = value
    reasons = {name: _reason(name, value) for name, value in given.items()}
    return Draft(given, reasons=reasons, mark="")


def _reason(name: str, value: Any) -> str:
    known = REASONS.get(name, REASONS.get(name.rpartition(".")[2]))
    if known is not None or not name.startswith("optimizer."):
        return known or _UNKNOWN
    return "is off, as here" if value is False else "this program's optimizer has nothing like it, or does so anyway"


def _modern(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the optimizer's numbers together, which old files have beside all else."""
    if not isinstance(settings.get("optimizer"), str):
        return {**settings}
    own = {k.removeprefix("optimizer_"): v for k, v in settings.items() if k.startswith("optimizer")}
    others = {k: v for k, v in settings.items() if not k.startswith("optimizer")}
    return {**others, "optimizer": own}


def number(draft: Draft, name: str, default: float | None) -> float | None:
    """A setting that is a number; infinite ones are None.

    Raises:
        UserError: it is none.
    """
    value = draft.take(name, default)
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} = {value}: must be a number") from None
    return found if math.isfinite(found) else None


def whole(draft: Draft, name: str, default: int) -> int:
    """A setting that is a whole number.

    Raises:
        UserError: it is none.
    """
    found = number(draft, name, default)
    if found is None or found != int(found):
        raise UserError(f"{name} = {draft.take(name)}: must be a whole number")
    return int(found)


def word(draft: Draft, name: str, default: str) -> str:
    """A setting that is a name, in capitals."""
    return str(draft.take(name, default)).upper()
