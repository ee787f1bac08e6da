"""OneTrainer's settings as a configuration: every one is mapped, or told why it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.importing.draft_end import read_text, settled
from trainer.importing.given import Draft
from trainer.importing.onetrainer_data import data_of_settings
from trainer.importing.onetrainer_settings import draft_of, number, read_json_text, whole, word
from trainer.importing.onetrainer_training import (
    objective_of_settings,
    optimizer_of_settings,
    rates_of_settings,
    schedule_of_settings,
)

_USUAL_EPOCHS = 100
_PRECISIONS = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "fp32", "TFLOAT_32": "fp32"}
_FEWER_BITS = {"INT_8": "int8", "INT_W8A8": "int8", "FLOAT_8": "int8", "FLOAT_W8A8": "int8", "NFLOAT_4": "nf4"}
_UNITS = {"SECOND": "s", "MINUTE": "min", "HOUR": "h"}
_MOST_PROMPTS = 64


def import_onetrainer(settings: Mapping[str, Any], place: Path) -> Draft:
    """The configuration of settings.

    Args:
        place: of their file.
    Raises:
        UserError: with the setting that cannot be understood.
    """
    draft = draft_of(settings)
    method, model = word(draft, "training_method", "FINE_TUNE"), word(draft, "model_type", "STABLE_DIFFUSION_15")
    if model != "STABLE_DIFFUSION_XL_10_BASE":
        raise UserError(f"model_type = {model}: must be STABLE_DIFFUSION_XL_10_BASE; only SDXL is trained here")
    if method not in ("FINE_TUNE", "LORA", "EMBEDDING"):
        raise UserError(f"training_method = {method}: must be FINE_TUNE, LORA or EMBEDDING")
    draft.leave("model_type", "only SDXL is trained here")
    draft.leave("training_method", f"{method}: as trainable, adapter and new_tokens say")
    _run_and_model(draft)
    epochs = _length(draft, method)
    _precision(draft, method)
    rates_of_settings(draft, method, epochs)
    kind = optimizer_of_settings(draft)
    schedule_of_settings(draft, kind)
    objective_of_settings(draft)
    data_of_settings(draft, place.parent)
    _averages(draft, method)
    _saving(draft, method)
    _samples(draft, place.parent)
    if draft.take("tensorboard") is False:
        draft.put("log.trackers", [], "tensorboard")
    draft.leave("tensorboard", "TensorBoard's files are written where nothing else is said")
    if draft.take("validation"):
        draft.notes.append(
            "validation: data.validation_fraction holds images out, and validation.every_steps scores them"
        )
    return settled(draft)


def _run_and_model(draft: Draft) -> None:
    run_dir = str(draft.take("workspace_dir", "workspace/run"))
    draft.put("run.dir", run_dir, "workspace_dir")
    draft.put("data.prepared", f"{run_dir.rstrip('/')}-prepared")
    if draft.take("multi_gpu") and (devices := str(draft.take("device_indexes", "")).strip()):
        draft.put("launch.workers", len([each for each in devices.split(",") if each.strip()]), "device_indexes")
    elif not draft.take("multi_gpu", False):
        draft.put("launch.workers", 1, "multi_gpu")
    draft.leave("multi_gpu", "there is a worker for each card, or launch.workers")
    model = draft.take("base_model_name")
    if not model:
        raise UserError("base_model_name: missing; it is the model to start from")
    draft.put("model.path", str(model), "base_model_name")
    vae = str(draft.take("vae.model_name", ""))
    if vae and (Path(vae).expanduser().exists() or vae.startswith((".", "/", "~"))):
        draft.put("model.vae", vae, "vae.model_name")
    elif vae:
        draft.leave("vae.model_name", "model.vae is a folder or file: download it, and name it there")


def _length(draft: Draft, method: str) -> int:
    epochs = whole(draft, "epochs", _USUAL_EPOCHS)
    draft.put("train.epochs", epochs, "epochs")
    draft.put("train.batch_size_per_gpu", whole(draft, "batch_size", 1), "batch_size")
    if (passes := whole(draft, "gradient_accumulation_steps", 1)) != 1:
        draft.put("train.gradient_accumulation_steps", passes, "gradient_accumulation_steps")
    norm = number(draft, "clip_grad_norm", 1.0)
    draft.put("train.max_grad_norm", 0.0 if norm is None else norm, "clip_grad_norm")
    if draft.take("compile") and method == "FINE_TUNE":
        draft.put("train.compile", "blocks", "compile")
    draft.leave("compile", "compiled blocks have not been tried with adapters and new tokens")
    return epochs


def _precision(draft: Draft, method: str) -> None:
    """From the precisions of passes and weights; weights in bf16 are rounded at random, never to the nearest."""
    told, weights = word(draft, "train_dtype", "FLOAT_16"), word(draft, "unet.weight_dtype", "FLOAT_32")
    if told not in _PRECISIONS:
        raise UserError(f"train_dtype = {told}: must be FLOAT_16, BFLOAT_16, FLOAT_32 or TFLOAT_32")
    chosen = _PRECISIONS[told]
    names = ["train_dtype"]
    if method == "FINE_TUNE":
        names.append("unet.weight_dtype")
        if weights == "BFLOAT_16":
            chosen = "bf16_stochastic"
            draft.notes.append("bf16 weights: rounded at random, so that no update is lost on average, as with "
                               "stochastic_rounding; train.precision: bf16 keeps fp32 weights")  # fmt: skip
        elif weights == "FLOAT_16":
            draft.notes.append("fp16 weights lose small updates: fp16 passes on fp32 weights are taken")
            chosen = "fp16"
    draft.put("train.precision", chosen, *names)
    if method != "FINE_TUNE" and (held := _FEWER_BITS.get(weights)):
        draft.put("model.frozen_weights", held, "unet.weight_dtype")
    draft.leave("unet.weight_dtype", "frozen weights are held in the precision of the passes")
    trained = any(draft.take(f"{part}.train", True) for part in ("text_encoder", "text_encoder_2"))
    text = _PRECISIONS.get(word(draft, "text_encoder.weight_dtype", "FLOAT_32"), "fp32")
    dtypes = ("text_encoder.weight_dtype", "text_encoder_2.weight_dtype")
    if text != "fp32" and not (trained and method == "FINE_TUNE"):
        draft.put("model.text_encoder_precision", text, *dtypes)
    for name in dtypes:
        draft.leave(name, "text encoders are held in fp32, or as train.precision says where they train")
    vae = _PRECISIONS.get(word(draft, "vae.weight_dtype", "FLOAT_32"), "fp32")
    draft.put("model.vae_precision", vae, "vae.weight_dtype")
    if vae == "fp16":
        draft.notes.append("the VAE in fp16 overflows, unless it is the fp16-fix")


def _averages(draft: Draft, method: str) -> None:
    mode = word(draft, "ema", "OFF")
    names = ("ema", "ema_decay", "ema_update_step_interval")
    if mode == "OFF":
        for name in names:
            draft.leave(name, "no average is kept")
        return
    every = whole(draft, "ema_update_step_interval", 5)
    decay = (number(draft, "ema_decay", 0.999) or 0.999) ** (1 / every)
    draft.put("ema.averages", [{"kind": "plain", "decay": round(decay, 8)}], "ema", "ema_decay")
    if every > 1:
        draft.put("ema.update_every", every, "ema_update_step_interval")
        draft.notes.append(f"ema_decay is of an update, every {every} steps; here it is of a step: {decay:.8g}")
    if mode == "CPU":
        draft.put("ema.place", "host", "ema")
    if method == "FINE_TUNE":
        draft.put("checkpoint.export.weights", "ema", "ema")


def _saving(draft: Draft, method: str) -> None:
    every, unit = number(draft, "backup_after", 30) or 0, word(draft, "backup_after_unit", "MINUTE")
    names = ("backup_after", "backup_after_unit")
    if unit in _UNITS and every:
        draft.put("checkpoint.every", f"{every:g}{_UNITS[unit]}", *names)
    elif unit == "STEP" and every:
        draft.put("checkpoint.every_steps", int(every), *names)
    for name in names:
        draft.leave(name, "checkpoints go by time or steps (checkpoint.every, every_steps)")
    if draft.take("rolling_backup"):
        draft.put("checkpoint.keep", max(whole(draft, "rolling_backup_count", 3), 2), "rolling_backup_count")
    draft.leave("rolling_backup_count", "the newest three are kept (checkpoint.keep)")
    files, unit = number(draft, "save_every", 0) or 0, word(draft, "save_every_unit", "NEVER")
    if unit == "STEP" and files:
        draft.put("checkpoint.keep_every_steps", int(files), "save_every", "save_every_unit")
    when = "checkpoints" if unit == "STEP" and files else "end"
    for name in ("save_every", "save_every_unit"):
        draft.leave(name, "files are written by steps (checkpoint.keep_every_steps), and at the end")
    if when == "checkpoints" or draft.take("output_model_destination"):
        draft.put("checkpoint.export.when", when)
        if place := draft.take("output_model_destination"):
            draft.put("checkpoint.export.dir", str(Path(str(place)).parent), "output_model_destination")
            draft.notes.append(f"output_model_destination {place}: files there are called by run and step")
        dtype = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "fp32"}.get(
            word(draft, "output_dtype", "FLOAT_32")
        )
        if dtype and method != "EMBEDDING":
            draft.put("checkpoint.export.dtype", dtype, "output_dtype")
    form = word(draft, "output_model_format", "SAFETENSORS")
    draft.leave("output_model_format", "`sdxl-train export --layout diffusers` does that" if form == "DIFFUSERS" else
                "files are safetensors that A1111, ComfyUI and diffusers read")  # fmt: skip


def _samples(draft: Draft, folder: Path) -> None:
    every, unit = number(draft, "sample_after", 10) or 0, word(draft, "sample_after_unit", "MINUTE")
    names = ("sample_after", "sample_after_unit")
    if unit == "STEP" and every:
        draft.put("samples.every_steps", int(every), *names)
        _prompts(draft, folder)
    for name in (*names, "samples", "sample_definition_file_name"):
        draft.leave(name, "samples are drawn by steps (samples.every_steps, samples.prompts)")


def _prompts(draft: Draft, folder: Path) -> None:
    samples = draft.take("samples")
    if samples is None and (name := draft.take("sample_definition_file_name")):
        places = [place / str(name) for place in (Path(), folder, folder.parent, folder.parent.parent)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            draft.notes.append(f"sample_definition_file_name {name}: no such file; captions of the data are drawn")
            return
        samples = read_json_text(read_text(found), str(found))
    wanted = [each for each in samples or [] if isinstance(each, dict) and each.get("enabled", True)]
    prompts = [str(each.get("prompt", "")) for each in wanted if each.get("prompt")][:_MOST_PROMPTS]
    if not prompts:
        return
    draft.put("samples.prompts", prompts, "samples", "sample_definition_file_name")
    first = wanted[0]
    for option, key, kind in (("negative_prompt", "negative_prompt", str), ("diffusion_steps", "steps", int),
                              ("cfg_scale", "guidance_scale", float), ("seed", "seed", int)):  # fmt: skip
        if first.get(option):
            draft.put(f"samples.{key}", kind(first[option]))
    for option, key in (("width", "width_px"), ("height", "height_px")):
        if first.get(option):
            draft.put(f"samples.{key}", int(first[option]) // 8 * 8)
    draft.notes.append("samples: size, steps, guidance, seed and negative prompt of the first hold for all")
