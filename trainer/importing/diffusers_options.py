"""The options of diffusers' `train_text_to_image_sdxl.py`, its LoRA twin, and both dreambooth scripts.

Types, and why some become nothing here.

Names, types and defaults are those of diffusers in August 2026.
"""

from __future__ import annotations

from trainer.importing.given import OptionTable
from trainer.importing.kohya_options import FLAG, NUMBER, TEXT, WHOLE

_ATTENTION = "attention is always PyTorch's fused one, which takes as little memory"
_HUB = "nothing is uploaded; `sdxl-train export` writes the file"
_LOGS = "metrics.jsonl and the trackers' files always lie in run.dir"
_BIAS = "a bias of timesteps is not here; objective.timesteps has distributions, and min and max"

NOTHING_HERE: dict[str, str] = {
    "revision": "the newest is taken; download another one, and give its folder as model.path",
    "variant": "the files are taken as they are; model.path may be a single file or another folder",
    "cache_dir": "the hub's own cache is used (HF_HOME)",
    "max_train_samples": "all images are trained on; `per_epoch` of a source limits an epoch",
    "num_validation_images": "see validation_prompt", "validation_epochs": "samples go by steps (samples.every_steps)",
    "resume_from_checkpoint": "their state cannot be read; start from the weights (model.path), which begins the data "
    "anew; a run of this program goes on at the exact image by itself",
    "gradient_checkpointing": "the memory plan chooses this by itself (`memory`); see `sdxl-train plan`",
    "allow_tf32": "fp32 passes use TF32 where the card has it", "dataloader_num_workers": "readers need two processes "
    "a worker at most; `data.workers` changes it",
    "push_to_hub": _HUB, "hub_token": _HUB, "hub_model_id": _HUB, "logging_dir": _LOGS,
    "local_rank": "workers are started by this program (`launch.workers`), or by torchrun",
    "enable_npu_flash_attention": _ATTENTION, "enable_xformers_memory_efficient_attention": _ATTENTION,
    "image_interpolation_mode": "images are reduced by area-true Lanczos",
    "debug_loss": "images whose loss leaps are found by `guard`",
    "timestep_bias_strategy": _BIAS, "timestep_bias_multiplier": _BIAS, "timestep_bias_begin": _BIAS,
    "timestep_bias_end": _BIAS, "timestep_bias_portion": _BIAS,
}  # fmt: skip
"""Options that change nothing, or that there is nothing for: why."""

READ: dict[str, str] = {
    "pretrained_model_name_or_path": TEXT, "pretrained_vae_model_name_or_path": TEXT, "dataset_name": TEXT,
    "dataset_config_name": TEXT, "train_data_dir": TEXT, "image_column": TEXT, "caption_column": TEXT,
    "validation_prompt": TEXT, "proportion_empty_prompts": NUMBER, "output_dir": TEXT, "seed": WHOLE,
    "resolution": WHOLE, "center_crop": FLAG, "random_flip": FLAG, "train_text_encoder": FLAG,
    "train_batch_size": WHOLE, "num_train_epochs": WHOLE, "max_train_steps": WHOLE, "checkpointing_steps": WHOLE,
    "checkpoints_total_limit": WHOLE, "gradient_accumulation_steps": WHOLE, "learning_rate": NUMBER, "scale_lr": FLAG,
    "lr_scheduler": TEXT, "lr_warmup_steps": WHOLE, "snr_gamma": NUMBER, "use_ema": FLAG, "use_8bit_adam": FLAG,
    "adam_beta1": NUMBER, "adam_beta2": NUMBER, "adam_weight_decay": NUMBER, "adam_epsilon": NUMBER,
    "max_grad_norm": NUMBER, "prediction_type": TEXT, "report_to": TEXT, "mixed_precision": TEXT,
    "noise_offset": NUMBER, "rank": WHOLE,
}  # fmt: skip
"""Options that are read, by the type of their value."""

_FLAGS = {
    "gradient_checkpointing", "allow_tf32", "push_to_hub", "enable_npu_flash_attention",
    "enable_xformers_memory_efficient_attention", "debug_loss",
}  # fmt: skip
TABLE = OptionTable(
    {**{name: FLAG if name in _FLAGS else TEXT for name in NOTHING_HERE}, **READ},
    "train_text_to_image_sdxl.py or train_text_to_image_lora_sdxl.py",
)
"""Of all options."""

DREAMBOOTH_NOTHING: dict[str, str] = {
    "num_class_images": "class images are not drawn by this program: fill class_data_dir before",
    "sample_batch_size": "see num_class_images",
    "prior_generation_precision": "see num_class_images",
    "output_kohya_format": "what is exported has kohya's names",
    "lr_num_cycles": "see lr_scheduler",
    "lr_power": "see lr_scheduler",
    "prodigy_decouple": "decay is always decoupled",
    "do_edm_style_training": "objective.prediction: edm is the like of it, with noise levels of its own",
    "adam_weight_decay_text_encoder": "an adapter has one decay, optimizer.weight_decay",
}
"""Of the dreambooth script's own options, those that become nothing."""
DREAMBOOTH_READ: dict[str, str] = {
    "instance_data_dir": TEXT, "repeats": WHOLE, "class_data_dir": TEXT, "instance_prompt": TEXT, "class_prompt": TEXT,
    "with_prior_preservation": FLAG, "prior_loss_weight": NUMBER, "text_encoder_lr": NUMBER, "optimizer": TEXT,
    "prodigy_beta3": NUMBER, "prodigy_use_bias_correction": TEXT, "prodigy_safeguard_warmup": TEXT,
    "lora_dropout": NUMBER, "use_dora": FLAG,
}  # fmt: skip
"""Those that are read."""
_NOT_OF_DREAMBOOTH = {
    "train_data_dir", "proportion_empty_prompts", "max_train_samples", "use_ema", "prediction_type", "noise_offset",
    "debug_loss", "enable_npu_flash_attention", "timestep_bias_strategy", "timestep_bias_multiplier",
    "timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion",
}  # fmt: skip
DREAMBOOTH_TABLE = OptionTable(
    {name: kind for name, kind in TABLE.types.items() if name not in _NOT_OF_DREAMBOOTH}
    | {name: FLAG if name in ("output_kohya_format", "do_edm_style_training") else TEXT for name in DREAMBOOTH_NOTHING}
    | DREAMBOOTH_READ,
    "train_dreambooth_lora_sdxl.py",
)
"""Of all options of the dreambooth script."""

ADVANCED_NOTHING: dict[str, str] = {
    "clip_skip": "the layer before the last is always taken, as SDXL was trained; their script obeys this only while "
    "it trains the text encoders or new tokens",
    "cache_latents": "latents are always stored (data.mode: latents)",
    "train_text_encoder_frac": "an adapter's text encoders train to the end of the run",
    "train_text_encoder_ti_frac": "new tokens train to the end of the run",
}
"""Of the advanced dreambooth script's own options, those that become nothing."""
ADVANCED_READ: dict[str, str] = {
    "token_abstraction": TEXT, "num_new_tokens_per_abstraction": WHOLE, "train_text_encoder_ti": FLAG,
    "lora_unet_blocks": TEXT, "use_blora": FLAG, "noise_offset": NUMBER,
}  # fmt: skip
"""Those that are read."""
ADVANCED_TABLE = OptionTable(
    {name: kind for name, kind in DREAMBOOTH_TABLE.types.items() if name != "output_kohya_format"}
    | {"clip_skip": WHOLE, "cache_latents": FLAG, "train_text_encoder_frac": NUMBER}
    | {"train_text_encoder_ti_frac": NUMBER, "adam_weight_decay_text_encoder": NUMBER}
    | ADVANCED_READ,
    "train_dreambooth_lora_sdxl_advanced.py",
)
"""Of all options of the advanced dreambooth script."""
