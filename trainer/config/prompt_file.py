"""A text file of prompts, one a line, with kohya's flags at a line's end, as entries of `samples.images`.

The flags are those of sd-scripts (library/train_util.py, `line_to_prompt_dict`), and mean what they mean there.
"""

import re
from collections.abc import Callable
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.section_rules.rules_samples import PIXELS_PER_LATENT, sample_rules
from trainer.config.sections.samples_config import MOST_STEPS, SampleImageConfig, SamplerName, ScheduleName
from trainer.config.spelling import nearest, nearest_path
from trainer.config.values import LARGEST
from trainer.errors import UserError
from trainer.guards import decode_text, read_bytes

_MOST_BYTES = 1 << 20
_MOST_PROMPTS = 500  # of which one sheet is made
_MOST_TOLD = 20
_LARGEST_SEED = 2**32 - 1
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
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
_IN_FULL = {  # what somebody may type in place of kohya's letters
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
_NOT_HERE = {  # flags of sd-scripts that a run of SDXL cannot obey
    "am": "weights of networks, which only sd-scripts' generator reads; its trainers pass over it",
    "cn": "an image for a ControlNet, and none draws here",
    "f": "frames of a video",
    "fs": "the flow shift of other models",
}


def with_prompts_read(config: Config) -> Config:
    """The configuration with what `samples.prompt_file` holds in `samples.images`, so that the file may go.

    Raises:
        UserError: as `read_prompts`; or a line asks for what has no effect.
    """
    samples = config.samples
    if samples.prompt_file is None:
        return config
    read, before = read_prompts(samples.prompt_file), len(samples.images)
    images = [*samples.images, *read.values()]
    read_in = samples.model_copy(update={"images": images, "prompt_file": None})
    config = config.model_copy(update={"samples": read_in})
    lines = [f"{samples.prompt_file}:{line}: " for line in read]
    wrong = list[str]()
    for problem in sample_rules(config):
        number = next((key[2] for key in problem.keys if key[:2] == ("samples", "images")), -1)
        if isinstance(number, int) and number >= before:
            wrong.append(lines[number - before] + problem.text.replace(f"samples.images.{number}.", ""))
    if wrong:
        raise UserError(*wrong)
    return config


def read_prompts(path: Path) -> dict[int, SampleImageConfig]:
    """The prompts of a file by line: `PROMPT [--n NEGATIVE] [--w PX] [--h PX] [--d SEED] [--s STEPS] [--l SCALE]
    [--ss SAMPLER]`. Empty lines and those that begin with `#` are passed over.

    Raises:
        UserError: the file cannot be read or holds no prompt; or a line for each one that is not understood.
    """
    if path.suffix.lower() in (".json", ".toml", ".yaml", ".yml"):
        raise UserError(f"{path}: must be a text file with a prompt a line; lists of settings go into samples.images")
    try:
        text = decode_text(read_bytes(path, _MOST_BYTES), str(path)).text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found, wrong = dict[int, SampleImageConfig](), list[str]()
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found[number] = prompt_of_line(line)
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if wrong:
        more = [f"{path}: and {len(wrong) - _MOST_TOLD:,} more lines"] if len(wrong) > _MOST_TOLD else []
        raise UserError(*wrong[:_MOST_TOLD], *more)
    if not found:
        raise UserError(f"{path}: holds no prompt; a line holds one, and those that begin with # are comments")
    if len(found) > _MOST_PROMPTS:
        raise UserError(f"{path}: holds {len(found):,} prompts; at most {_MOST_PROMPTS} are drawn")
    return found


def prompt_of_line(line: str) -> SampleImageConfig:
    """The prompt and the settings of one line.

    Raises:
        ValueError: it says what of the line is wrong, without its place.
    """
    prompt, *flags = (part.strip() for part in _FLAG.split(line.strip()))
    if not prompt:
        raise ValueError("has no prompt before its flags")
    settings: dict[str, object] = {"prompt": prompt}
    for flag in flags:
        name, value = [*flag.split(None, 1), ""][:2]
        if name.lower() not in _READ:
            raise ValueError(_unknown(name))
        read = _READ[name.lower()]
        if not value and name.lower() != "n":
            raise ValueError(f"--{name}: has no value")
        for key, said in read(f"--{name}", value).items():
            if key in settings:
                raise ValueError(f"--{name} {value}: {key} is said twice")
            settings[key] = said
    return SampleImageConfig.model_validate(settings)


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


def _unknown(name: str) -> str:
    if name.lower() in _NOT_HERE:
        return f"--{name}: has no effect, for it is {_NOT_HERE[name.lower()]}; leave it out"
    like = nearest(name, [*_READ, *_IN_FULL])
    if like:
        return f"--{name}: unknown flag; did you mean `--{_IN_FULL.get(like, like)}`?"
    return f"--{name}: unknown flag; there are {', '.join(f'--{flag}' for flag in _READ)}"


def _text(key: str) -> Callable[[str, str], dict[str, object]]:
    return lambda flag, value: {key: value}


def _whole(key: str, least: int, most: int, multiple: int = 1) -> Callable[[str, str], dict[str, object]]:
    def read(flag: str, value: str) -> dict[str, object]:
        # Ten digits hold all that is allowed, and int() of thousands takes long.
        number = int(value) if value.isascii() and value.isdigit() and len(value) <= 10 else None
        if number is None or not least <= number <= most:
            raise ValueError(f"{flag} {value}: must be a whole number from {least} to {most}")
        if number % multiple:
            raise ValueError(f"{flag} {value}: must be a multiple of {multiple}")
        return {key: number}

    return read


def _scale(flag: str, value: str) -> dict[str, object]:
    if not re.fullmatch(r"\d{1,6}(\.\d{0,12})?|\.\d{1,12}", value, re.ASCII):
        raise ValueError(f"{flag} {value}: must be a number that is not negative")
    return {"guidance_scale": float(value)}


def _sampler(flag: str, value: str) -> dict[str, object]:
    try:
        name, schedule = sampler_of(value)
    except ValueError as error:
        raise ValueError(f"{flag} {value}: {error}") from None
    return {"sampler": name, "schedule": schedule} if schedule else {"sampler": name}


_READ: dict[str, Callable[[str, str], dict[str, object]]] = {
    "n": _text("negative_prompt"),
    "w": _whole("width_px", PIXELS_PER_LATENT, LARGEST, PIXELS_PER_LATENT),
    "h": _whole("height_px", PIXELS_PER_LATENT, LARGEST, PIXELS_PER_LATENT),
    "d": _whole("seed", 0, _LARGEST_SEED),
    "s": _whole("steps", 1, MOST_STEPS),
    "l": _scale,
    "g": _scale,  # of models that are told their guidance; for SDXL the same
    "ss": _sampler,
}
