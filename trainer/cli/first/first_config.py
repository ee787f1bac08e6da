"""A configuration for what somebody wants, has and owns: commented, and checked by the rules of all configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.cli.first.found_images import FoundImages
from trainer.config.yaml_source import dump

Aim = Literal["full", "lora", "word"]
_GIB = 1 << 30
_COMMENTS = {
    "run": "everything that this run writes goes here; the same command goes on where it stopped",
    "launch": "one worker a card",
    "model": "one .safetensors file, a diffusers folder, or a name on the Hugging Face hub",
    "data": "prepared once: latents in shards, 128 KB an image at 1024 x 1024",
    "captions": "from captions and tags to the text of each draw",
    "trainable": "what of the model trains; docs/what_trains.md",
    "adapter": "a small addition that trains in place of the model; docs/adapters.md",
    "new_tokens": "a word of your own; docs/new_tokens.md",
    "train": "length, batch and precision",
    "memory": "of each card; strategy and recomputation follow from it, `sdxl-train plan` says how",
    "optimizer": "docs/optimizers.md",
    "lr_schedule": "the learning rate as a function of the step",
    "checkpoint": "written beside the training; the newest three are kept",
    "validation": "the loss on images that are held out",
    "samples": "images drawn while training",
}


@dataclass(frozen=True)
class Wanted:
    """What is to be trained, and on what.

    Attributes:
        aim: `full`: the UNet itself; `lora`; `word`: vectors of a new word alone.
        cards: how many; 0: the CPU.
        card_gib: memory of the smallest; 24 where there is none to ask.
        word: of `word`.
    """

    aim: Aim
    model: str
    images: FoundImages
    run_dir: Path
    cards: int
    card_gib: float
    resolution: int = 1024
    word: str = ""


def first_config(wanted: Wanted) -> dict[str, Any]:
    """The sections, for `Config.model_validate`."""
    budget = max(5.0, _rounded(wanted.card_gib))
    sections: dict[str, Any] = {
        "run": {"dir": str(wanted.run_dir), "seed": 42},
        "model": {"path": wanted.model, "text_encoder_precision": "bf16"},
        "data": {"sources": [wanted.images.source], "prepared": f"{wanted.run_dir}-prepared"},
    }
    if wanted.resolution != 1024:
        side = wanted.resolution
        sections["data"]["buckets"] = {"resolution": side, "min_px": max(64, side // 4 // 64 * 64), "max_px": side * 2}
    if wanted.images.has_tags:
        sections["captions"] = {"use": "tags", "shuffle_tags": True, "dropout_rate": 0.05}
    own = {"full": _full, "lora": _lora, "word": _word}[wanted.aim](wanted, budget)
    for name, section in own.items():
        sections[name] = sections.get(name, {}) | section
    if wanted.aim == "word" or sections.get("trainable"):
        sections["model"].pop("text_encoder_precision", None)
    if wanted.cards:
        sections["memory"] = {"budget": f"{budget:g}GiB"} | sections.get("memory", {})
    sections["checkpoint"] = {"every": "15min", "export": {"when": "end"}}
    often = _within_the_run(wanted, sections, 2000 if wanted.aim == "full" else 500)
    sections["samples"] = {"every_steps": often if budget >= 9 or not wanted.cards else 0}
    order = [name for name in _COMMENTS if name in sections]
    return {name: sections[name] for name in order}


def _within_the_run(wanted: Wanted, sections: dict[str, Any], often: int) -> int:
    """Of few images the run is short: then a tenth of it is the warm-up, and samples are drawn as often; how often."""
    train = sections["train"]
    if wanted.images.images is None:
        return often
    batch = train.get("global_batch_size") or train["batch_size_per_gpu"] * max(wanted.cards, 1)
    tenth = max(1, train["epochs"] * -(-wanted.images.images // batch) // 10)
    tenth -= tenth % 10 ** (len(str(tenth)) - 1)
    schedule = sections["lr_schedule"]
    schedule["warmup_steps"] = min(schedule["warmup_steps"], tenth)
    return min(often, tenth)


def _rounded(card_gib: float) -> float:
    """What a worker may take of a card: half a gibibyte less, in halves."""
    return int((card_gib - 0.5) * 2) / 2


def _length(wanted: Wanted, visits: int) -> dict[str, Any]:
    """So many visits of all images, in whole epochs; of few images more, of many one."""
    count = wanted.images.images
    epochs = 1 if count is None or count >= visits else min(100, -(-visits // count))
    return {"epochs": epochs}


def _full(wanted: Wanted, budget: float) -> dict[str, Any]:
    train = _length(wanted, 40_000) | {"batch_size_per_gpu": 1}
    many = wanted.images.images is None or wanted.images.images >= 1000
    more: dict[str, Any] = {}
    if many:
        more = {"validation": {"every_steps": 2000}, "data": {"validation_fraction": 0.001}}
    if wanted.cards >= 4 and budget >= 22:
        texts = {f"text_encoder_{number}": {"train": True, "lr": 1.2e-5} for number in (1, 2)}
        train |= {"batch_size_per_gpu": 4, "global_batch_size": 4 * wanted.cards, "precision": "bf16"}
        return more | {"trainable": texts, "train": train, "optimizer": {"lr": 1.5e-6},
                       "lr_schedule": {"warmup_steps": 500}}  # fmt: skip
    train |= {"precision": "bf16_stochastic"}
    kind = {"kind": "adamw_8bit", "lr": 1.5e-6}
    if wanted.cards <= 1 and wanted.cards and budget < 20:
        return more | {"train": train, "optimizer": kind | {"lr": 1e-6}, "lr_schedule": {"warmup_steps": 1000},
                       "memory": {"release_gradients": True}}  # fmt: skip
    train |= {"global_batch_size": 16}
    return more | {"train": train, "optimizer": kind, "lr_schedule": {"warmup_steps": 500}}


def _lora(wanted: Wanted, budget: float) -> dict[str, Any]:
    held = "compute" if budget >= 9 or not wanted.cards else "int8" if budget >= 6.5 else "nf4"
    train = _length(wanted, 8_000) | {"batch_size_per_gpu": 1, "global_batch_size": max(4, wanted.cards)}
    found: dict[str, Any] = {
        "adapter": {"kind": "lora", "rank": 16, "alpha": 16},
        "train": train | {"precision": "bf16"},
        "optimizer": {"lr": 1e-4},
        "lr_schedule": {"kind": "cosine", "warmup_steps": 100},
    }
    return found | ({"model": {"frozen_weights": held}} if held != "compute" else {})


def _word(wanted: Wanted, budget: float) -> dict[str, Any]:
    held = "compute" if budget >= 8 or not wanted.cards else "int8"
    train = _length(wanted, 6_000) | {"batch_size_per_gpu": 1, "global_batch_size": max(4, wanted.cards)}
    found: dict[str, Any] = {
        "captions": {"prefix": f"a photo of {wanted.word},"},
        "trainable": {"unet": {"train": False}},
        "new_tokens": {"tokens": [{"token": wanted.word, "vectors": 4}], "lr": 1e-3},
        "train": train | {"precision": "bf16"},
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"warmup_steps": 50},
    }
    return found | ({"model": {"frozen_weights": held}} if held != "compute" else {})


def commented(sections: dict[str, Any], file: str, told: str) -> str:
    """The file: how to use it, and a line on each section."""
    lines = [f"# {told}", "#"]
    for command, what in (("plan", "look first: what fits and why, steps, data, captions"),
                          ("train", "prepare the data if needed, then train; the same command goes on")):  # fmt: skip
        typed = f"sdxl-train {'plan ' if command == 'plan' else ''}{file}"
        lines.append(f"#   {typed:{len(file) + len('sdxl-train plan ')}}   {what}")
    lines += ["#", "# Every key there is: docs/config.md, or `sdxl-train schema` for an editor.", ""]
    for name, section in sections.items():
        lines += [f"# {_COMMENTS[name]}", dump({name: section}).rstrip(), ""]
    return "\n".join(lines)
