"""What a prompt may say of its image: flags of a line, and names of a table, with what each takes.

Both are those of sd-scripts (library/train_util.py: `line_to_prompt_dict`, `sample_image_inference`), and mean what
they mean there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.config.section_rules.rules_samples import PIXELS_PER_LATENT
from trainer.config.sections.samples_config import MOST_STEPS, SamplerName, ScheduleName
from trainer.config.spelling import nearest
from trainer.config.values import LARGEST

_LARGEST_SEED = 2**32 - 1
_SCALES_END = 1_000_000.0
_WHOLE = re.compile(r"\d{1,10}", re.ASCII)  # holds all that is allowed, and int() of thousands takes long
_DECIMAL = re.compile(r"\d{1,6}(\.\d{0,12})?|\.\d{1,12}", re.ASCII)
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
_SAMPLERS: dict[str, tuple[SamplerName, ScheduleName | None]] = {
    "euler": ("euler", None),
    "k_euler": ("euler", None),
    "euler_a": ("euler_a", None),
    "k_euler_a": ("euler_a", None),
    "euler_ancestral": ("euler_a", None),
    "ddim": ("ddim", None),
    "dpmpp_2m": ("dpmpp_2m", None),
    "k_dpmpp_2m": ("dpmpp_2m", None),
    "dpmsolver++": ("dpmpp_2m", None),
    "dpmpp_2m_karras": ("dpmpp_2m", "karras"),
}
_FLAGS_IN_FULL = {  # what somebody may type in place of kohya's letters
    "negative": "n",
    "negative_prompt": "n",
    "neg": "n",
    "width": "w",
    "height": "h",
    "seed": "d",
    "steps": "s",
    "scale": "l",
    "cfg": "l",
    "cfg_scale": "l",
    "guidance": "l",
    "sampler": "ss",
}
_OTHERS_NAMES = {  # of OneTrainer, of A1111 and of `samples.images`
    "negative": "negative_prompt",
    "width_px": "width",
    "height_px": "height",
    "steps": "sample_steps",
    "diffusion_steps": "sample_steps",
    "cfg": "scale",
    "cfg_scale": "scale",
    "guidance": "scale",
    "sampler": "sample_sampler",
    "noise_scheduler": "sample_sampler",
}
_CONTROL_NET = "an image for a ControlNet, and none draws here"
_SHIFT, _LUMINA = "the flow shift of other models", "guidance of Lumina"
_FLAGS_NOT_HERE = {  # flags of sd-scripts that a run of SDXL cannot obey
    "am": "weights of networks, which only sd-scripts' generator reads; its trainers pass over it",
    "cn": _CONTROL_NET,
    "ctr": _LUMINA,
    "f": "frames of a video",
    "fs": _SHIFT,
    "rcfg": _LUMINA,
}
_NAMES_NOT_HERE = {
    "cfg_trunc_ratio": _LUMINA,
    "controlnet_image": _CONTROL_NET,
    "enum": "a number that sd-scripts sets by itself",
    "flow_shift": _SHIFT,
    "renorm_cfg": _LUMINA,
}


@dataclass(frozen=True)
class PromptSetting:
    """One thing that a prompt may say.

    Attributes:
        read: a value, of a table or of `typed`, as fields of `SampleImageConfig`. ValueError: the rule that it breaks.
        typed: the text behind a flag as the value that a table would hold.
    """

    read: Callable[[object], dict[str, object]]
    typed: Callable[[str], object] = str


def sampler_of(word: str) -> tuple[SamplerName, ScheduleName | None]:
    """What kohya's scripts, A1111 or we call a sampler, with the schedule that its name says, if it says one.

    Raises:
        ValueError: it is none of those that are there.
    """
    folded = word.lower().replace("dpm++", "dpmpp").replace(" ", "_").replace("-", "_")
    if folded in _SAMPLERS:
        return _SAMPLERS[folded]
    like = nearest(folded, _SAMPLERS)
    mend = f" (did you mean `{like}`?)" if like else ""
    raise ValueError(f"must be one of euler, euler_a, ddim, dpmpp_2m, dpmpp_2m_karras{mend}")


def unknown_flag(name: str) -> str:
    """What is wrong with a flag that is not in `BY_FLAG`, with the nearest that is."""
    if name.lower() in _FLAGS_NOT_HERE:
        return f"--{name}: has no effect, for it is {_FLAGS_NOT_HERE[name.lower()]}; leave it out"
    like = nearest(name, [*BY_FLAG, *_FLAGS_IN_FULL])
    if like:
        return f"--{name}: unknown flag; did you mean `--{_FLAGS_IN_FULL.get(like, like)}`?"
    return f"--{name}: unknown flag; there are {', '.join(f'--{flag}' for flag in BY_FLAG)}"


def unknown_name(name: str) -> str:
    """What is wrong with a name of a table that is not in `BY_NAME`, with the nearest that is."""
    if name in _NAMES_NOT_HERE:
        return f"{name}: has no effect, for it is {_NAMES_NOT_HERE[name]}; leave it out"
    meant = {flag: of_tables for flag, of_tables, _ in _OF_FLAGS} | _OTHERS_NAMES
    like = nearest(name, [*BY_NAME, *meant])
    if like:
        return f"{name}: unknown key; did you mean `{meant.get(like, like)}`?"
    return f"{name}: unknown key; there are {', '.join(BY_NAME)}"


def _text(key: str) -> Callable[[object], dict[str, object]]:
    def read(value: object) -> dict[str, object]:
        if not isinstance(value, str):
            raise ValueError("must be text")
        if _HALF_A_CHARACTER.search(value):
            raise ValueError("holds half a character (a lone surrogate)")
        return {key: value.strip()}

    return read


def _whole(key: str, least: int, most: int, multiple: int = 1) -> Callable[[object], dict[str, object]]:
    def read(value: object) -> dict[str, object]:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        if value % multiple:
            raise ValueError(f"must be a multiple of {multiple}")
        return {key: value}

    return read


def _scale(value: object) -> dict[str, object]:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _SCALES_END:
        raise ValueError("must be a number that is not negative")
    return {"guidance_scale": float(value)}


def _sampler(value: object) -> dict[str, object]:
    name, schedule = sampler_of(str(value))
    return {"sampler": name, "schedule": schedule} if schedule else {"sampler": name}


def _number(text: str) -> object:
    """What a table would hold; text that is no number stays text, which is refused there."""
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


_SIDE = (PIXELS_PER_LATENT, LARGEST, PIXELS_PER_LATENT)
_OF_FLAGS: tuple[tuple[str, str, PromptSetting], ...] = (
    ("n", "negative_prompt", PromptSetting(_text("negative_prompt"))),
    ("w", "width", PromptSetting(_whole("width_px", *_SIDE), _number)),
    ("h", "height", PromptSetting(_whole("height_px", *_SIDE), _number)),
    ("d", "seed", PromptSetting(_whole("seed", 0, _LARGEST_SEED), _number)),
    ("s", "sample_steps", PromptSetting(_whole("steps", 1, MOST_STEPS), _number)),
    ("l", "scale", PromptSetting(_scale, _number)),
    ("g", "guidance_scale", PromptSetting(_scale, _number)),  # of models that are told it; for SDXL the same
    ("ss", "sample_sampler", PromptSetting(_sampler)),
)
BY_FLAG: Mapping[str, PromptSetting] = {flag: setting for flag, _, setting in _OF_FLAGS}
"""The flags of a line, without their dashes."""
BY_NAME: Mapping[str, PromptSetting] = {
    "prompt": PromptSetting(_text("prompt")),
    **{name: setting for _, name, setting in _OF_FLAGS},
}
"""The names of a table in JSON or TOML."""
