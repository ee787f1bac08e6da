"""Rules that need more than one field, or a look at the disk.

An option that would do nothing is a mistake. It counts as given when the user wrote it with a value other
than the default, so that a configuration written out in full can be read again.
"""

import glob
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer.config.fields import Key, Problem, dotted
from trainer.config.rule_parts import clash, full_path, is_given, key_of, value_at
from trainer.config.schema import Config
from trainer.config.section_rules.rules_activations import activation_rules
from trainer.config.section_rules.rules_adapter import adapter_rules, frozen_weight_rules
from trainer.config.section_rules.rules_captions import caption_rules
from trainer.config.section_rules.rules_ema import ema_rules
from trainer.config.section_rules.rules_exchange import exchange_rules
from trainer.config.section_rules.rules_filters import filter_rules
from trainer.config.section_rules.rules_log import log_rules
from trainer.config.section_rules.rules_loss_weights import loss_weight_rules
from trainer.config.section_rules.rules_new_tokens import new_token_rules
from trainer.config.section_rules.rules_notify import notify_rules
from trainer.config.section_rules.rules_objective import objective_problems
from trainer.config.section_rules.rules_optimizer import optimizer_rules
from trainer.config.section_rules.rules_release import release_rules
from trainer.config.section_rules.rules_samples import PIXELS_PER_LATENT, sample_rules
from trainer.config.section_rules.rules_sharding import sharding_rules
from trainer.config.section_rules.rules_sources import is_needed_to_train, paths_of, source_rules
from trainer.config.sections.adapter_config import trains_adapter
from trainer.config.sections.data.sources import FolderSource, LatentTarsSource, Source
from trainer.config.sections.trainable_config import TextEncoderPart
from trainer.config.spelling import nearest_path
from trainer.config.wording import shown


def broken_rules(config: Config) -> list[Problem]:
    """Every rule between fields that `config` breaks."""
    checks = (
        _length,
        _batch,
        _lr_schedule,
        optimizer_rules,
        _buckets,
        source_rules,
        filter_rules,
        _mode,
        caption_rules,
        _trainable,
        adapter_rules,
        frozen_weight_rules,
        new_token_rules,
        _export,
        ema_rules,
        _validation,
        sample_rules,
        release_rules,
        activation_rules,
        exchange_rules,
        sharding_rules,
        objective_problems,
        loss_weight_rules,
        log_rules,
        notify_rules,
        _written_folders,
    )
    return [problem for check in checks for problem in check(config)]


def bad_paths(config: Config) -> list[Problem]:
    """Every path in `config` that must exist and does not, or is a file where a folder is needed."""
    must_exist: list[Key] = [("model", "tokenizer")] if config.model.tokenizer is not None else []
    # Of hosts with a disk each, one may lack it: then all of them say where it is, and how it gets there.
    if isinstance(config.run.resume, str) and config.run.resume != "auto" and not config.run.on_local_disks:
        must_exist.append(("run", "resume"))
    may_exist: list[Key] = [("run", "dir"), ("data", "prepared")]
    models: list[Key] = [("model", name) for name in ("path", "vae") if isinstance(getattr(config.model, name), Path)]
    files: list[Key] = [("objective", "loss_weights", "tag_file")] if config.objective.loss_weights.tag_file else []
    files += [("adapter", "initial")] if config.adapter.initial and trains_adapter(config.adapter) else []
    files += [("samples", "prompt_file")] if config.samples.prompt_file else []
    tokens = config.new_tokens.tokens
    files += [("new_tokens", "tokens", i, "file") for i, token in enumerate(tokens) if token.file]
    found = [_missing(config, key) for key in (*models, *files)]
    found += [_bad_folder(config, key, must_exist=True) for key in must_exist]
    found += [_bad_folder(config, key, must_exist=False) for key in may_exist]
    is_prepared = (config.data.prepared / "CURRENT").is_file()
    for i, source in enumerate(config.data.sources):
        if is_prepared and not is_needed_to_train(config, source):
            continue  # who looks at the sources anew will tell
        found += [_bad_source_path(config, ("data", "sources", i, name), kind) for name, kind in paths_of(source)]
    return [problem for problem in found if problem]


def _length(config: Config) -> Iterator[Problem]:
    keys = ("train.steps", "train.epochs")
    if config.train.steps is not None and config.train.epochs is not None:
        yield clash(config, keys, "give only one of them, or set the other to null")
    elif config.train.steps is None and config.train.epochs is None:
        text = "train.steps: missing (how long to train); give `train.steps` or `train.epochs`"
        yield Problem(tuple(map(key_of, keys)), text)


def _batch(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.global_batch_size is None:
        return
    if train.gradient_accumulation_steps is not None:
        keys = ("train.gradient_accumulation_steps", "train.global_batch_size")
        yield clash(config, keys, "give only one of them; the accumulation follows from the global batch")
    if train.batch_size_per_gpu > train.global_batch_size:
        keys = ("train.batch_size_per_gpu", "train.global_batch_size")
        yield clash(config, keys, "one GPU's batch must not be larger than the global batch")


def _lr_schedule(config: Config) -> Iterator[Problem]:
    schedule, steps = config.lr_schedule, config.train.steps
    if schedule.kind == "constant" and is_given(config, "lr_schedule.final_ratio"):
        keys = ("lr_schedule.final_ratio", "lr_schedule.kind")
        yield clash(config, keys, "has no effect; use `kind: linear` or `kind: cosine`")
    if steps is not None and schedule.warmup_steps >= steps:
        keys = ("lr_schedule.warmup_steps", "train.steps")
        yield clash(config, keys, "the warm-up must be shorter than the run")


def _buckets(config: Config) -> Iterator[Problem]:
    buckets = config.data.buckets
    step, least, most, side = (f"data.buckets.{name}" for name in ("step_px", "min_px", "max_px", "resolution"))
    if buckets.step_px % PIXELS_PER_LATENT:
        yield clash(config, (step,), f"must be a multiple of {PIXELS_PER_LATENT}, the VAE's reduction")
    else:
        for key, pixels in ((side, buckets.resolution), (least, buckets.min_px), (most, buckets.max_px)):
            if pixels % buckets.step_px:
                yield clash(config, (key, step), "must be a multiple of the step")
    if buckets.min_px > buckets.resolution:
        yield clash(config, (least, side), "the shortest side must be at most the resolution")
    if buckets.max_px < buckets.resolution:
        yield clash(config, (most, side), "the longest side must be at least the resolution")
    yield from _further_resolutions(config)


def _further_resolutions(config: Config) -> Iterator[Problem]:
    buckets = config.data.buckets
    side, step, at = "data.buckets.resolution", "data.buckets.step_px", "data.buckets.also_at"
    seen: dict[int, str] = {}
    for i, other in enumerate(buckets.also_at):
        key = f"{at}.{i}.resolution"
        if other.resolution >= buckets.resolution:
            yield clash(config, (key, side), "must be less than the main resolution, which is the largest")
        if other.resolution % buckets.step_px:
            yield clash(config, (key, step), "must be a multiple of the step")
        if seen.setdefault(other.resolution, key) != key:
            yield clash(config, (key, seen[other.resolution]), "the same resolution twice")
    shares = [f"{at}.{i}.share" for i, other in enumerate(buckets.also_at) if other.share is not None]
    total = sum(other.share or 0.0 for other in buckets.also_at)
    if shares and total >= 1 - 1e-6:
        yield clash(config, shares, f"must leave something for the main resolution, but add up to {total:g}")
    if buckets.also_at and not any(map(_holds_images, config.data.sources)):
        yield clash(config, (at, "data.sources"), "has no effect on latents that come with the sources")


def _holds_images(source: Source) -> bool:
    return not isinstance(source, LatentTarsSource) and getattr(source, "latents", None) is None


def _mode(config: Config) -> Iterator[Problem]:
    if config.data.mode == "images":
        if config.data.cache_text:
            keys = ("data.cache_text", "data.mode")
            yield clash(config, keys, "must be false; this mode stores nothing that a model has computed")
        return
    for key in ("data.augment.flip_probability", "data.augment.random_crop"):
        may_be_stored = key.endswith("flip_probability") and _uses_npz(config)
        if is_given(config, key) and not may_be_stored:
            yield clash(config, (key, "data.mode"), "has no effect on stored latents; use `mode: images`")


def _uses_npz(config: Config) -> bool:
    """Whether a source gives `.npz` files, which may hold latents of the mirrored images as well."""
    sources = config.data.sources
    return any(isinstance(source, LatentTarsSource) or getattr(source, "latents", None) for source in sources)


def _trainable(config: Config) -> Iterator[Problem]:
    parts = {name: getattr(config.trainable, name) for name in type(config.trainable).model_fields}
    if not any(part.train for part in parts.values()) and not config.new_tokens.tokens:
        yield clash(config, tuple(f"trainable.{name}.train" for name in parts), "nothing trains")
    for name, part in parts.items():
        key = f"trainable.{name}"
        for option in type(part).model_fields:
            if not part.train and option != "train" and is_given(config, f"{key}.{option}"):
                yield clash(config, (f"{key}.{option}", f"{key}.train"), "has no effect on what does not train")
        if part.train and name != "unet" and config.data.cache_text:
            yield clash(config, ("data.cache_text", f"{key}.train"), "must not go together; its outputs change")
    yield from _when_parts_train(config, {name: part for name, part in parts.items() if part.train})
    yield from _weight_decay(config, {name: part for name, part in parts.items() if part.train})
    trained = [name for name in ("text_encoder_1", "text_encoder_2") if parts[name].train]
    if trained and is_given(config, "model.text_encoder_precision"):
        keys = ("model.text_encoder_precision", f"trainable.{trained[0]}.train")
        yield clash(config, keys, "has no effect; with one that trains, both are held in `train.precision`")
    if config.captions.max_tokens == 75 and is_given(config, "captions.chunks"):
        keys = ("captions.chunks", "captions.max_tokens")
        yield clash(config, keys, "has no effect; there is one chunk, and nothing to join")


def _when_parts_train(config: Config, parts: Mapping[str, TextEncoderPart]) -> Iterator[Problem]:
    for name, part in parts.items():
        start, stop = (f"trainable.{name}.{option}" for option in ("start_at", "stop_at"))
        if isinstance(part.start_at, int) and part.start_at >= (config.train.steps or math.inf):
            yield clash(config, (start, "train.steps"), "the run ends before it would begin to train")
        of_one_kind = part.start_at is not None and type(part.start_at) is type(part.stop_at)
        if of_one_kind and part.stop_at is not None and part.stop_at <= (part.start_at or 0):
            yield clash(config, (start, stop), "it must stop after it has started")
    if parts and all(part.start_at is not None for part in parts.values()):
        yield clash(config, [f"trainable.{name}.start_at" for name in parts], "nothing would train at the start")
    if parts and all(isinstance(part.stop_at, float) for part in parts.values()):
        yield clash(config, [f"trainable.{name}.stop_at" for name in parts], "nothing would train at the end")


def _weight_decay(config: Config, parts: Mapping[str, TextEncoderPart]) -> Iterator[Problem]:
    decays = {name: part.weight_decay for name, part in parts.items()}
    keys = {name: "optimizer.weight_decay" if own is None else f"trainable.{name}.weight_decay"
            for name, own in decays.items()}  # fmt: skip
    usual = config.optimizer.settings()["weight_decay"]
    is_on = {name: (usual if own is None else own) > 0 for name, own in decays.items()}
    for name in parts:
        if parts[name].weight_decay_scale and not is_on[name]:
            yield clash(config, (f"trainable.{name}.weight_decay_scale", keys[name]), "has no effect on no decay")
    if is_given(config, "optimizer.decay_norms_and_biases") and not any(is_on.values()):
        given = ("optimizer.decay_norms_and_biases", *dict.fromkeys(keys.values()))
        yield clash(config, given, "has no effect; there is no weight decay")


def _export(config: Config) -> Iterator[Problem]:
    when = config.checkpoint.export.when
    for name in type(config.checkpoint.export).model_fields:
        key = f"checkpoint.export.{name}"
        if name != "when" and when == "never" and is_given(config, key):
            yield clash(config, (key, "checkpoint.export.when"), "has no effect; use `when: end` or `checkpoints`")
    if when == "checkpoints" and not (config.checkpoint.every_steps or config.checkpoint.keep_every_steps):
        rule = "needs checkpoint.every_steps or checkpoint.keep_every_steps; those by time are not exported"
        yield clash(config, ("checkpoint.export.when",), rule)
    if when == "end" and is_given(config, "checkpoint.export.keep"):
        keys = ("checkpoint.export.keep", "checkpoint.export.when")
        yield clash(config, keys, "has no effect; one file is written")


def _validation(config: Config) -> Iterator[Problem]:
    share, every = "data.validation_fraction", "validation.every_steps"
    if not config.validation.every_steps and is_given(config, "validation.max_time_share"):
        yield clash(config, ("validation.max_time_share", every), "has no effect, because the run does not validate")
    if config.data.validation_fraction > 0:
        return
    if config.validation.every_steps > 0:
        yield clash(config, (every, share), f"no images are held out; set `{share}`, such as 0.02")
        return
    for key in ("validation.timesteps", "validation.max_images", "validation.train_images"):
        if is_given(config, key):
            yield clash(config, (key, share), "has no effect, because no images are held out")


def _written_folders(config: Config) -> Iterator[Problem]:
    """Samples written inside a source would be read as training images."""
    for key, path in (("run.dir", config.run.dir), ("data.prepared", config.data.prepared)):
        for i, source in enumerate(config.data.sources):
            if isinstance(source, FolderSource) and full_path(path).is_relative_to(full_path(source.path)):
                keys = (key, f"data.sources.{i}.path")
                yield clash(config, keys, "must not lie in a source, which is searched for images")


def _bad_folder(config: Config, key: Key, must_exist: bool) -> Problem | None:
    path = Path(str(value_at(config, dotted(key))))
    said = f"{dotted(key)} = {shown(str(path))}"
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return Problem((key,), f"{said}: no such folder{nearest_path(path)}") if must_exist else None
    except OSError as error:
        return Problem((key,), f"{said}: cannot be reached: {error.strerror}")
    return Problem((key,), f"{said}: must be a folder; this is a file")


def _missing(config: Config, key: Key) -> Problem | None:
    """Neither a file nor a folder; what it must hold is looked at elsewhere."""
    path = Path(str(value_at(config, dotted(key))))
    return None if path.exists() else Problem((key,), f"{dotted(key)} = {shown(str(path))}: no such file or folder"
                                              f"{nearest_path(path)}")  # fmt: skip


def _bad_source_path(config: Config, key: Key, kind: str) -> Problem | None:
    """What is wrong with a path of a source: a `folder`, a `file`, or `files` (a file, a folder or a pattern)."""
    if kind == "folder":
        return _bad_folder(config, key, must_exist=True)
    path = Path(str(value_at(config, dotted(key))))
    said = f"{dotted(key)} = {shown(str(path))}"
    if kind == "files" and glob.has_magic(str(path)):
        found = next(glob.iglob(str(path), recursive=True), None)  # noqa: PTH207 - the pattern may be absolute
        return None if found else Problem((key,), f"{said}: no file matches this pattern")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Problem((key,), f"{said}: no such file{nearest_path(path)}")
    except OSError as error:
        return Problem((key,), f"{said}: cannot be reached: {error.strerror}")
    if kind == "file" and not stat.S_ISREG(mode):
        return Problem((key,), f"{said}: must be a file")
    return None
