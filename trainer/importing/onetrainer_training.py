"""What OneTrainer's settings train, how fast, and towards what."""

from __future__ import annotations

from typing import Any

from trainer.config.sections.optimizer_config import FINDS_LR, KIND_DEFAULTS
from trainer.errors import UserError
from trainer.importing.given import Draft
from trainer.importing.onetrainer_settings import number, whole, word

_KINDS = {
    "ADAM": "adamw", "ADAMW": "adamw", "ADAMW_8BIT": "adamw_8bit", "ADAM_8BIT": "adamw_8bit", "ADAMW_ADV": "adamw",
    "LION": "lion", "LION_8BIT": "lion_8bit", "LION_ADV": "lion", "ADAFACTOR": "adafactor", "CAME": "came",
    "CAME_8BIT": "came", "PRODIGY": "prodigy", "PRODIGY_ADV": "prodigy", "PRODIGY_PLUS_SCHEDULE_FREE": "prodigy",
    "DADAPT_ADAM": "dadapt_adam", "SCHEDULE_FREE_ADAMW": "schedule_free_adamw", "ADOPT": "adopt", "ADOPT_ADV": "adopt",
    "MUON": "muon", "MUON_ADV": "muon", "ADAMUON_ADV": "muon",
}  # fmt: skip
_SAME = {"ADAMW", "ADAMW_8BIT", "LION", "LION_8BIT", "ADAFACTOR", "CAME", "PRODIGY", "DADAPT_ADAM",
         "SCHEDULE_FREE_ADAMW", "ADOPT", "MUON"}  # fmt: skip
_NUMBERS = {
    "eps": "eps", "eps2": "eps2", "weight_decay": "weight_decay", "beta3": "beta3", "clip_threshold": "clip_threshold",
    "decay_rate": "decay_rate", "d0": "d0", "d_coef": "d_coef", "growth_rate": "growth_rate", "momentum": "momentum",
}  # fmt: skip
_FLAGS = {"use_bias_correction": "bias_correction", "safeguard_warmup": "safeguard_warmup", "nesterov": "nesterov",
          "scale_parameter": "scale_by_weights"}  # fmt: skip
_PARTS = {"unet": "unet", "text_encoder": "text_encoder_1", "text_encoder_2": "text_encoder_2"}
_USUAL_LR, _USUAL_WARMUP = 3e-6, 200.0


def rates_of_settings(draft: Draft, method: str, epochs: int) -> None:
    """What trains, and its learning rates."""
    base = number(draft, "learning_rate", _USUAL_LR) or _USUAL_LR
    base *= _scale(draft)
    if method == "LORA":
        _adapter(draft, base)
    elif method == "EMBEDDING":
        draft.put("optimizer.lr", base, "learning_rate")
        draft.put("trainable.unet.train", False, "training_method")
    else:
        _full(draft, base, epochs)
    _new_tokens(draft, method, base)


def _scale(draft: Draft) -> float:
    scaler, train = word(draft, "learning_rate_scaler", "NONE"), draft.sections["train"]
    batch, passes = train["batch_size_per_gpu"], train.get("gradient_accumulation_steps", 1)
    workers = draft.sections.get("launch", {}).get("workers", 1)
    factors = {"NONE": 1, "BATCH": batch, "GLOBAL_BATCH": batch * workers, "GRADIENT_ACCUMULATION": passes,
               "BOTH": batch * passes, "GLOBAL_BOTH": batch * passes * workers}  # fmt: skip
    if scaler not in factors:
        raise UserError(f"learning_rate_scaler = {scaler}: must be one of {', '.join(factors)}")
    draft.leave("learning_rate_scaler", f"learning rates are written times {factors[scaler]}")
    return factors[scaler]


def _full(draft: Draft, base: float, epochs: int) -> None:
    rates = {part: (number(draft, f"{part}.learning_rate", None) or base / _scale(draft)) * _scale(draft)
             if draft.take(f"{part}.train", True) else 0.0 for part in _PARTS}  # fmt: skip
    trained = [part for part in _PARTS if rates[part] > 0]
    if not trained:
        raise UserError("unet.train, text_encoder.train, text_encoder_2.train: all are false; nothing would train")
    lr = rates[trained[0]]
    draft.put("optimizer.lr", lr, "learning_rate", f"{trained[0]}.learning_rate")
    for part, ours in _PARTS.items():
        if part not in trained:
            if part == "unet":
                draft.put("trainable.unet.train", False, "unet.train")
            draft.leave(f"{part}.train", "it does not train, which is the default")
            continue
        draft.put(f"trainable.{ours}.train", True, f"{part}.train")
        if rates[part] != lr:
            draft.put(f"trainable.{ours}.lr", rates[part], f"{part}.learning_rate")
        _until(draft, part, ours, epochs)
    if patterns := _filter(draft):
        draft.put("trainable.unet.only", patterns, "layer_filter_preset", "layer_filter")


def _until(draft: Draft, part: str, ours: str, epochs: int) -> None:
    """When a part stops."""
    usual = (0, "NEVER") if part == "unet" else (30, "EPOCH")
    amount = number(draft, f"{part}.stop_training_after", usual[0])
    unit = word(draft, f"{part}.stop_training_after_unit", usual[1])
    names = (f"{part}.stop_training_after", f"{part}.stop_training_after_unit")
    if unit == "EPOCH" and amount and amount < epochs:
        draft.put(f"trainable.{ours}.stop_at", round(amount / epochs, 6), *names)
    elif unit == "STEP" and amount:
        draft.put(f"trainable.{ours}.stop_at", int(amount), *names)
    elif unit in ("SECOND", "MINUTE", "HOUR"):
        draft.notes.append(f"{names[0]} = {amount:g} {unit}: stop_at is in steps, or a share of the run")
    for name in names:
        draft.leave(name, "it trains to the end")


def _filter(draft: Draft) -> list[str]:
    """Patterns of the layers that train; [] for all."""
    preset, text = str(draft.take("layer_filter_preset", "full")), str(draft.take("layer_filter", ""))
    if preset == "full":
        return []
    named = {"attn-mlp": ["*attentions*"], "attn-only": ["*attn*"]}
    if preset in named:
        return named[preset]
    if draft.take("layer_filter_regex"):
        draft.notes.append(f"layer_filter {text}: regular expressions are not read; patterns with * are")
        return []
    return [f"*{word.strip()}*" for word in text.split(",") if word.strip()]


def _adapter(draft: Draft, base: float) -> None:
    peft = word(draft, "peft_type", "LORA")
    preset = str(draft.take("layer_filter_preset", "full"))
    kind = {"LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}.get(
        peft, "dora" if draft.take("lora_decompose") else "lora"
    )
    has_convolutions = preset == "full" and kind in ("lora", "dora", "loha", "lokr")
    kind = "locon" if has_convolutions and kind == "lora" else kind
    draft.put("adapter.kind", kind, "peft_type", "lora_decompose")
    if kind == "oft":
        draft.put("adapter.rank", whole(draft, "oft_block_size", 32), "oft_block_size")
    else:
        name = "lokr_dim" if kind == "lokr" and "lokr_dim" in draft.given else "lora_rank"
        rank = whole(draft, name, 16)
        draft.put("adapter.rank", rank, name)
        draft.put("adapter.alpha", number(draft, "lora_alpha", 1.0), "lora_alpha")
        if has_convolutions and kind != "locon":
            draft.put("adapter.conv_rank", rank)
    if kind == "lokr" and whole(draft, "lokr_decompose_factor", -1) >= 2:
        draft.put("adapter.lokr_factor", whole(draft, "lokr_decompose_factor", -1), "lokr_decompose_factor")
    if (dropout := number(draft, "dropout_probability", 0.0)) and kind in ("lora", "locon", "dora"):
        draft.put("adapter.dropout", dropout, "dropout_probability")
    if preset != "full" and preset != "attn-mlp" and (patterns := _filter(draft)):
        draft.put("adapter.targets", patterns, "layer_filter_preset", "layer_filter")
    draft.leave("layer_filter_preset", "attn-mlp are all linear layers of the transformers, as always"
                if preset == "attn-mlp" else f"full is adapter.kind {kind}: convolutions too")  # fmt: skip
    if file := draft.take("lora_model_name"):
        draft.put("adapter.initial", str(file), "lora_model_name")
    scale = _scale(draft)
    lr = (number(draft, "unet.learning_rate", None) or base / scale) * scale
    draft.put("optimizer.lr", lr, "learning_rate", "unet.learning_rate")
    trained = [part for part in ("text_encoder", "text_encoder_2") if draft.take(f"{part}.train", True)]
    if trained:
        draft.put("adapter.text_encoders", True, *(f"{part}.train" for part in trained))
        rate = (number(draft, f"{trained[0]}.learning_rate", None) or base / scale) * scale
        if rate != lr:
            draft.put("adapter.text_encoder_lr", rate, *(f"{part}.learning_rate" for part in trained))
        if len(trained) == 1:
            draft.notes.append("one text encoder trains: here both have an adapter, or none")
    for part in ("text_encoder", "text_encoder_2"):
        draft.leave(f"{part}.train", "text encoders have no adapter by default (adapter.text_encoders)")
    if not draft.take("unet.train", True):
        draft.notes.append("unet.train = false: an adapter is always on the UNet as well")


def _new_tokens(draft: Draft, method: str, base: float) -> None:
    names = ["embedding"] if method == "EMBEDDING" else []
    entries = [{k.partition(".")[2]: v for k, v in draft.given.items() if k.startswith("embedding.")}] if names else []
    further = draft.take("additional_embeddings") or []
    entries += [each for each in further if isinstance(each, dict) and each.get("train", True)]
    tokens: list[dict[str, Any]] = []
    for entry in entries:
        token: dict[str, Any] = {"token": str(entry.get("placeholder", "<embedding>"))}
        token["vectors"] = int(entry.get("token_count") or 1)
        if file := entry.get("model_name"):
            token["file"] = str(file)
        elif text := str(entry.get("initial_embedding_text", "*")).strip():
            token["initial"] = text
        tokens.append(token)
    if tokens:
        embedding = [name for name in draft.given if name.startswith("embedding.")]
        draft.put("new_tokens.tokens", tokens, "additional_embeddings", *embedding)
        rate = number(draft, "embedding_learning_rate", None) or base
        if _KINDS.get(word(draft, "optimizer.optimizer", "ADAMW")) not in FINDS_LR:
            draft.put("new_tokens.lr", rate, "embedding_learning_rate")
        draft.leave("embedding_learning_rate", "the optimizer finds one learning rate for all")
    draft.leave("embedding_learning_rate", "no embedding trains")


def optimizer_of_settings(draft: Draft) -> str:
    """`optimizer` but for its learning rate; its kind."""
    named = word(draft, "optimizer.optimizer", "ADAMW")
    kind = _KINDS.get(named, "adamw_8bit" if "8BIT" in named else "adamw")
    if named not in _SAME:
        draft.notes.append(f"optimizer {named}: is not here; {kind} is the nearest, maybe at other rates")
    draft.put("optimizer.kind", kind, "optimizer.optimizer")
    takes = KIND_DEFAULTS[kind]
    betas = [number(draft, "optimizer.beta1", None), number(draft, "optimizer.beta2", None)]
    if "betas" in takes and None not in betas and tuple(betas) != takes["betas"]:
        draft.put("optimizer.betas", betas, "optimizer.beta1", "optimizer.beta2")
    for option, key in _NUMBERS.items():
        value = number(draft, f"optimizer.{option}", None)
        value = abs(value) if option == "decay_rate" and value is not None else value
        if value is not None and key in takes and value != takes[key]:
            draft.put(f"optimizer.{key}", value, f"optimizer.{option}")
    for option, key in _FLAGS.items():
        value = draft.take(f"optimizer.{option}")
        if isinstance(value, bool) and key in takes and value != takes[key]:
            draft.put(f"optimizer.{key}", value, f"optimizer.{option}")
    if "ns_steps" in takes and draft.take("optimizer.ns_steps"):
        draft.put("optimizer.ns_steps", whole(draft, "optimizer.ns_steps", 5), "optimizer.ns_steps")
    if kind in FINDS_LR and not 0.1 <= draft.sections["optimizer"]["lr"] <= 10:
        draft.notes.append(f"learning_rate: {kind} finds it itself, and a factor of about 1 is expected; 1 is taken")
        draft.put("optimizer.lr", 1.0, "learning_rate")
    if draft.take("optimizer.fused_back_pass"):
        train, alone = draft.sections["train"], draft.sections.get("launch", {}).get("workers") == 1
        if (
            alone
            and "gradient_accumulation_steps" not in train
            and train["precision"] != "fp16"
            and kind not in FINDS_LR
        ):
            draft.put("memory.release_gradients", True, "optimizer.fused_back_pass")
        draft.leave("optimizer.fused_back_pass", "memory.release_gradients is the like of it, for one worker "
                                                 "(launch.workers: 1) and one pass a step")  # fmt: skip
    return kind


def schedule_of_settings(draft: Draft, kind: str) -> None:
    """`lr_schedule`; the run's steps follow from its images, so that a warm-up is one of steps."""
    named = word(draft, "learning_rate_scheduler", "CONSTANT")
    shape = {"CONSTANT": "constant", "LINEAR": "linear", "COSINE": "cosine"}.get(named)
    if shape is None:
        shape = "cosine" if "COSINE" in named else "linear" if named == "REX" else "constant"
        draft.notes.append(f"learning_rate_scheduler {named}: is not here; {shape} is the nearest")
    if kind == "schedule_free_adamw":
        draft.leave("learning_rate_scheduler", "schedule-free optimizers have none")
    else:
        draft.put("lr_schedule.kind", shape, "learning_rate_scheduler")
        if (ratio := number(draft, "learning_rate_min_factor", 0.0)) and shape != "constant":
            draft.put("lr_schedule.final_ratio", ratio, "learning_rate_min_factor")
    warmup = number(draft, "learning_rate_warmup_steps", _USUAL_WARMUP) or 0.0
    if 0 < warmup <= 1:
        draft.notes.append(f"learning_rate_warmup_steps {warmup:g}: a share of steps that follow from the images; "
                           "set lr_schedule.warmup_steps")  # fmt: skip
    elif warmup:
        passes = draft.sections["train"].get("gradient_accumulation_steps", 1)
        if steps := int(warmup / passes):
            draft.put("lr_schedule.warmup_steps", steps, "learning_rate_warmup_steps")


def objective_of_settings(draft: Draft) -> None:
    """`objective` but for masks."""
    for option, kind in (("force_v_prediction", "v_prediction"), ("force_epsilon_prediction", "epsilon")):
        if draft.take(option):
            draft.put("objective.prediction", kind, option)
    if draft.take("rescale_noise_scheduler_to_zero_terminal_snr"):
        draft.put("objective.prediction", "v_prediction", "rescale_noise_scheduler_to_zero_terminal_snr")
        draft.put("objective.zero_terminal_snr", True, "rescale_noise_scheduler_to_zero_terminal_snr")
    _loss(draft)
    name, strength = word(draft, "loss_weight_fn", "CONSTANT"), number(draft, "loss_weight_strength", 5.0)
    weighting = {"MIN_SNR_GAMMA": "min_snr", "DEBIASED_ESTIMATION": "debiased", "P2": "p2"}.get(name)
    if weighting:
        draft.put("objective.weighting.kind", weighting, "loss_weight_fn")
        if weighting != "debiased":
            draft.put("objective.weighting.gamma", strength, "loss_weight_strength")
    elif name != "CONSTANT":
        draft.notes.append(f"loss_weight_fn {name}: is not here; objective.weighting has others")
    for option, key in (("offset_noise_weight", "offset"), ("perturbation_noise_weight", "perturbation")):
        if value := number(draft, option, 0.0):
            draft.put(f"objective.noise.{key}", value, option)
    _timesteps(draft)


def _loss(draft: Draft) -> None:
    names = {"mse_strength": "l2", "mae_strength": "l1", "huber_strength": "huber", "log_cosh_strength": "huber"}
    parts = {n: number(draft, n, 1.0 if n == "mse_strength" else 0.0) or 0.0 for n in names}
    largest = max(parts, key=lambda name: parts[name])
    if sum(value > 0 for value in parts.values()) > 1:
        draft.notes.append(f"losses are not mixed: {names[largest]} is taken, for {largest} is the largest")
    if (kind := names[largest]) != "l2":
        draft.put("objective.loss.kind", kind, largest)
        if kind == "huber":
            draft.put("objective.loss.delta", number(draft, "huber_delta", 1.0), "huber_delta")
            draft.put("objective.loss.delta_schedule", "constant")


def _timesteps(draft: Draft) -> None:
    least, most = number(draft, "min_noising_strength", 0.0), number(draft, "max_noising_strength", 1.0)
    if least:
        draft.put("objective.timesteps.min", int(1000 * least), "min_noising_strength")
    if most is not None and most < 1:
        draft.put("objective.timesteps.max", int(1000 * most), "max_noising_strength")
    name = word(draft, "timestep_distribution", "UNIFORM")
    weight, bias = number(draft, "noising_weight", 0.0) or 0.0, number(draft, "noising_bias", 0.0) or 0.0
    names = ("timestep_distribution", "noising_weight", "noising_bias")
    if name == "LOGIT_NORMAL":
        draft.put("objective.timesteps.distribution", "logit_normal", *names)
        draft.put("objective.timesteps.mean", bias, "noising_bias")
        draft.put("objective.timesteps.std", weight + 1.0, "noising_weight")
    elif name == "BETA" and weight > 0 and bias > 0:
        draft.put("objective.timesteps.distribution", "beta", *names)
        draft.put("objective.timesteps.a", weight, "noising_weight")
        draft.put("objective.timesteps.b", bias, "noising_bias")
    elif name != "UNIFORM":
        draft.notes.append(f"timestep_distribution {name}: is not here; objective.timesteps has logit_normal, laplace, "
                           "beta and importance")  # fmt: skip
