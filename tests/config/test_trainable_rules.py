"""What of `trainable`, and of gradients that are released, does not go together, each in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config.schema import Config

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")
TE = "trainable.text_encoder_1"

WRONG: dict[str, tuple[str, str]] = {
    "of what does not train": (
        "trainable: {text_encoder_1: {lr_scale: {mlp: 0.5}}}",
        f"{TE}.lr_scale = {{mlp: 0.5}} with {TE}.train = false (the default): has no effect on what does not train",
    ),
    "preset of what does not train": (
        "trainable: {unet: {train: false, preset: attention}, text_encoder_1: {train: true}}",
        "trainable.unet.preset = attention with trainable.unet.train = false: has no effect on what does not train",
    ),
    "no such preset": (
        "trainable: {unet: {preset: unet_70}}",
        "trainable.unet.preset = unet_70: must be one of all, unet_71, unet_68, unet_63, attention, cross_attention, "
        "deepest_half, deepest_quarter, outer_half (did you mean `unet_71`?)",
    ),
    "scale below 0": (
        "trainable: {unet: {lr_scale: {attn2: -1}}}",
        "trainable.unet.lr_scale = -1: must be at least 0",
    ),
    "scale is no number": (
        "trainable: {unet: {lr_scale: {attn2: half}}}",
        "trainable.unet.lr_scale = half: must be a number",
    ),
    "scales are no pairs": (
        "trainable: {unet: {lr_scale: [attn2]}}",
        "trainable.unet.lr_scale = [attn2]: must hold patterns with a number each, such as {attn2: 0.5}",
    ),
    "decay of layers": (
        "trainable: {unet: {layer_decay: 1.5}}",
        "trainable.unet.layer_decay = 1.5: must be at most 1",
    ),
    "moment": (
        "trainable: {text_encoder_1: {train: true, stop_at: 1.5}}",
        f"{TE}.stop_at = 1.5: must be a whole number or less than 1",
    ),
    "begins after the end": (
        "trainable: {text_encoder_1: {train: true, start_at: 100}}",
        f"{TE}.start_at = 100 with train.steps = 100: the run ends before it would begin to train",
    ),
    "stops before it starts": (
        "trainable: {text_encoder_1: {train: true, start_at: 0.5, stop_at: 0.25}}",
        f"{TE}.start_at = 0.5 with {TE}.stop_at = 0.25: it must stop after it has started",
    ),
    "nothing at first": (
        "trainable: {unet: {start_at: 5}}",
        "trainable.unet.start_at = 5: nothing would train at the start",
    ),
    "nothing at last": (
        "trainable: {unet: {stop_at: 0.9}, text_encoder_1: {train: true, stop_at: 0.5}}",
        f"trainable.unet.stop_at = 0.9 with {TE}.stop_at = 0.5: nothing would train at the end",
    ),
    "scale of no decay": (
        "trainable: {unet: {weight_decay: 0, weight_decay_scale: {attn2: 2}}}",
        "trainable.unet.weight_decay_scale = {attn2: 2.0} with trainable.unet.weight_decay = 0.0: has no effect on no "
        "decay",
    ),
    "release with passes": (
        "memory: {release_gradients: true}\nPASSES",
        "memory.release_gradients = true with train.gradient_accumulation_steps = 2: gradients are added up over the "
        "passes of a step",
    ),
    "release of several workers": (
        "memory: {release_gradients: true}\nlaunch: {workers: 2}",
        "memory.release_gradients = true with launch.workers = 2: several workers exchange gradients before they use "
        "them",
    ),
    "release with a strategy": (
        "memory: {release_gradients: true, strategy: zero2}",
        "memory.release_gradients = true with memory.strategy = zero2: must be auto; it is for one worker",
    ),
    "state in the host's memory without release": (
        "memory: {offload_optimizer: true}",
        "memory.offload_optimizer = true with memory.release_gradients = false (the default): needs "
        "memory.release_gradients: true, with which the optimizer takes its step block by block",
    ),
    "choice about no decay": (
        "trainable: {unet: {weight_decay: 0}}\nCHANGE",
        "optimizer.decay_norms_and_biases = false with trainable.unet.weight_decay = 0.0: has no effect; there is no "
        "weight decay",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line(mistakes: Callable[..., tuple[str, ...]], name: str) -> None:
    text, line = WRONG[name]
    written = RIGHT + text.removesuffix("\nCHANGE") + "\n"
    if text.endswith("PASSES"):
        written = written.replace("\nPASSES", "").replace("steps: 100", "steps: 100\n  gradient_accumulation_steps: 2")
    if text.endswith("CHANGE"):
        written = written.replace("lr: 1e-4", "lr: 1e-4\n  decay_norms_and_biases: false")
    (found,) = mistakes(written)
    assert found.split(": ", 1)[1].startswith(line), found


def test_what_goes_together(load: Callable[..., Config]) -> None:
    text = 'trainable: {unet: {lr_scale: {attn2: 0.5, "input_blocks.0*": 0}, preset: unet_71, stop_at: 90}}'
    config = load(RIGHT + text + "\n", ["trainable.unet.lr_scale.attn1=2", "trainable.text_encoder_2={train: true}"])
    assert list(config.trainable.unet.lr_scale.items()) == [("attn2", 0.5), ("input_blocks.0*", 0), ("attn1", 2)]
    assert config.trainable.unet.stop_at == 90
