"""The values that configuration keys take, and what all sections have in common."""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import PydanticCustomError

_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
LARGEST = 2**31 - 1
_SIZE = re.compile(r"\d+(\.\d+)? ?[KMG]i?B")
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MASK_SUFFIX = re.compile(r"[^/]+\.(png|jpe?g|webp|bmp|tiff?)")
WEBHOOK_VARIABLE = "SDXL_TRAIN_WEBHOOK"
_VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_NCCL_NAME = re.compile(r"NCCL_[A-Z0-9_]{1,60}")
_NCCL_VALUE = re.compile(r"[ -~]{1,200}")
_FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def yes_no(value: object) -> object:
    """The other words for a flag; anything else as it is."""
    return _YES_NO.get(value.lower(), value) if isinstance(value, str) else value


def _path(value: object) -> object:
    """`~` is expanded here; an empty path would silently mean the current directory."""
    if not isinstance(value, str):
        return value
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("rule", "must be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise PydanticCustomError("rule", "must be a path; `~` and a name is the home folder of a known user") from None


def _model(value: object) -> Path | str:
    """A path, or as text the id of a model on the hub: two names with a slash, where no such path begins here."""
    path = _path(value)
    if not isinstance(value, str) or not isinstance(path, Path):
        raise PydanticCustomError("rule", "must be a path or the id of a model on the hub")
    is_id = _HUB_ID.fullmatch(value) and not value.endswith(_FILE_ENDINGS) and not path.parent.exists()
    return value if is_id else path


def yes_no_or_path(value: object) -> object:
    """A word for a flag, or a path as text."""
    value = yes_no(value)
    return str(_path(value)) if isinstance(value, str) else value


def _size(value: object) -> object:
    """`auto`, or a number with a unit."""
    if isinstance(value, str) and (value == "auto" or _SIZE.fullmatch(value)):
        return value
    raise PydanticCustomError("rule", "must be auto or a size with its unit, such as 23GiB")


def _duration(value: object) -> object:
    """`never`, or a number with a unit of time."""
    if isinstance(value, str) and (value == "never" or ((found := _DURATION.fullmatch(value)) and float(found[1]) > 0)):
        return value
    raise PydanticCustomError("rule", "must be never or a time with its unit, such as 15min")


def seconds_of(duration: str) -> float | None:
    """Of a `Duration`; None for `never`."""
    found = _DURATION.fullmatch(duration)
    return float(found[1]) * _SECONDS[found[2]] if found else None


def _mask_suffix(value: str) -> str:
    """What follows an image's name without ending in the name of its mask."""
    if _MASK_SUFFIX.fullmatch(value):
        return value
    raise PydanticCustomError("rule", "must be a mark and an ending of images, such as -masklabel.png")


def _source_name(value: str) -> str:
    """The first part of an image's key."""
    if value.strip() == value and value.isprintable() and value and "/" not in value and len(value) <= 100:
        return value
    raise PydanticCustomError("rule", "must be a name of up to 100 characters without a slash")


class SecretText(str):
    """Text that is a secret itself; a configuration that is written out has `stand_in` in its place."""

    stand_in = f"env:{WEBHOOK_VARIABLE}"


def _webhook(value: object) -> str:
    """`env:NAME`, `file:PATH`, or an address, which is secret: whoever has it can write there."""
    if isinstance(value, str) and value.isprintable() and " " not in value.strip():
        if _VARIABLE.fullmatch(value):
            return value
        if value.startswith("file:") and len(value) > len("file:"):
            return f"file:{Path(value.removeprefix('file:')).expanduser().absolute()}"
        try:
            parts = urlsplit(value)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:  # a wrong port raises
                return SecretText(value)
        except ValueError:
            pass
    raise PydanticCustomError("rule", "must be an address that begins with https://, or env:NAME, or file:PATH")


def _without_secret(value: str) -> str:
    return value.stand_in if isinstance(value, SecretText) else value


def _nccl(value: object) -> dict[str, str]:
    """Variables of NCCL's and their values, as the environment has them."""
    if isinstance(value, dict):
        settings = {name: str(each) for name, each in value.items() if isinstance(each, str | int)}
        names_are_right = all(isinstance(name, str) and _NCCL_NAME.fullmatch(name) for name in value)
        if names_are_right and len(settings) == len(value) and all(map(_NCCL_VALUE.fullmatch, settings.values())):
            return settings
    raise PydanticCustomError("rule", "must hold variables of NCCL with a word or number each: {NCCL_MAX_NCHANNELS: 4}")


Flag = Annotated[bool, BeforeValidator(yes_no, json_schema_input_type=bool | Literal["yes", "no", "on", "off"])]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
SourceName = Annotated[str, AfterValidator(_source_name)]
SourceWeight = Annotated[float, Field(gt=0, le=1000)]
MOST_LOSS_WEIGHT = 100.0
LossWeight = Annotated[float, Field(gt=0, le=MOST_LOSS_WEIGHT)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Separator = Annotated[str, Field(min_length=1)]
CpuList = Annotated[str, Field(pattern=r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$")]
ModelField = Annotated[Path | str, PlainValidator(_model, json_schema_input_type=Path | str)]
PathField = Annotated[Path, Field(strict=False), BeforeValidator(_path, json_schema_input_type=Path)]
MaskSuffix = Annotated[str, AfterValidator(_mask_suffix)]
Size = Annotated[str, BeforeValidator(_size)]
Duration = Annotated[str, BeforeValidator(_duration)]
Webhook = Annotated[str, PlainValidator(_webhook, json_schema_input_type=str), PlainSerializer(_without_secret)]
NcclSettings = Annotated[dict[str, str], PlainValidator(_nccl, json_schema_input_type=dict[str, str | int])]
FrozenWeights = Literal["compute", "int8", "nf4"]


class Section(BaseModel):
    """Common rules of all sections: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
