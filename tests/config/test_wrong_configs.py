"""Every mistake is one line with place, key, value, rule and mend."""

from collections.abc import Callable
from pathlib import Path

import pytest

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")
Mistakes = Callable[..., tuple[str, ...]]


def changed(old: str, new: str) -> str:
    """The right configuration with one change."""
    assert RIGHT.count(old) == 1
    return RIGHT.replace(old, new)


def added(line: str) -> str:
    """The right configuration with a line 13 (and on)."""
    return RIGHT + line + "\n"


ONE_MISTAKE: dict[str, tuple[str | bytes, str]] = {
    # names
    "key misspelt": (changed("steps: 100", "stpes: 100"), "c.yaml:10: train.stpes: unknown key; did you mean `steps`?"),
    "required key misspelt": (changed("dir:", "dri:"), "c.yaml:2: run.dri: unknown key; did you mean `dir`?"),
    "section misspelt": (changed("model:", "modle:"), "c.yaml:3: modle: unknown key; did you mean `model`?"),
    "dashes": (
        changed("steps: 100", "steps: 100\n  max-grad-norm: 1"),
        "c.yaml:11: train.max-grad-norm: unknown key; did you mean `max_grad_norm`?",
    ),
    "key of another section": (
        changed("steps: 100", "steps: 100\n  warmup_steps: 10"),
        "c.yaml:11: train.warmup_steps: unknown key; did you mean `lr_schedule.warmup_steps`?",
    ),
    "key at the top": (
        added("resolution: 512"),
        "c.yaml:13: resolution: unknown key; did you mean `data.buckets.resol",
    ),
    "word of another trainer": (
        changed("lr: 1e-4", "learning_rate: 1e-4"),
        "c.yaml:12: optimizer.learning_rate: unknown key; did you mean `lr`?",
    ),
    "dotted key": (
        added("log.every_steps: 5"),
        "c.yaml:13: log.every_steps: unknown key; did you mean `every_steps` within `log`?",
    ),
    "like no key": (added("log: {zzz: 1}"), "c.yaml:13: log.zzz: unknown key; `log` has every_steps"),
    "like no section": (added("zzz: 1"), "c.yaml:13: zzz: unknown key; the sections are run, launch, model, data,"),
    "key in an entry of a list": (
        changed("path: photos", "path: photos\n      repeat: 2"),
        "c.yaml:8: data.sources.0.repeat: unknown key; did you mean `repeats`?",
    ),
    "key twice": (
        changed("steps: 100", "steps: 100\n  steps: 5"),
        "c.yaml:11: train.steps: given twice; first on line 10",
    ),
    "section twice": (added("run:\n  dir: y"), "c.yaml:13: run: given twice; first on line 1"),
    "key is a number": (added("5: 6"), "c.yaml:13: a key must be a word; `5` is a value"),
    "merge key": (
        changed("steps: 100", "steps: 100\n  <<: {}"),
        "c.yaml:11: train: merge keys (`<<`) are not supported",
    ),
    # missing
    "required key missing": (
        changed("  dir: runs/x", "  seed: 1"),
        "c.yaml:1: run.dir: missing (where everything this",
    ),
    "required section missing": (
        changed("optimizer:\n  lr: 1e-4\n", ""),
        "c.yaml: optimizer.lr: missing (peak learning",
    ),
    "required section empty": (changed("  lr: 1e-4\n", ""), "c.yaml:11: optimizer.lr: missing (peak learning rate"),
    "no sources": (
        changed("\n    - path: photos", " []"),
        "c.yaml:6: data.sources = []: must have at least 1 entry (where the images come from",
    ),
    "source without path": (
        changed("path: photos", "repeats: 2"),
        "c.yaml:7: data.sources.0.path: missing (the folder)",
    ),
    "no length": (changed("  steps: 100\n", ""), "c.yaml:9: train.steps: missing (how long to train); give `train.st"),
    "value missing": (changed(" runs/x", ""), "c.yaml:2: run.dir: has no value; must be a path"),
    "null": (changed("1e-4", "~"), "c.yaml:12: optimizer.lr: has no value; must be a number"),
    # types
    "decimal for a whole number": (changed("100", "1.5"), "c.yaml:10: train.steps = 1.5: must be a whole number"),
    "whole decimal": (changed("100", "1e3"), "c.yaml:10: train.steps = 1000.0: must be a whole number; write 1000"),
    "quoted number": (
        changed("100", '"100"'),
        "c.yaml:10: train.steps = '100': must be a whole number; write 100 without",
    ),
    "digits in groups": (
        changed("100", "1_000"),
        "c.yaml:10: train.steps = '1_000': must be a whole number; write 1000",
    ),
    "word for a number": (changed("1e-4", "small"), "c.yaml:12: optimizer.lr = small: must be a number"),
    "not a number": (changed("1e-4", ".nan"), "c.yaml:12: optimizer.lr = .nan: must be a finite number"),
    "overflow": (changed("1e-4", "1e999"), "c.yaml:12: optimizer.lr = .inf: must be a finite number"),
    "flag for a number": (changed("100", "true"), "c.yaml:10: train.steps = true: must be a whole number"),
    "sexagesimal": (changed("100", "12:30"), "c.yaml:10: train.steps = '12:30': must be a whole number"),
    "number for a flag": (
        changed("steps: 100", "steps: 100\n  batch_by_area: 1"),
        "c.yaml:11: train.batch_by_area = 1: must be true or false",
    ),
    "quoted flag": (
        changed("steps: 100", "steps: 100\n  batch_by_area: 'True'"),
        "c.yaml:11: train.batch_by_area = 'True': must be true or false; write true without quotes",
    ),
    "number for a text": (
        added("samples: {negative_prompt: 2024}"),
        "c.yaml:13: samples.negative_prompt = 2024: must be text; put it in quotes",
    ),
    "number for a path": (changed("runs/x", "5"), "c.yaml:2: run.dir = 5: must be a path; put it in quotes"),
    "empty path": (changed("runs/x", "''"), "c.yaml:2: run.dir = '': must be a path"),
    "text for a list": (
        added("samples: {prompts: a cat}"),
        "c.yaml:13: samples.prompts = a cat: must be a list; write [a cat]",
    ),
    "value for a section": (added("log: 5"), "c.yaml:13: log = 5: must be a section: keys below it, such as `every_st"),
    "list for a section": (added("log: [5]"), "c.yaml:13: log = [5]: must be a section"),
    "list for resume": (
        changed("dir: runs/x", "dir: x\n  resume: [1]"),
        "c.yaml:3: run.resume = [1]: must be true or fal",
    ),
    # ranges and choices
    "too small": (
        changed("100", "0"),
        "c.yaml:10: train.steps = 0: must be at least 1 (optimizer steps of the whole run)",
    ),
    "keep 1, with the reason": (
        added("checkpoint: {keep: 1}"),
        "c.yaml:13: checkpoint.keep = 1: must be at least 2 (how many of the newest checkpoints are kept; at least 2, "
        "so that a damaged one has a forerunner)",
    ),
    "not positive": (changed("1e-4", "0"), "c.yaml:12: optimizer.lr = 0: must be greater than 0 (peak learning rate"),
    "too large": (
        changed("dir: runs/x", "dir: x\n  seed: 99999999999"),
        "c.yaml:3: run.seed = 99999999999: must be at mo",
    ),
    "entry of a list": (
        added("validation: {timesteps: [1, 1000]}\n").replace("prepared\n", "prepared\n  validation_fraction: 0.1\n"),
        "c.yaml:14: validation.timesteps.1 = 1000: must be at most 999",
    ),
    "length of a list": (
        changed("lr: 1e-4", "lr: 1e-4\n  betas: [0.9]"),
        "c.yaml:13: optimizer.betas = [0.9]: must have at least 2 entries",
    ),
    "choice": (
        changed("steps: 100", "steps: 100\n  precision: BF16"),
        "c.yaml:11: train.precision = BF16: must be one of bf16, bf16_stochastic, bf16_kahan, fp16, fp32 "
        "(did you mean `bf16`?)",
    ),
    "choice of a wrong type": (
        added("lr_schedule: {kind: 5}"),
        "c.yaml:13: lr_schedule.kind = 5: must be one of constant, linear, cosine",
    ),
    "source of no known type": (
        changed("path: photos", "{path: photos, type: kohya-json}"),
        "c.yaml:7: data.sources.0.type = kohya-json: must be one of folder, kohya_json, latent_tars, webdataset, "
        "parquet, hf (did you mean `kohya_json`?)",
    ),
    "source whose type has no value": (
        changed("path: photos", "{path: photos, type: }"),
        "c.yaml:7: data.sources.0.type: has no value; must be one of folder, kohya_json",
    ),
    "source that is no section": (
        changed("- path: photos", "- photos"),
        "c.yaml:7: data.sources.0 = photos: must be a section: keys below it, such as `type`",
    ),
    "key of another type of source": (
        changed("path: photos", "{type: kohya_json, path: c.yaml, latents: more, caption_extension: .txt}"),
        "c.yaml:7: data.sources.0.caption_extension: unknown key; `data.sources.0` has type, path, latents, images",
    ),
    "misspelt key of a typed source": (
        changed("path: photos", "{type: kohya_json, path: c.yaml, latent: more, images: more}"),
        "c.yaml:7: data.sources.0.latent: unknown key; did you mean `latents`?",
    ),
    "missing key of a typed source": (
        changed("path: photos", "{type: latent_tars, metadata: c.yaml}"),
        "c.yaml:7: data.sources.0.tars: missing (a folder of `.tar` files, or a pattern such as",
    ),
    "latents and images": (
        changed("path: photos", "{type: kohya_json, path: c.yaml, latents: more, images: photos}"),
        "c.yaml:7: data.sources.0.latents = more with data.sources.0.images = photos: give one of them",
    ),
    "neither latents nor images": (
        changed("path: photos", "{type: kohya_json, path: c.yaml}"),
        "with data.sources.0.images = null (the default): give one of them",
    ),
    "metadata that is a folder": (
        changed("path: photos", "{type: kohya_json, path: photos, latents: more}"),
        "c.yaml:7: data.sources.0.path = photos: must be a file",
    ),
    "pattern without a match": (
        changed("path: photos", '{type: webdataset, tars: "more/*.tar"}'),
        "c.yaml:7: data.sources.0.tars = more/*.tar: no file matches this pattern",
    ),
    "latents in image mode": (
        changed("path: photos", "{type: kohya_json, path: c.yaml, latents: more}").replace(
            "  prepared: prepared", "  prepared: prepared\n  mode: images"
        ),
        "data.sources.0.type = kohya_json with data.mode = images: holds latents; use `mode: latents`",
    ),
    # rules between fields
    "steps and epochs": (
        changed("steps: 100", "steps: 100\n  epochs: 3"),
        "c.yaml:10: train.steps = 100 with train.epochs = 3: give only one of them",
    ),
    "two ways to accumulate": (
        changed("steps: 100", "steps: 100\n  gradient_accumulation_steps: 2\n  global_batch_size: 8"),
        "c.yaml:11: train.gradient_accumulation_steps = 2 with train.global_batch_size = 8: give only one",
    ),
    "batch above the global batch": (
        changed("steps: 100", "steps: 100\n  batch_size_per_gpu: 8\n  global_batch_size: 4"),
        "c.yaml:11: train.batch_size_per_gpu = 8 with train.global_batch_size = 4: one GPU's batch must not",
    ),
    "ratio of a constant": (
        added("lr_schedule: {final_ratio: 0.1}"),
        "c.yaml:13: lr_schedule.final_ratio = 0.1 with lr_schedule.kind = constant (the default): has no effect",
    ),
    "compiling what is fused": (
        changed("lr: 1e-4", "lr: 1e-4\n  compile: true"),
        "c.yaml:13: optimizer.compile = true with optimizer.kind = adamw (the default) with train.precision = bf16",
    ),
    "compiling a kind that is not": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: lion\n  compile: false"),
        "c.yaml:14: optimizer.compile = false with optimizer.kind = lion: has no effect; only `adamw`",
    ),
    "number of another kind": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: muon\n  d_coef: 2"),
        "c.yaml:14: optimizer.d_coef = 2.0 with optimizer.kind = muon: has no effect; it belongs to `prodigy`",
    ),
    "betas of a kind that has none": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: adafactor\n  betas: [0.9, 0.99]"),
        "c.yaml:14: optimizer.betas = [0.9, 0.99] with optimizer.kind = adafactor: has no effect; it belongs to",
    ),
    "learning rate where it is found": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: prodigy"),
        "c.yaml:12: optimizer.lr = 0.0001 with optimizer.kind = prodigy: must be about 1 (0.1 to 10)",
    ),
    "two learning rates where one is found": (
        changed("lr: 1e-4", "lr: 1\n  kind: dadapt_adam\ntrainable: {unet: {lr: 0.5}}"),
        "c.yaml:14: trainable.unet.lr = 0.5 with optimizer.kind = dadapt_adam: must be left out",
    ),
    "schedule of what has none": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: schedule_free_adamw\nlr_schedule: {kind: cosine}"),
        "c.yaml:14: lr_schedule.kind = cosine with optimizer.kind = schedule_free_adamw: must be `constant`",
    ),
    "average of an average": (
        changed("lr: 1e-4", "lr: 1e-4\n  kind: schedule_free_adamw\nema: {averages: [{kind: plain}]}"),
        "c.yaml:14: ema.averages = [{kind: plain}] with optimizer.kind = schedule_free_adamw: must not go together",
    ),
    "warm-up is the whole run": (
        added("lr_schedule: {warmup_steps: 100}"),
        "c.yaml:13: lr_schedule.warmup_steps = 100 with train.steps = 100: the warm-up must be shorter",
    ),
    "bucket step": (
        changed("prepared: prepared", "prepared: prepared\n  buckets: {step_px: 20}"),
        "c.yaml:9: data.buckets.step_px = 20: must be a multiple of 8",
    ),
    "bucket side": (
        changed("prepared: prepared", "prepared: prepared\n  buckets: {max_px: 2000}"),
        "c.yaml:9: data.buckets.max_px = 2000 with data.buckets.step_px = 64 (the default): must be a multiple",
    ),
    "small resolution": (
        changed("prepared: prepared", "prepared: prepared\n  buckets:\n    resolution: 128"),
        "c.yaml:10: data.buckets.min_px = 256 (the default) with data.buckets.resolution = 128: the shortest side",
    ),
    "large resolution": (
        changed("prepared: prepared", "prepared: prepared\n  buckets:\n    max_px: 512"),
        "c.yaml:10: data.buckets.max_px = 512 with data.buckets.resolution = 1024 (the default): the longest side",
    ),
    "flip of stored latents": (
        changed("prepared: prepared", "prepared: prepared\n  augment: {flip_probability: 0.5}"),
        "c.yaml:9: data.augment.flip_probability = 0.5 with data.mode = latents (the default): has no effect on stored",
    ),
    "stored text without stored latents": (
        changed("prepared: prepared", "prepared: prepared\n  mode: images\n  cache_text: true"),
        "c.yaml:10: data.cache_text = true with data.mode = images: must be false; this mode stores nothing",
    ),
    "validation of nothing": (
        added("validation: {every_steps: 10}"),
        "c.yaml:13: validation.every_steps = 10 with data.validation_fraction = 0.0 (the default): no images are held",
    ),
    "timesteps of no validation": (
        added("validation: {timesteps: [5]}"),
        "c.yaml:13: validation.timesteps = [5] with data.validation_fraction = 0.0 (the default): has no effect",
    ),
    "training images of no validation": (
        added("validation: {train_images: 5}"),
        "c.yaml:13: validation.train_images = 5 with data.validation_fraction = 0.0 (the default): has no effect",
    ),
    "share of no validation": (
        added("validation: {max_time_share: 0.1}"),
        "c.yaml:13: validation.max_time_share = 0.1 with validation.every_steps = 0 (the default): has no effect",
    ),
    "count beside prompts": (
        added("samples: {count: 4, prompts: [a, b]}"),
        "c.yaml:13: samples.count = 4 with samples.prompts = [a, b]: has no effect",
    ),
    "width": (added("samples: {width_px: 500}"), "c.yaml:13: samples.width_px = 500: must be a multiple of 8"),
    "negative prompt unused": (
        added("samples: {negative_prompt: blurry, guidance_scale: 1}"),
        "c.yaml:13: samples.negative_prompt = blurry with samples.guidance_scale = 1.0: has no effect",
    ),
    "same source twice": (
        changed("- path: photos", "- path: photos\n    - path: ./photos"),
        "c.yaml:8: data.sources.1.path = photos with data.sources.0.path = photos: the same source twice",
    ),
    "caption ending": (
        changed("path: photos", "{path: photos, caption_extension: txt}"),
        "c.yaml:7: data.sources.0.caption_extension = txt: must be a dot and an ending, such as .txt",
    ),
    # captions
    "probability without a mix": (
        added("captions: {caption_probability: 0.3}"),
        "c.yaml:13: captions.caption_probability = 0.3 with captions.use = caption (the default): has no effect",
    ),
    "order without both": (
        added("captions: {both_order: tags_first}"),
        "c.yaml:13: captions.both_order = tags_first with captions.use = caption (the default): has no effect",
    ),
    "kept tags that nothing moves": (
        added("captions: {keep_tokens: 2}"),
        "c.yaml:13: captions.keep_tokens = 2 with captions.shuffle_tags = false (the default): has no effect without",
    ),
    "separator of tags that are not cut": (
        added("captions: {tag_separator: ;}"),
        "c.yaml:13: captions.tag_separator = ; with captions.shuffle_tags = false (the default): has no effect",
    ),
    "empty separator": (
        added("captions: {secondary_separator: ''}"),
        "c.yaml:13: captions.secondary_separator = '': must have at least 1 character",
    ),
    "shuffle without tags": (
        added("captions: {shuffle_tags: true}"),
        "with data.sources.0.caption_files_hold = caption (the default): has no effect; if the files hold tags",
    ),
    "tags of files that hold none": (
        added("captions: {use: tags}"),
        "c.yaml:13: captions.use = tags with data.sources.0.caption_files_hold = caption (the default): has no effect",
    ),
    "a mix of one": (
        changed("path: photos", "{path: photos, caption_files_hold: tags}") + "captions: {use: mix}\n",
        "c.yaml:13: captions.use = mix with data.sources.0.caption_files_hold = tags: has no effect; no source",
    ),
    "dropout after the end": (
        changed("steps: 100", "epochs: 2") + "captions: {dropout_every_n_epochs: 3}\n",
        "c.yaml:13: captions.dropout_every_n_epochs = 3 with train.epochs = 2: has no effect; the run ends before",
    ),
    "cached text and dropout": (
        changed("prepared: prepared", "prepared: prepared\n  cache_text: true") + "captions: {dropout_rate: 0.1}\n",
        "c.yaml:9: data.cache_text = true with captions.dropout_rate = 0.1: must not go together; a text that is",
    ),
    "word of kohya's": (
        added("captions: {caption_tag_dropout_rate: 0.1}"),
        "c.yaml:13: captions.caption_tag_dropout_rate: unknown key; did you mean `tag_dropout_rate`?",
    ),
    "run inside a source": (changed("runs/x", "photos/run"), "c.yaml:2: run.dir = photos/run with data.sources.0.path"),
    # paths
    "model missing": (
        changed("sdxl", "sdlx"),
        "model.path = sdlx: no such file or folder; did you mean `sdxl`?",
    ),
    "source missing": (
        changed("photos", "photo"),
        "c.yaml:7: data.sources.0.path = photo: no such folder; did you mean",
    ),
    "folder above missing": (
        changed("sdxl", "./models/sdxl"),
        "c.yaml:4: model.path = models/sdxl: no such file or folder (`models` does",
    ),
    "model is no text": (
        changed("sdxl", "5"),
        "model.path = 5: must be a path or the id of a model on",
    ),
    "tokenizer is a file": (
        changed("sdxl", "sdxl\n  tokenizer: c.yaml"),
        "c.yaml:5: model.tokenizer = c.yaml: must be a folder; this is a file",
    ),
    "run is a file": (changed("runs/x", "c.yaml"), "c.yaml:2: run.dir = c.yaml: must be a folder; this is a file"),
    "checkpoint missing": (changed("dir: runs/x", "dir: x\n  resume: y"), "c.yaml:3: run.resume = y: no such folder"),
    # YAML
    "empty": ("", "c.yaml: empty; it must hold at least run"),
    "comments only": ("# nothing\n", "c.yaml: empty"),
    "list": ("- a\n- b\n", "c.yaml:1: must hold sections, such as `run:`, not [a, b]"),
    "not UTF-8": (RIGHT.replace("photos", "fotos \xe9").encode("latin-1"), "c.yaml:7: not UTF-8 text (byte 0xe9)"),
    "UTF-16": (RIGHT.encode("utf-16"), "c.yaml:1: not UTF-8 text (byte 0xff)"),
    "tab": (changed("  steps", "\tsteps"), "c.yaml:10: not valid YAML: a tab; indent with spaces"),
    "indentation": (
        changed("  steps: 100", "  steps: 100\n precision: fp32"),
        "c.yaml:11: not valid YAML: does not line up",
    ),
    "open quote": (changed("runs/x", "'runs/x"), "c.yaml:2: not valid YAML: a quote or bracket that opens here is not"),
    "open bracket": (changed("1e-4", "[1e-4"), "c.yaml:12: not valid YAML: a quote or bracket that opens here is not"),
    "two documents": (added("---\nrun: 5"), "c.yaml:13: not valid YAML: a second document starts here"),
    "undefined alias": (changed("1e-4", "*lr"), "c.yaml:12: not valid YAML: found undefined alias 'lr'"),
    "alias to itself": (
        added("samples: &s {prompts: [*s]}"),
        "c.yaml:13: `samples.prompts.0`: an alias refers to itself",
    ),
    "tag": (
        changed("runs/x", "!!python/object:os.system x"),
        "c.yaml:2: the tag `!!python/object:os.system` is not supp",
    ),
    "deep nesting": (added("a: " + "[" * 2000), "c.yaml:13: nested more than 32 levels deep"),
    "alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n" for i in range(20)),
        "more than 20000 values, with aliases followed",
    ),
    "too many values": (added("a: [" + "1," * 20_001 + "]"), "c.yaml:13: more than 20000 values"),
    "too large a file": (b"#" * 600_000, "c.yaml: larger than 512 KiB"),
    "control character": (changed("runs/x", "runs/\x1b[31mx"), "c.yaml:2: not valid YAML: the character U+001B is not"),
    "half a character": (changed("runs/x", r'"\ud800"'), "c.yaml:2: `run.dir`: holds half a character"),
}


@pytest.mark.parametrize(("text", "expected"), ONE_MISTAKE.values(), ids=ONE_MISTAKE.keys())
def test_one_mistake_is_one_line(mistakes: Mistakes, text: str | bytes, expected: str) -> None:
    lines = mistakes(text)
    assert len(lines) == 1, lines
    assert expected in lines[0]
