"""A command of diffusers' SDXL scripts as a configuration: every option is mapped, or told why it is not."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import UserError
from trainer.importing.command_text import Command
from trainer.importing.diffusers_options import (
    ADVANCED_NOTHING,
    ADVANCED_TABLE,
    DREAMBOOTH_NOTHING,
    DREAMBOOTH_TABLE,
    NOTHING_HERE,
    TABLE,
)
from trainer.importing.draft_end import settled
from trainer.importing.given import Draft, parse_options
from trainer.importing.launched_by import launched, launched_precision

_FULL, _LORA, _DREAMBOOTH = "train_text_to_image_sdxl", "train_text_to_image_lora_sdxl", "train_dreambooth_lora_sdxl"
_ADVANCED = "train_dreambooth_lora_sdxl_advanced"
_TABLES = {_DREAMBOOTH: DREAMBOOTH_TABLE, _ADVANCED: ADVANCED_TABLE}
_NOTHING = {_DREAMBOOTH: DREAMBOOTH_NOTHING, _ADVANCED: DREAMBOOTH_NOTHING | ADVANCED_NOTHING}
# Where the command says nothing; of the dreambooth scripts, then of the others:
_BATCH, _EPOCHS, _OUTPUT = (4, 16), (1, 100), ("lora-dreambooth-model", "runs/diffusers")
_SAVE_EVERY, _WARMUP, _LR, _RANK, _TEXT_LR, _DREAMBOOTH_DECAY = 500, 500, 1e-4, 4, 5e-6, 1e-4
_UNET_TARGETS = ["*to_q", "*to_k", "*to_v", "*to_out.0"]
_B_LORA = "unet.up_blocks.0.attentions.0,unet.up_blocks.0.attentions.1"
_WORD, _VECTORS, _TI_SHARE = "TOK", 2, 0.5
_TEXT_TARGETS = ["*q_proj", "*k_proj", "*v_proj", "*out_proj"]


def import_diffusers(command: Command, place: str, accelerate: Path | None = None) -> Draft:
    """The configuration of a command.

    Args:
        accelerate: accelerate's YAML file.
    Raises:
        UserError: with the option that cannot be understood.
    """
    script, is_dreambooth = command.script, command.script in (_DREAMBOOTH, _ADVANCED)
    given = parse_options(command.words, place, _TABLES.get(script, TABLE))
    draft = Draft(given, reasons=NOTHING_HERE | _NOTHING.get(script, {}))
    has_adapter = script != _FULL
    workers, stage = launched(draft, command, accelerate)
    _run_and_model(draft, workers, _OUTPUT[not is_dreambooth])
    (_dreambooth_data if is_dreambooth else _data)(draft)
    _squares(draft)
    _crops(draft, in_each_step=script == _LORA)
    steps = _length(draft, _BATCH[not is_dreambooth], _EPOCHS[not is_dreambooth])
    _precision(draft, launched_precision(command, accelerate))
    lr = _learning_rate(draft, workers)
    if has_adapter:
        _adapter(draft, is_dreambooth=is_dreambooth)
    draft.leave("rank", "is of the LoRA script")
    draft.leave("train_text_encoder", "is of the LoRA script; trainable.text_encoder_1 and 2 train the whole encoders")
    _optimizer(draft, lr)
    if is_dreambooth:
        _dreambooth_optimizer(draft)
    if script == _ADVANCED:
        _new_tokens(draft)
    _schedule(draft, steps, workers)
    _objective(draft)
    _saving(draft, has_adapter=has_adapter)
    _samples(draft)
    if stage in (2, 3) and not has_adapter and workers != 1:
        draft.put("memory.strategy", f"zero{stage}")
    return settled(draft)


def _run_and_model(draft: Draft, workers: int | None, output: str) -> None:
    run_dir = draft.take("output_dir", output)
    draft.put("run.dir", run_dir, "output_dir")
    draft.put("data.prepared", f"{run_dir.rstrip('/')}-prepared")
    if (seed := draft.take("seed")) is not None:
        draft.put("run.seed", seed, "seed")
    if workers is not None:
        draft.put("launch.workers", workers)
    model = draft.take("pretrained_model_name_or_path")
    if model is None:
        raise UserError("--pretrained_model_name_or_path: missing; it is the model to start from")
    draft.put("model.path", model, "pretrained_model_name_or_path")
    vae = draft.take("pretrained_vae_model_name_or_path")
    if vae and (Path(vae).expanduser().exists() or vae.startswith((".", "/", "~"))):
        draft.put("model.vae", vae, "pretrained_vae_model_name_or_path")
    elif vae:
        draft.leave(
            "pretrained_vae_model_name_or_path", "model.vae is a folder or file: download it, and name it there"
        )
        draft.notes.append(f"the VAE {vae} is on the hub: the model's own is used, in fp32, in which it does not "
                           "overflow; for another one download it and set model.vae")  # fmt: skip


def _data(draft: Draft) -> None:
    name, folder = draft.take("dataset_name"), draft.take("train_data_dir")
    if name is None and folder is None:
        raise UserError("--dataset_name: missing, and there is no --train_data_dir; without one there are no images")
    source = {"type": "hf", "path": name or folder}
    if name is not None:
        draft.leave("train_data_dir", "dataset_name counts")
    for option, key in (("dataset_config_name", "subset"), ("image_column", "image_column"),
                        ("caption_column", "caption_column")):  # fmt: skip
        if draft.take(option):
            source[key] = draft.take(option)
    options = ("dataset_name", "train_data_dir", "dataset_config_name", "image_column", "caption_column")
    left = [option for option in options if option in draft.became]
    draft.put("data.sources", [source], *(option for option in options if option not in left))
    if share := draft.take("proportion_empty_prompts"):
        draft.put("captions.dropout_rate", share, "proportion_empty_prompts")


def _dreambooth_data(draft: Draft) -> None:
    """One prompt for all images, or a column; and images of the class, which count apart."""
    name, folder = draft.take("dataset_name"), draft.take("instance_data_dir")
    if (name is None) == (folder is None):
        raise UserError("--dataset_name, --instance_data_dir: give one of them; it says where the images are")
    if draft.take("instance_prompt") is None:
        raise UserError("--instance_prompt: missing; it is the caption of the images")
    prior = bool(draft.take("with_prior_preservation"))
    column = draft.take("caption_column")
    repeats = {"repeats": draft.take("repeats")} if draft.take("repeats", 1) > 1 else {}
    if name is not None:
        source = {"type": "hf", "path": name} | repeats
        for option, key in (("dataset_config_name", "subset"), ("image_column", "image_column"),
                            ("caption_column", "caption_column")):  # fmt: skip
            if draft.take(option):
                source[key] = draft.take(option)
    else:
        # Images without a file of tags are used, those without a caption are not.
        source = {"type": "folder", "path": folder} | ({} if prior else {"caption_files_hold": "tags"}) | repeats
    sources = [source]
    if prior:
        if draft.take("class_data_dir") is None:
            raise UserError("--with_prior_preservation: needs --class_data_dir, a folder of images of the class")
        sources.append({"type": "folder", "path": draft.take("class_data_dir"), "prior": True})
        draft.put("objective.loss_weights.prior", draft.take("prior_loss_weight", 1.0), "prior_loss_weight")
    options = ("dataset_name", "instance_data_dir", "dataset_config_name", "image_column", "caption_column", "repeats")
    draft.put("data.sources", sources, *options, "class_data_dir", "with_prior_preservation")
    prompt, of_class = draft.take("instance_prompt"), draft.take("class_prompt", "")
    if column is not None and name is not None:
        draft.leave("instance_prompt", "the captions of caption_column count")
    elif prior or name is not None:
        draft.leave("instance_prompt", "captions are read from files or a column")
        draft.notes.insert(0, f"captions: write `{prompt}` into a .txt file beside each image of {folder or name}"
                           + (f", and `{of_class}` beside each of class_data_dir" if prior else ""))  # fmt: skip
    else:
        draft.put("captions.prefix", prompt, "instance_prompt")
        draft.put("captions.use", "tags")
        draft.notes.append("instance_prompt stands before whatever .txt files beside the images hold; their script "
                           "reads no such files")  # fmt: skip
    draft.leave("class_prompt", "captions are read from .txt files" if prior else "no images of the class are used")


def _squares(draft: Draft) -> None:
    side = draft.take("resolution", 1024)
    if side % 8:
        raise UserError(f"--resolution {side}: must be a multiple of 8")
    draft.put("data.buckets.resolution", side, "resolution")
    draft.put("data.buckets.min_px", side)
    draft.put("data.buckets.max_px", side)
    if side % 64:
        draft.put("data.buckets.step_px", 8)
    draft.notes.append("diffusers' scripts cut all images to squares, and so does this; wider data.buckets.min_px and "
                       "max_px keep their shapes")  # fmt: skip


def _crops(draft: Draft, *, in_each_step: bool) -> None:
    """The LoRA script draws crops and flips in each step; the others once, when they encode or read the images."""
    flips, centered = draft.take("random_flip"), draft.take("center_crop")
    draft.leave("center_crop", "images are cropped in the middle where nothing else is said")
    if not in_each_step:
        draft.leave("random_flip", "their script mirrors half of the images once, when it reads them; "
                                   "data.mode: images with data.augment does at each visit")  # fmt: skip
        if not centered:
            draft.notes.append("without center_crop, their script cuts each image at a random place once; here in the "
                               "middle, or with data.augment.random_crop at each visit")  # fmt: skip
        return
    if flips:
        draft.put("data.augment.flip_probability", 0.5, "random_flip")
    if not centered:
        draft.put("data.augment.random_crop", True)
    if flips or not centered:
        draft.put("data.mode", "images", "random_flip")
        draft.notes.append("random_flip, and crops where center_crop is not given: images are encoded anew at each "
                           "visit (data.mode: images), as in their script; latents that are stored once are "
                           "faster")  # fmt: skip


def _length(draft: Draft, batch: int, epochs: int) -> int | None:
    draft.put("train.batch_size_per_gpu", draft.take("train_batch_size", batch), "train_batch_size")
    if (passes := draft.take("gradient_accumulation_steps", 1)) != 1:
        draft.put("train.gradient_accumulation_steps", passes, "gradient_accumulation_steps")
    draft.put("train.max_grad_norm", draft.take("max_grad_norm", 1.0), "max_grad_norm")
    if (steps := draft.take("max_train_steps")) is not None:
        draft.put("train.steps", steps, "max_train_steps")
        draft.leave("num_train_epochs", "max_train_steps counts")
        return steps
    draft.put("train.epochs", draft.take("num_train_epochs", epochs), "num_train_epochs")
    return None


def _precision(draft: Draft, of_accelerate: str | None) -> None:
    told = draft.take("mixed_precision") or of_accelerate or "no"
    chosen = {"bf16": "bf16", "fp16": "fp16", "no": "fp32"}.get(told)
    if chosen is None:
        raise UserError(f"--mixed_precision {told}: must be no, fp16 or bf16")
    draft.put("train.precision", chosen, "mixed_precision")


def _learning_rate(draft: Draft, workers: int | None) -> float:
    lr = draft.take("learning_rate", _LR)
    if draft.take("scale_lr"):
        train = draft.sections["train"]
        factor = train["batch_size_per_gpu"] * train.get("gradient_accumulation_steps", 1) * (workers or 1)
        lr *= factor
        draft.put("optimizer.lr", lr, "scale_lr")
        if workers is None:
            draft.notes.append(f"scale_lr: times {factor}, of one process; with N of them take N times optimizer.lr")
    draft.put("optimizer.lr", lr, "learning_rate")
    return lr


def _adapter(draft: Draft, *, is_dreambooth: bool) -> None:
    draft.put("adapter.kind", "dora" if draft.take("use_dora") else "lora", "use_dora")
    if dropout := draft.take("lora_dropout"):
        draft.put("adapter.dropout", dropout, "lora_dropout")
    draft.put("adapter.rank", draft.take("rank", _RANK), "rank")
    text = bool(draft.take("train_text_encoder"))
    of_unet = _targets(draft)
    draft.put(
        "adapter.targets",
        of_unet + (_TEXT_TARGETS if text else []),
        "use_blora" if draft.take("use_blora") else "lora_unet_blocks",
    )
    if text:
        draft.put("adapter.text_encoders", True, "train_text_encoder")
        if is_dreambooth and draft.take("optimizer", "AdamW").lower() != "prodigy":
            draft.put("adapter.text_encoder_lr", draft.take("text_encoder_lr", _TEXT_LR), "text_encoder_lr")
    draft.leave("text_encoder_lr", "has no effect without train_text_encoder, or with Prodigy")
    draft.notes.append("adapter.targets are the four matrices of each attention, as in their script; without them all "
                       "linear layers of the transformers train, as with kohya's scripts")  # fmt: skip


def _targets(draft: Draft) -> list[str]:
    """The four matrices of each attention, or of those in whose names stands what a block has behind its first dot."""
    blocks = draft.take("lora_unet_blocks", "")
    if draft.take("use_blora"):
        draft.leave("lora_unet_blocks", "use_blora counts, which has blocks of its own")
        blocks = _B_LORA
    found = list[str]()
    for block in "".join(blocks.split()).split(",") if blocks else []:
        first, _, rest = block.partition(".")
        found += [f"*{rest}{each}" for each in _UNET_TARGETS]
        if first != "unet":
            draft.notes.append(f"lora_unet_blocks {block}: their script takes off what stands before the first dot, so "
                               f"that all blocks with `{rest}` in their names train; write unet.{block}")  # fmt: skip
    return found or _UNET_TARGETS


def _new_tokens(draft: Draft) -> None:
    """Words with vectors of their own (textual inversion), which its authors call pivotal tuning."""
    own = ("token_abstraction", "num_new_tokens_per_abstraction", "train_text_encoder_ti_frac")
    if not draft.take("train_text_encoder_ti"):
        for option in own:
            draft.leave(option, "has no effect without train_text_encoder_ti")
        return
    if draft.take("train_text_encoder"):
        raise UserError("--train_text_encoder, --train_text_encoder_ti: give one of them, as their script asks")
    words = [word for word in "".join(draft.take("token_abstraction", _WORD).split()).split(",") if word]
    vectors = draft.take("num_new_tokens_per_abstraction", _VECTORS)
    tokens = [{"token": word, "vectors": vectors} for word in words]
    draft.put("new_tokens.tokens", tokens, "train_text_encoder_ti", *own[:2])
    decay = draft.take("adam_weight_decay_text_encoder") or draft.take("adam_weight_decay", _DREAMBOOTH_DECAY)
    draft.put("new_tokens.weight_decay", decay, "adam_weight_decay_text_encoder")
    if draft.sections["optimizer"]["kind"] != "prodigy":
        lr = draft.take("text_encoder_lr", _TEXT_LR) or draft.sections["optimizer"]["lr"]
        draft.put("new_tokens.lr", lr, "text_encoder_lr")
    draft.notes.append(f"new_tokens: {', '.join(words)} in captions and prompts, as whole words, in capitals or not; "
                       "their script pulls the spread of the vectors to the vocabulary's after each step, which is "
                       "not done here")  # fmt: skip
    share = draft.take("train_text_encoder_ti_frac", _TI_SHARE)
    if share < 1:
        draft.notes.append(f"train_text_encoder_ti_frac {share:g}: their script stops the new tokens after this share "
                           "of the epochs, rounded down, so that in a run of one epoch they do not train at all; here "
                           "they train to the end")  # fmt: skip


def _optimizer(draft: Draft, lr: float) -> None:
    if draft.take("optimizer", "AdamW").lower() == "prodigy":
        draft.leave("use_8bit_adam", "is of AdamW")
    else:
        draft.put("optimizer.kind", "adamw_8bit" if draft.take("use_8bit_adam") else "adamw", "use_8bit_adam")
    draft.put("optimizer.lr", lr)
    betas = [draft.take("adam_beta1", 0.9), draft.take("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        draft.put("optimizer.betas", betas, "adam_beta1", "adam_beta2")
    for option, key in (("adam_weight_decay", "weight_decay"), ("adam_epsilon", "eps")):
        if draft.take(option) is not None:
            draft.put(f"optimizer.{key}", draft.take(option), option)


def _dreambooth_optimizer(draft: Draft) -> None:
    """Its own defaults, and Prodigy."""
    decay = draft.take("adam_weight_decay", _DREAMBOOTH_DECAY)
    draft.put("optimizer.weight_decay", decay, "adam_weight_decay")
    named = draft.take("optimizer", "AdamW").lower()
    if named not in ("adamw", "prodigy"):
        raise UserError(f"--optimizer {draft.take('optimizer')}: must be AdamW or prodigy")
    if named == "adamw":
        draft.leave("optimizer", "AdamW is the default")
        return
    draft.put("optimizer.kind", "prodigy", "optimizer")
    for option, key in (("prodigy_use_bias_correction", "bias_correction"),
                        ("prodigy_safeguard_warmup", "safeguard_warmup")):  # fmt: skip
        # Their parser takes any word, also `False`, as true.
        draft.put(f"optimizer.{key}", draft.take(option, "True") != "", option)
    if (beta := draft.take("prodigy_beta3")) is not None:
        draft.put("optimizer.beta3", beta, "prodigy_beta3")
    if not 0.1 <= draft.sections["optimizer"]["lr"] <= 10:
        draft.notes.append("learning_rate: Prodigy finds it itself, and a factor of about 1 is expected; 1 is taken")
        draft.put("optimizer.lr", 1.0, "learning_rate")


def _schedule(draft: Draft, steps: int | None, workers: int | None) -> None:
    named, warmup = draft.take("lr_scheduler", "constant"), draft.take("lr_warmup_steps", _WARMUP)
    shapes = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
              "polynomial": "linear"}  # fmt: skip
    shape = shapes.get(named, "cosine" if "cosine" in named else "constant")
    if named not in shapes:
        draft.notes.append(f"lr_scheduler {named}: is not here; {shape} is the nearest")
    draft.put("lr_schedule.kind", shape, "lr_scheduler")
    if named == "constant":
        draft.leave("lr_warmup_steps", "`constant` has none in their scripts; constant_with_warmup has")
    elif steps is not None and warmup >= steps:
        draft.leave("lr_warmup_steps", f"the run has {steps} steps, and would end within the warm-up")
    elif warmup:
        draft.put("lr_schedule.warmup_steps", warmup, "lr_warmup_steps")
        if workers != 1:
            draft.notes.append(f"lr_warmup_steps: accelerate's scheduler ticks once per process, so that on N cards "
                               f"their warm-up is shorter; here it takes {warmup} optimizer steps")  # fmt: skip


def _objective(draft: Draft) -> None:
    kind = draft.take("prediction_type")
    if kind is not None:
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"--prediction_type {kind}: must be epsilon or v_prediction")
        draft.put("objective.prediction", kind, "prediction_type")
    if (gamma := draft.take("snr_gamma")) is not None:
        draft.put("objective.weighting.kind", "min_snr", "snr_gamma")
        draft.put("objective.weighting.gamma", gamma, "snr_gamma")
    if offset := draft.take("noise_offset"):
        draft.put("objective.noise.offset", offset, "noise_offset")


def _saving(draft: Draft, *, has_adapter: bool) -> None:
    draft.put("checkpoint.every_steps", draft.take("checkpointing_steps", _SAVE_EVERY), "checkpointing_steps")
    if (most := draft.take("checkpoints_total_limit")) is not None:
        draft.put("checkpoint.keep", max(most, 2), "checkpoints_total_limit")
    draft.put("checkpoint.export.when", "end")
    if draft.take("use_ema") and not has_adapter:
        draft.put("ema.averages", [{"kind": "plain", "decay": 0.9999}], "use_ema")
        draft.put("checkpoint.export.weights", "ema", "use_ema")
    draft.leave("use_ema", "is of the script that trains the whole UNet")


def _number(draft: Draft, option: str, default: int) -> int:
    text = str(draft.take(option, default))
    if not text.isdecimal():
        raise UserError(f"--{option} {text}: must be a whole number")
    return max(int(text), 1)


def _samples(draft: Draft) -> None:
    if prompt := draft.take("validation_prompt"):
        every = draft.take("checkpointing_steps", _SAVE_EVERY)
        draft.put(
            "samples.prompts", [prompt] * min(_number(draft, "num_validation_images", 4), 64), "validation_prompt"
        )
        draft.put("samples.every_steps", every, "validation_prompt")
        draft.notes.append(f"samples are drawn every {every} steps, as checkpoints are written; their scripts go by "
                           "epochs (validation_epochs)")  # fmt: skip
    told = draft.take("report_to", "tensorboard")
    if told in ("wandb", "all"):
        draft.put("log.trackers", ["tensorboard", "wandb"], "report_to")
    elif told == "mlflow":
        draft.put("log.trackers", ["tensorboard", "mlflow"], "report_to")
    draft.leave("report_to", "TensorBoard's files are written where nothing else is said" if told == "tensorboard" else
                f"{told} is not here; log.trackers may be tensorboard, wandb, mlflow and csv")  # fmt: skip
