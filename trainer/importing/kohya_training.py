"""Precision, learning rates, optimizer, objective, saving and samples of kohya's options."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from trainer.config.prompt_file import read_prompts
from trainer.config.prompt_settings import sampler_of
from trainer.errors import UserError
from trainer.importing.draft_end import found_beside
from trainer.importing.given import Draft

_KINDS = {
    "adamw": "adamw", "adamw8bit": "adamw_8bit", "pagedadamw": "adamw", "pagedadamw32bit": "adamw",
    "pagedadamw8bit": "adamw_8bit", "lion": "lion", "lion8bit": "lion_8bit", "pagedlion8bit": "lion_8bit",
    "adafactor": "adafactor", "came": "came", "prodigy": "prodigy", "dadaptation": "dadapt_adam",
    "dadaptadam": "dadapt_adam", "dadaptadampreprint": "dadapt_adam", "adamwschedulefree": "schedule_free_adamw",
    "stableadamw": "stable_adamw", "adopt": "adopt", "muon": "muon",
}  # fmt: skip
_ARGUMENTS = {
    "weight_decay": "weight_decay", "betas": "betas", "eps": "eps", "d0": "d0", "d_coef": "d_coef",
    "growth_rate": "growth_rate", "use_bias_correction": "bias_correction", "safeguard_warmup": "safeguard_warmup",
    "clip_threshold": "clip_threshold", "scale_parameter": "scale_by_weights", "momentum": "momentum",
    "nesterov": "nesterov", "ns_steps": "ns_steps",
}  # fmt: skip
# What holds here, so that nothing has to be said.
_HOLDS = {"relative_step": "false", "warmup_init": "false", "decouple": "true", "amsgrad": "false", "foreach": "false",
          "fixed_decay": "false", "cautious": "false"}  # fmt: skip
_FINDS_LR = ("prodigy", "dadapt_adam")
_USUAL_LR = 2e-6  # of sd-scripts


def precision_of_options(draft: Draft, *, has_adapter: bool) -> None:
    """`train.precision`."""
    mixed = draft.take("mixed_precision", "no")
    if draft.take("full_bf16") and not has_adapter:
        draft.put("train.precision", "bf16_stochastic", "full_bf16", "mixed_precision")
        draft.notes.append(
            "full_bf16 rounds each new weight to the nearest bf16 number, so that at usual learning rates most updates "
            "are lost: bf16_stochastic takes as much memory and loses none on average; `bf16` keeps fp32 weights"
        )
        return
    named = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "fp8": "bf16"}
    chosen = "bf16" if draft.take("full_bf16") else "fp16" if draft.take("full_fp16") else named.get(mixed)
    if chosen is None:
        raise UserError(f"--mixed_precision {mixed}: must be no, fp16 or bf16")
    draft.put("train.precision", chosen, "mixed_precision", "full_bf16", "full_fp16")
    if draft.take("full_fp16"):
        draft.notes.append("full_fp16 updates fp16 weights, which loses small updates: fp16 keeps fp32 weights here")
    if draft.take("fp8_base"):
        draft.leave("fp8_base", "frozen weights are held in the precision of the passes")


def rates_of_full_training(draft: Draft) -> None:
    """What `sdxl_train.py` trains, and how fast."""
    lr = draft.take("learning_rate", _USUAL_LR)
    trains_text = bool(draft.take("train_text_encoder"))
    texts = [draft.take(f"learning_rate_te{number}", lr) if trains_text else 0.0 for number in (1, 2)]
    rates = [rate for rate in (lr, *texts) if rate > 0]
    if not rates:
        raise UserError("--learning_rate 0: nothing would train")
    base = lr if lr > 0 else rates[0]
    draft.put("optimizer.lr", base, "learning_rate")
    if lr == 0:
        draft.put("trainable.unet.train", False, "learning_rate")
    for number, rate in zip((1, 2), texts, strict=True):
        if rate > 0:
            draft.put(f"trainable.text_encoder_{number}.train", True, "train_text_encoder")
            if rate != base:
                draft.put(f"trainable.text_encoder_{number}.lr", rate, f"learning_rate_te{number}")
        elif trains_text:
            draft.leave(f"learning_rate_te{number}", "0: it does not train, which is the default")
    if (blocks := draft.take("block_lr")) is not None:
        _block_rates(draft, blocks, base)


def _block_rates(draft: Draft, text: str, lr: float) -> None:
    try:
        rates = [float(each) for each in text.split(",")]
    except ValueError:
        rates = []
    if len(rates) != 23:
        raise UserError(f"--block_lr {text}: must be 23 numbers with commas between")
    names = [*(f"input_blocks.{i}" for i in range(9)), *(f"middle_block.{i}" for i in range(3))]
    names += [*(f"output_blocks.{i}" for i in range(9)), "out"]
    scales = {"time_embed": rates[0] / lr, "label_emb": rates[0] / lr}
    scales |= {name: rate / lr for name, rate in zip(names, rates[1:], strict=True)}
    draft.put("trainable.unet.lr_scale", {name: round(s, 9) for name, s in scales.items() if s != 1}, "block_lr")


def rates_of_adapter(draft: Draft) -> None:
    """What `sdxl_train_network.py` trains."""
    module, arguments = draft.take("network_module", "networks.lora"), _pairs(draft, "network_args")
    algorithm = str(arguments.pop("algo", "lora")).lower()
    is_conv = "conv_dim" in arguments
    kinds = {"loha": "loha", "lokr": "lokr", "diag-oft": "oft", "oft": "oft"}
    kind = "oft" if module == "networks.oft" else kinds.get(algorithm, "locon" if is_conv else "lora")
    if str(arguments.pop("dora_wd", "")).lower() == "true":
        kind = "dora"
    if module not in ("networks.lora", "networks.oft", "lycoris.kohya") or algorithm not in (
        "lora", "locon", "loha", "lokr", "diag-oft", "oft"
    ):  # fmt: skip
        draft.notes.append(f"network_module {module}, algo {algorithm}: is not here; {kind} is the nearest")
    draft.put("adapter.kind", kind, "network_module")
    rank = draft.take("network_dim", 4)
    draft.put("adapter.rank", rank, "network_dim")
    if kind != "oft":
        draft.put("adapter.alpha", draft.take("network_alpha", 1.0), "network_alpha")
    if draft.take("network_alpha") is None and kind != "oft":
        draft.notes.append(f"network_alpha is 1 where it is not given: the adapter counts 1/{rank} times")
    takes_dropout = kind in ("lora", "locon", "dora")
    if (dropout := draft.take("network_dropout")) and takes_dropout:
        draft.put("adapter.dropout", dropout, "network_dropout")
    draft.leave("network_dropout", f"{kind} has no dropout here")
    for name, key, read in (("conv_dim", "conv_rank", int), ("conv_alpha", "conv_alpha", float),
                            ("factor", "lokr_factor", int), ("dropout", "dropout", float)):  # fmt: skip
        if name == "dropout" and not takes_dropout:
            continue
        if name in arguments and (key != "lokr_factor" or int(arguments[name]) >= 2):
            draft.put(f"adapter.{key}", read(arguments.pop(name)), "network_args")
    if arguments:
        draft.notes.append(f"network_args {', '.join(arguments)}: nothing like it here")
    if file := draft.take("network_weights"):
        draft.put("adapter.initial", file, "network_weights")
    if draft.take("base_weights"):
        draft.leave("base_weights", "put them into the model first: `sdxl-train adapter merge`")
        draft.leave("base_weights_multiplier", "see base_weights")
    if draft.take("network_train_text_encoder_only"):
        raise UserError("--network_train_text_encoder_only: an adapter is always on the UNet as well; leave it out")
    _adapter_rates(draft)


def _adapter_rates(draft: Draft) -> None:
    lr = draft.take("unet_lr") or draft.take("learning_rate", _USUAL_LR)
    draft.put("optimizer.lr", lr, "learning_rate", "unet_lr")
    texts = [float(each) for each in draft.take("text_encoder_lr", [])]
    cached = draft.take("cache_text_encoder_outputs") or draft.take("cache_text_encoder_outputs_to_disk")
    with_text = not draft.take("network_train_unet_only") and not cached and texts[:1] != [0.0]
    if with_text:
        draft.put("adapter.text_encoders", True)
        if (rate := texts[0] if texts else draft.take("learning_rate", lr)) != lr:
            draft.put("adapter.text_encoder_lr", rate, "text_encoder_lr")
        if len({*texts}) > 1:
            draft.notes.append("text_encoder_lr: both text encoders have one rate here; the first is taken")
    draft.leave("network_train_unet_only", "text encoders have no adapter by default (adapter.text_encoders)")


def optimizer_of_options(draft: Draft) -> str:
    """`optimizer` but for its learning rate; its kind."""
    named = draft.take("optimizer_type", "")
    if not named:
        named = "AdamW8bit" if draft.take("use_8bit_adam") else "Lion" if draft.take("use_lion_optimizer") else "AdamW"
    plain = named.rpartition(".")[2].lower().replace("_", "")
    kind = _KINDS.get(plain)
    if kind is None:
        kind = "adamw_8bit" if "8bit" in plain else "adamw"
        draft.notes.append(f"optimizer_type {named}: is not here; {kind} is the nearest, maybe at other rates")
    draft.put("optimizer.kind", kind, "optimizer_type", "use_8bit_adam", "use_lion_optimizer")
    arguments = _pairs(draft, "optimizer_args")
    if kind == "lion" and "weight_decay" not in arguments:
        draft.put("optimizer.weight_decay", 0.0)  # as the library behind kohya's Lion has it
    for name, text in arguments.items():
        if _HOLDS.get(name) == text.lower():
            continue
        if (key := _ARGUMENTS.get(name)) is None:
            why = "relative steps ignored the learning rates that were given; here they count" if (
                name == "relative_step" and str(text) == "True") else "nothing like it here"  # fmt: skip
            draft.notes.append(f"optimizer_args {name}={text}: {why}")
            continue
        value = _literal(text)
        draft.put(f"optimizer.{key}", list(value) if isinstance(value, tuple) else value, "optimizer_args")
    if kind in _FINDS_LR and not 0.1 <= draft.sections["optimizer"]["lr"] <= 10:
        draft.notes.append(f"learning_rate: {kind} finds it itself, and a factor of about 1 is expected; 1 is taken")
        draft.put("optimizer.lr", 1.0, "learning_rate")
    return kind


def schedule_of_options(draft: Draft, kind: str, steps: int | None, workers: int | None) -> None:
    """`lr_schedule`."""
    if kind == "schedule_free_adamw":
        draft.leave("lr_scheduler", "schedule-free optimizers have none")
    named = draft.take("lr_scheduler", "constant")
    shapes = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
    shape = shapes.get(named)
    if named == "polynomial" and draft.take("lr_scheduler_power", 1) == 1:
        shape = "linear"
    if shape is None:
        shape = "cosine" if "cosine" in named else "linear" if named == "polynomial" else "constant"
        draft.notes.append(f"lr_scheduler {named}: is not here; {shape} is the nearest")
    if kind != "schedule_free_adamw":
        draft.put("lr_schedule.kind", shape, "lr_scheduler")
    ratio = draft.take("lr_scheduler_min_lr_ratio")
    if ratio is not None and shape != "constant":
        draft.put("lr_schedule.final_ratio", ratio, "lr_scheduler_min_lr_ratio")
    warmup = draft.take("lr_warmup_steps", 0)
    if 0 < warmup < 1:
        if steps is None:
            draft.notes.append(f"lr_warmup_steps {warmup}: a share of a run whose steps follow from its images; set it")
            return
        warmup = int(warmup * steps)
    if steps is not None and warmup >= steps:
        draft.leave("lr_warmup_steps", f"the run has {steps} steps, and would end within the warm-up")
        return
    if warmup and (named != "constant" or draft.take("lr_scheduler") is None):
        draft.put("lr_schedule.warmup_steps", int(warmup), "lr_warmup_steps")
        if workers is None or workers > 1:
            draft.notes.append(
                f"lr_warmup_steps: kohya's scheduler ticked once per process, so that on N cards the warm-up was over "
                f"after {int(warmup)} / N steps; here it takes {int(warmup)}"
            )


def objective_of_options(draft: Draft) -> None:
    """`objective`."""
    draft.put("objective.prediction", "v_prediction" if draft.take("v_parameterization") else "epsilon",
              "v_parameterization")  # fmt: skip
    if draft.take("zero_terminal_snr"):
        if draft.take("v_parameterization"):
            draft.put("objective.zero_terminal_snr", True, "zero_terminal_snr")
        else:
            draft.notes.append(
                "zero_terminal_snr without v_parameterization: where there is nothing but noise, epsilon says nothing "
                "of the image; left out"
            )
    weightings = [name for name in ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")
                  if draft.take(name)]  # fmt: skip
    for name in weightings[:1]:
        kind = {"min_snr_gamma": "min_snr", "debiased_estimation_loss": "debiased"}.get(name, "like_epsilon")
        draft.put("objective.weighting.kind", kind, name)
        if kind == "min_snr":
            draft.put("objective.weighting.gamma", draft.take(name), name)
    for name in weightings[1:]:
        draft.leave(name, f"there is one weighting; {weightings[0]} is taken")
    draft.leave("v_pred_like_loss", "an added share of v's loss is not here; objective.weighting is the like of it")
    for name, key in (("min_timestep", "min"), ("max_timestep", "max")):
        if draft.take(name) is not None:
            draft.put(f"objective.timesteps.{key}", draft.take(name), name)
    if (loss := draft.take("loss_type", "l2")) != "l2":
        draft.put("objective.loss.kind", loss, "loss_type")
        if loss in ("huber", "smooth_l1"):
            draft.put("objective.loss.delta", draft.take("huber_c", 0.1), "huber_c")
            draft.put("objective.loss.delta_schedule", draft.take("huber_schedule", "snr"), "huber_schedule")
    offsets = {"noise_offset": "offset", "adaptive_noise_scale": "offset_adaptive"}
    others = {"multires_noise_iterations": "pyramid_levels", "ip_noise_gamma": "perturbation"}
    if draft.take("multires_noise_iterations"):
        for name in offsets:
            draft.leave(name, "the coarsest level of multires_noise_iterations is an offset, and is taken")
    elif draft.take("noise_offset"):
        others = offsets | others
    for name, key in others.items():
        if draft.take(name):
            draft.put(f"objective.noise.{key}", draft.take(name), name)
    if draft.take("multires_noise_iterations") and draft.take("multires_noise_discount"):
        draft.put("objective.noise.pyramid_discount", draft.take("multires_noise_discount"), "multires_noise_discount")


def saving_of_options(draft: Draft) -> None:
    """`checkpoint`, and files to publish."""
    every, precision = draft.take("save_every_n_steps"), draft.take("save_precision")
    draft.put("checkpoint.export.when", "checkpoints" if every else "end", *(["save_every_n_steps"] if every else []))
    if every:
        draft.put("checkpoint.every_steps", every, "save_every_n_steps")
        if kept := draft.take("save_last_n_steps"):
            draft.put("checkpoint.export.keep", max(1, kept // every), "save_last_n_steps")
    elif draft.take("save_every_n_epochs"):
        draft.leave("save_every_n_epochs", "files are written by steps (checkpoint.every_steps), and at the end")
    names = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
    if precision in names:
        draft.put("checkpoint.export.dtype", names[precision], "save_precision")
    if draft.take("save_model_as", "safetensors") != "safetensors":
        draft.leave("save_model_as", "files are safetensors; `sdxl-train export --layout diffusers` writes a folder")
    for name in ("title", "author", "license"):
        if text := draft.take(f"metadata_{name}"):
            draft.put(f"checkpoint.export.{name}", text, f"metadata_{name}")
    for name in ("description", "tags", "usage_hint", "trigger_phrase", "thumbnail"):
        draft.leave(f"metadata_{name}", f"`sdxl-train export --{name.replace('_', '-')}` writes it")


def samples_of_options(draft: Draft, folder: Path) -> None:
    """`samples` and `validation`; a file of prompts may lie in `folder`."""
    if every := draft.take("sample_every_n_steps"):
        draft.put("samples.every_steps", every, "sample_every_n_steps")
        if file := draft.take("sample_prompts"):
            _prompt_file(draft, found_beside(file, folder))
        if word := draft.take("sample_sampler"):
            _sampler(draft, word)
    draft.leave("sample_every_n_epochs", "samples are drawn by steps (samples.every_steps)")
    if (every := draft.take("validate_every_n_steps")) and draft.take("validation_split"):
        draft.put("validation.every_steps", every, "validate_every_n_steps")
    draft.leave("validate_every_n_epochs", "validation goes by steps (validation.every_steps)")
    _trackers(draft)


def _trackers(draft: Draft) -> None:
    tracker = draft.take("log_with", "tensorboard")
    if tracker in ("wandb", "all"):
        draft.put("log.trackers", ["tensorboard", "wandb"], "log_with")
        for option, key in (("wandb_run_name", "name"), ("log_tracker_name", "wandb.project")):
            if draft.take(option):
                draft.put(f"log.{key}", str(draft.take(option)), option)
    draft.leave("log_with", f"{tracker}: TensorBoard's files are written where nothing else is said (log.trackers)")


def _prompt_file(draft: Draft, path: Path) -> None:
    """A file of prompts is read as it is, whatever its kind."""
    try:
        read_prompts(path)
    except UserError as error:
        first, *others = error.lines
        more = f", and {len(others)} more" if others else ""
        draft.notes.append(f"sample_prompts: {first}{more}; once that is mended: samples.prompt_file")
        draft.leave("sample_prompts", "could not be read as it is; captions of the data are drawn")
        return
    draft.put("samples.prompt_file", str(path), "sample_prompts")


def _sampler(draft: Draft, word: str) -> None:
    try:
        name, schedule = sampler_of(word)
    except ValueError as error:
        draft.leave("sample_sampler", f"{error}; samples are drawn by Euler's method")
        return
    draft.put("samples.sampler", name, "sample_sampler")
    if schedule:
        draft.put("samples.schedule", schedule, "sample_sampler")


def _pairs(draft: Draft, option: str) -> dict[str, str]:
    found = {}
    for word in draft.take(option, []):
        name, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"--{option} {word}: must be name=value")
        found[name.strip()] = text.strip()
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
