"""The options of sd-scripts' `sdxl_train.py` and `sdxl_train_network.py`: types, and why some become nothing here.

Names, types and defaults are those of sd-scripts in February 2026.
"""

from __future__ import annotations

FLAG, TEXT, WHOLE, NUMBER, WORDS = "flag", "text", "whole number", "number", "words"

_ATTENTION = "attention is always PyTorch's fused one, which takes as little memory"
_AUTO_MEMORY = "the memory plan chooses this by itself (`memory`); see `sdxl-train plan`"
_STATE = "every checkpoint holds the whole state, and the same command goes on"
_LOGS = "metrics.jsonl, TensorBoard's files and log.txt always lie in run.dir"
_HUB = "nothing is uploaded; `sdxl-train export` writes the file"
_SD3 = "belongs to SD3, and has no effect in sdxl_train.py either"
_LOADER = "readers need two processes a worker at most; `data.workers` changes it"

NOTHING_HERE: dict[str, str] = {
    "xformers": _ATTENTION, "sdpa": _ATTENTION, "mem_eff_attn": _ATTENTION, "diffusers_xformers": _ATTENTION,
    "gradient_checkpointing": _AUTO_MEMORY, "blocks_to_swap": _AUTO_MEMORY, "cpu_offload_checkpointing": _AUTO_MEMORY,
    "lowram": _AUTO_MEMORY, "highvram": _AUTO_MEMORY, "offload_optimizer_device": _AUTO_MEMORY,
    "offload_optimizer_nvme_path": _AUTO_MEMORY, "offload_param_device": _AUTO_MEMORY,
    "offload_param_nvme_path": _AUTO_MEMORY, "zero3_init_flag": _AUTO_MEMORY, "zero3_save_16bit_model": _AUTO_MEMORY,
    "fp16_master_weights_and_gradients": "weights are fp32, or bf16 that is rounded right (`train.precision`)",
    "save_state": _STATE, "save_state_on_train_end": _STATE, "save_last_n_steps_state": _STATE,
    "save_last_n_epochs_state": _STATE, "save_state_to_huggingface": _HUB, "resume_from_huggingface": _HUB,
    "resume": "kohya's state cannot be read; start from its last weights (`model.path`), which begins the data anew",
    "initial_step": "start from the saved weights; the data of an interrupted run of kohya's begin anew",
    "initial_epoch": "start from the saved weights; the data of an interrupted run of kohya's begin anew",
    "skip_until_initial_step": "a run of this program goes on at the exact image by itself",
    "logging_dir": _LOGS, "log_prefix": _LOGS, "log_tracker_name": _LOGS, "log_tracker_config": _LOGS,
    "console_log_level": _LOGS, "console_log_file": _LOGS, "console_log_simple": _LOGS,
    "log_config": "config.resolved.yaml in run.dir is the configuration",
    "wandb_run_name": "see log_with; log.name is what trackers call the run",
    "wandb_api_key": "keys belong into the environment (WANDB_API_KEY), or `wandb login`",
    "huggingface_repo_id": _HUB, "huggingface_repo_type": _HUB, "huggingface_path_in_repo": _HUB,
    "huggingface_token": _HUB, "huggingface_repo_visibility": _HUB, "async_upload": _HUB,
    "max_data_loader_n_workers": _LOADER, "persistent_data_loader_workers": _LOADER,
    "pin_memory": "has next to nothing to win: the latents of an image are some 100 KB",
    "skip_cache_check": "what is prepared is checked by time and size, in seconds",
    "cache_info": "`prepare` remembers what it has seen",
    "dynamo_backend": "torch.compile uses inductor", "ddp_timeout": "launch.hang_after_s is the like of it",
    "ddp_gradient_as_bucket_view": "is always on", "ddp_static_graph": "is not needed",
    "clip_skip": "has no effect on SDXL: the layer before the last is always taken",
    "v2": "is of Stable Diffusion 2", "weighted_captions": "A1111's weights in captions are not read yet",
    "token_warmup_min": "captions do not grow over the run", "token_warmup_step": "captions do not grow over the run",
    "color_aug": "colours are not changed: it trains wrong ones", "face_crop_aug_range": "faces are not searched for",
    "resize_interpolation": "images are reduced by area-true Lanczos",
    "text_encoder_batch_size": "`prepare` chooses it", "tokenizer_cache_dir": "tokenizers come with the model",
    "no_half_vae": "the VAE is fp32 by default (`model.vae_precision`)",
    "use_safetensors": "files are always safetensors",
    "no_metadata": "metadata are written; `export --no-config` leaves the settings out",
    "training_comment": "give `sdxl-train export --description`", "output_config": "this command's result is the file",
    "debug_dataset": "`sdxl-train data browse` shows the data", "dataset_class": "sources have types (`data.sources`)",
    "sample_at_first": "samples begin with the first interval", "disable_mmap_load_safetensors": "files are read",
    "weighting_scheme": _SD3, "logit_mean": _SD3, "logit_std": _SD3, "mode_scale": _SD3,
    "scale_weight_norms": "norms of an adapter are not held down", "dim_from_weights": "set adapter.rank as the file's",
    "lr_scheduler_type": "schedules of other libraries are not run", "lr_scheduler_args": "see lr_scheduler",
    "lr_decay_steps": "the schedule ends with the run", "lr_scheduler_timescale": "see lr_scheduler",
    "save_n_epoch_ratio": "checkpoint.every and checkpoint.keep say what is kept",
    "metadata_is_negative_embedding": "is of embeddings", "metadata_preprocessor": "is of ControlNets",
    "metadata_merged_from": "`merge` writes it", "validation_seed": "the held-out images follow from their names",
    "max_validation_steps": "validation.max_images is the like of it", "fp8_base_unet": "see fp8_base",
    "ip_noise_gamma_random_strength": "the strength is the same for all images",
    "noise_offset_random_strength": "the strength is the same for all images",
    "huber_scale": "scales the loss as a whole, which AdamW does not see",
    "network_multiplier": "the adapter trains at strength 1",
}  # fmt: skip
"""Options that change nothing, or that there is nothing for: why."""

READ: dict[str, str] = {
    "pretrained_model_name_or_path": TEXT, "vae": TEXT, "output_dir": TEXT, "output_name": TEXT, "seed": WHOLE,
    "train_data_dir": TEXT, "reg_data_dir": TEXT, "in_json": TEXT, "dataset_config": TEXT, "config_file": TEXT,
    "dataset_repeats": WHOLE, "caption_extension": TEXT, "caption_extention": TEXT, "conditioning_data_dir": TEXT,
    "resolution": TEXT, "enable_bucket": FLAG, "min_bucket_reso": WHOLE, "max_bucket_reso": WHOLE,
    "bucket_reso_steps": WHOLE, "bucket_no_upscale": FLAG, "cache_latents": FLAG, "cache_latents_to_disk": FLAG,
    "vae_batch_size": WHOLE, "flip_aug": FLAG, "random_crop": FLAG, "alpha_mask": FLAG, "masked_loss": FLAG,
    "cache_text_encoder_outputs": FLAG, "cache_text_encoder_outputs_to_disk": FLAG, "prior_loss_weight": NUMBER,
    "shuffle_caption": FLAG, "keep_tokens": WHOLE, "keep_tokens_separator": TEXT, "caption_separator": TEXT,
    "secondary_separator": TEXT, "enable_wildcard": FLAG, "caption_prefix": TEXT, "caption_suffix": TEXT,
    "caption_dropout_rate": NUMBER, "caption_dropout_every_n_epochs": WHOLE, "caption_tag_dropout_rate": NUMBER,
    "max_token_length": WHOLE, "train_batch_size": WHOLE, "gradient_accumulation_steps": WHOLE,
    "max_train_steps": WHOLE, "max_train_epochs": WHOLE, "max_grad_norm": NUMBER, "mixed_precision": TEXT,
    "full_bf16": FLAG, "full_fp16": FLAG, "torch_compile": FLAG, "deepspeed": FLAG, "zero_stage": WHOLE,
    "fused_backward_pass": FLAG, "fused_optimizer_groups": WHOLE, "fp8_base": FLAG, "train_text_encoder": FLAG,
    "learning_rate": NUMBER, "learning_rate_te1": NUMBER, "learning_rate_te2": NUMBER, "block_lr": TEXT,
    "unet_lr": NUMBER, "text_encoder_lr": WORDS, "network_module": TEXT, "network_dim": WHOLE,
    "network_alpha": NUMBER, "network_dropout": NUMBER, "network_args": WORDS, "network_weights": TEXT,
    "network_train_unet_only": FLAG, "network_train_text_encoder_only": FLAG, "base_weights": WORDS,
    "base_weights_multiplier": WORDS, "optimizer_type": TEXT, "optimizer_args": WORDS, "use_8bit_adam": FLAG,
    "use_lion_optimizer": FLAG, "lr_scheduler": TEXT, "lr_warmup_steps": NUMBER, "lr_scheduler_num_cycles": WHOLE,
    "lr_scheduler_power": NUMBER, "lr_scheduler_min_lr_ratio": NUMBER, "v_parameterization": FLAG,
    "zero_terminal_snr": FLAG, "min_snr_gamma": NUMBER, "scale_v_pred_loss_like_noise_pred": FLAG,
    "v_pred_like_loss": NUMBER, "debiased_estimation_loss": FLAG, "min_timestep": WHOLE, "max_timestep": WHOLE,
    "loss_type": TEXT, "huber_schedule": TEXT, "huber_c": NUMBER, "noise_offset": NUMBER,
    "adaptive_noise_scale": NUMBER, "multires_noise_iterations": WHOLE, "multires_noise_discount": NUMBER,
    "ip_noise_gamma": NUMBER, "save_precision": TEXT, "save_model_as": TEXT, "save_every_n_steps": WHOLE,
    "save_every_n_epochs": WHOLE, "save_last_n_steps": WHOLE, "save_last_n_epochs": WHOLE, "metadata_title": TEXT,
    "metadata_author": TEXT, "metadata_license": TEXT, "metadata_description": TEXT, "metadata_tags": TEXT,
    "metadata_usage_hint": TEXT, "metadata_trigger_phrase": TEXT, "metadata_thumbnail": TEXT,
    "sample_every_n_steps": WHOLE, "sample_every_n_epochs": WHOLE, "sample_prompts": TEXT, "sample_sampler": TEXT,
    "validation_split": NUMBER, "validate_every_n_steps": WHOLE, "validate_every_n_epochs": WHOLE, "log_with": TEXT,
}  # fmt: skip
"""Options that are read, by the type of their value."""

_FLAGS_OF_NOTHING = {
    "xformers", "sdpa", "mem_eff_attn", "diffusers_xformers", "gradient_checkpointing", "cpu_offload_checkpointing",
    "lowram", "highvram", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
    "save_state", "save_state_on_train_end", "save_state_to_huggingface", "resume_from_huggingface",
    "skip_until_initial_step", "log_config", "async_upload", "persistent_data_loader_workers", "pin_memory",
    "skip_cache_check", "cache_info", "ddp_gradient_as_bucket_view", "ddp_static_graph", "v2", "weighted_captions",
    "color_aug", "no_half_vae", "use_safetensors", "no_metadata", "output_config", "debug_dataset", "sample_at_first",
    "console_log_simple", "disable_mmap_load_safetensors", "dim_from_weights", "fp8_base_unet",
    "ip_noise_gamma_random_strength", "noise_offset_random_strength",
}  # fmt: skip
TYPES: dict[str, str] = {
    **{name: FLAG if name in _FLAGS_OF_NOTHING else TEXT for name in NOTHING_HERE},
    "lr_scheduler_args": WORDS,
    **READ,
}
"""Of all options."""
