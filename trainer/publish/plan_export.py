"""Publishes a checkpoint, a model folder or a single file: what is written, and what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer import __version__
from trainer.checkpoint.run_dir import checkpoint_step
from trainer.config.schema import Config
from trainer.config.sections.objective_config import flow_shift
from trainer.config.yaml_source import dump
from trainer.errors import UserError
from trainer.model_files.components import CONFIGS_KEY, PROJECTION_KEY, TextProjection
from trainer.model_files.modelspec import PREFIX, Description, modelspec, thumbnail_of, without_folders
from trainer.publish.export_source import Source, open_source, prediction_of, scheduler_of, tokenizers_of
from trainer.publish.weighted_sum import BlockWeights, merged_parts

if TYPE_CHECKING:
    from trainer.publish.write_model import Precision

TITLE_KEY = f"{PREFIX}title"
CONFIG_KEY = "sdxl_train.config"
_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Wish:
    """How a model is to be written.

    Attributes:
        out: the file, or the folder of the diffusers layout.
        layout: `peft`: of adapters alone, a folder as PEFT reads it.
        dtype: "same": as it is stored.
        vae_dtype: None: as `dtype`.
        weights: of a checkpoint: `live` for those that train, or a running average of them by its name.
        model, vae: see `open_source`.
        text_projection: "kohya": for those who go on with kohya's scripts.
        source_projection: "kohya": the single file that is read was saved by them; a run says so itself.
        tokenizer: folder that holds both tokenizers, for the diffusers layout; None: the model's.
        prediction_type: None: what the model itself says.
        thumbnail: an image; None: the newest samples of the run.
    """

    out: Path
    layout: Literal["single-file", "diffusers", "peft"] = "single-file"
    dtype: Literal["fp16", "bf16", "fp32", "same"] = "fp16"
    vae_dtype: Literal["fp16", "bf16", "fp32", "same"] | None = None
    weights: str = "live"
    model: Path | None = None
    vae: Path | None = None
    text_projection: TextProjection = "correct"
    source_projection: TextProjection = "correct"
    tokenizer: Path | None = None
    prediction_type: Literal["epsilon", "v_prediction", "flow"] | None = None
    ztsnr: bool = False
    description: Description = field(default_factory=Description)
    thumbnail: Path | None = None
    with_thumbnail: bool = True
    with_config: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class PreparedExport:
    """An export of which everything is checked but the values.

    Attributes:
        total_bytes: of the tensors.
        notes: what a person should know of it.
        write: takes a function that is told of the bytes written; leaves nothing behind when it fails.
        place: where it is written; None: where it was asked for.
    """

    total_bytes: int
    notes: tuple[str, ...]
    write: Callable[[Callable[[int], None] | None], None]
    place: Path | None = None


def prepare_export(place: Path, wish: Wish, config: Config | None = None) -> PreparedExport:
    """Look at everything that an export needs, without reading weights that need no check.

    Args:
        place: a checkpoint, a run directory (its newest checkpoint), a diffusers folder or a single file.
        config: of the checkpoint's run; None: as it lies beside it.

    Raises:
        UserError: something is missing, damaged, or does not go together.
    """
    from trainer.publish.new_tokens_export import holds_only_tokens, prepare_tokens, tokens_in

    require_place(wish)
    tokens = tokens_in(place)
    if tokens is None:
        return _prepare_weights(place, wish, config)
    return prepare_tokens(tokens, wish, None if holds_only_tokens(tokens) else _prepare_weights(place, wish, config))


def _prepare_weights(place: Path, wish: Wish, config: Config | None) -> PreparedExport:
    from trainer.publish.adapter_export import adapter_in, prepare_adapter

    if (checkpoint := adapter_in(place)) is not None:
        return prepare_adapter(checkpoint, wish, config)
    if wish.layout == "peft":
        raise UserError(f"--layout peft: {place} is no run or checkpoint with an adapter")
    source = open_source(place, wish.model, wish.vae, wish.weights, wish.source_projection, config)
    prediction, ztsnr = prediction_of(source, wish.prediction_type, wish.ztsnr)
    if wish.layout == "diffusers":
        return prepare_folder(source, wish, prediction, ztsnr)
    return prepare_file(source, wish, prediction, ztsnr)


def prepare_merge(first: Path, second: Path, alpha: float, blocks: BlockWeights, wish: Wish) -> PreparedExport:
    """The same for the weighted sum of two models as one file; what is not weights is the first's.

    Args:
        first, second: checkpoints, runs, diffusers folders or single files.
        alpha, blocks: see `merged_parts`.

    Raises:
        UserError: as `prepare_export`, and where the models do not go together.
    """
    require_place(wish)
    a, b = open_source(first, None, wish.vae, "live"), open_source(second, None, None, "live")
    told = [prediction_of(source, wish.prediction_type, wish.ztsnr) for source in (a, b)]
    if told[0] != told[1]:
        kinds = [prediction + " with zero terminal SNR" * ztsnr for prediction, ztsnr in told]
        raise UserError(f"{first} predicts {kinds[0]}, {second} {kinds[1]}: their sum would be neither")
    names = [_name_of(a, first), _name_of(b, second)]
    description = replace(wish.description, merged_from=", ".join(names))
    parts, kept = merged_parts(a.parts, b.parts, alpha, blocks), {f"{PREFIX}resolution": _resolution(a)}
    merged = replace(a, parts=parts, config=None, checkpoint=None, metadata=kept)
    recipe = {"a": names[0], "b": names[1], "alpha": alpha, "blocks": [list(pair) for pair in blocks]}
    more = {"sdxl_train.merge": json.dumps(recipe)}
    return prepare_file(merged, replace(wish, description=description), *told[0], more)


def _name_of(source: Source, place: Path) -> str:
    if source.checkpoint:
        return f"{source.checkpoint.parent.parent.name} step {checkpoint_step(source.checkpoint)}"
    return source.metadata.get(TITLE_KEY) or place.absolute().stem


def require_place(wish: Wish) -> None:
    """Refuse a place that cannot be written to, or holds something else."""
    if wish.layout == "single-file" and wish.out.suffix != ".safetensors":
        raise UserError(f"{wish.out}: a single file's name must end in .safetensors; other programs go by it")
    if wish.out.exists() and not wish.overwrite:
        raise UserError(f"{wish.out}: exists; give another name, or --overwrite")
    if wish.out.exists() and not _is_replaceable(wish):
        folders = {"diffusers": "a model in diffusers' layout", "peft": "a folder of PEFT's"}
        what = folders.get(wish.layout, "a file")
        raise UserError(f"{wish.out}: --overwrite replaces {what}, and this is none; give another name")
    if not wish.out.absolute().parent.is_dir():
        raise UserError(f"{wish.out.absolute().parent}: no such folder")


def _is_replaceable(wish: Wish) -> bool:
    """Whether what lies at `wish.out` is what it would be replaced by, and no folder of other things."""
    if wish.layout == "single-file":
        return wish.out.is_file()
    if not wish.out.is_dir():
        return False
    marks = ("unet/adapter_config.json",) if wish.layout == "peft" else ("model_index.json",)
    return any((wish.out / mark).is_file() for mark in marks) or not any(wish.out.iterdir())


def prepare_file(
    source: Source, wish: Wish, prediction: str, ztsnr: bool, more: Mapping[str, str] | None = None
) -> PreparedExport:
    """One file; `more`: further metadata."""
    from trainer.publish.write_model import file_metadata, plan_single_file, total_bytes, write_single_file

    if prediction == "edm":
        raise UserError("prediction type edm: no program reads it from a single file of SDXL; use --layout diffusers")
    markers = ("v_pred",) * (prediction == "v_prediction") + ("ztsnr",) * ztsnr
    planned = plan_single_file(source.parts, _precision(wish), markers, wish.text_projection)
    metadata = _metadata(source, wish, prediction) | dict(more or {}) | file_metadata(source.parts)
    notes = [f"marked {' and '.join(markers)}: ComfyUI, A1111 and Forge set themselves to it"] if markers else []
    if prediction == "flow":
        shift = f" with shift {_flow_shift(source):g}" if source.config else ""
        notes.append(f"flow has no marker that other tools know: in ComfyUI, add the node ModelSamplingSD3{shift}")

    def write(on_written: Callable[[int], None] | None) -> None:
        with disk_errors(wish.out):
            write_single_file(wish.out, planned, metadata, on_written)

    return PreparedExport(total_bytes(planned), tuple(notes), write)


def prepare_folder(source: Source, wish: Wish, prediction: str, ztsnr: bool) -> PreparedExport:
    """A folder in diffusers' layout."""
    from trainer.publish.write_model import plan_component, total_bytes, write_folder

    precision, tokenizers = _precision(wish), tokenizers_of(source, wish.tokenizer)
    scheduler = scheduler_of(source, prediction, ztsnr)
    planned = [tensor for part in source.parts.values() for tensor in plan_component(part, precision)]

    def write(on_written: Callable[[int], None] | None) -> None:
        with disk_errors(wish.out):
            write_folder(wish.out, source.parts, precision, scheduler, tokenizers, on_written)

    return PreparedExport(total_bytes(planned), (), write)


def _flow_shift(source: Source) -> float:
    assert source.config is not None
    return flow_shift(source.config.objective.flow, source.config.data.buckets.resolution)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the disk does not take, as one line."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename and Path(error.filename).parent != out.parent else ""
        raise UserError(f"{out}: could not be written: {error.strerror}{place}; nothing was left behind") from error


def _precision(wish: Wish) -> Precision:
    from trainer.model_files.tensor_file import torch_dtype
    from trainer.publish.write_model import Precision

    names = (wish.dtype, wish.vae_dtype or wish.dtype)
    model, vae = (None if name == "same" else torch_dtype(_DTYPES[name]) for name in names)
    return Precision(model, vae)


def _metadata(source: Source, wish: Wish, prediction: str) -> dict[str, str]:
    config, checkpoint = source.config, source.checkpoint
    kept = _kept_metadata(source, wish)
    title = wish.description.title or kept.get(TITLE_KEY) or wish.out.stem
    precision = _precision(wish)
    stored = {name: next(iter(part.tensors.values())).meta.dtype for name, part in source.parts.items()}
    spec = modelspec(
        replace(wish.description, title=title),
        resolution=_resolution(source),
        prediction_type=prediction,
        unet_dtype=str(precision.of("unet", stored["unet"])).removeprefix("torch."),
        vae_dtype=str(precision.of("vae", stored["vae"])).removeprefix("torch."),
        thumbnail=run_thumbnail(wish, checkpoint),
    )
    own = {"sdxl_train.version": __version__, PROJECTION_KEY: wish.text_projection}
    if prediction == "flow" and config is not None:
        own["sdxl_train.flow_shift"] = f"{_flow_shift(source):g}"
    if checkpoint is not None:
        _, _, length = checkpoint.name.partition("-length-")  # computed by `sdxl-train ema`
        weights = f"average of length {length}" if length else wish.weights
        own |= {"sdxl_train.step": str(checkpoint_step(checkpoint)), "sdxl_train.weights": weights}
    if config and wish.with_config:
        own[CONFIG_KEY] = dump(without_folders(json.loads(config.model_dump_json(exclude={"notify"}))))
    return kept | spec | own


def _kept_metadata(source: Source, wish: Wish) -> dict[str, str]:
    """What a single file says that stays true when it is written anew."""
    gone = {CONFIGS_KEY} | ({CONFIG_KEY} if not wish.with_config else set())
    gone |= {f"{PREFIX}thumbnail"} if not wish.with_thumbnail else set()
    return {name: text for name, text in source.metadata.items() if name not in gone and "hash" not in name}


def _resolution(source: Source) -> str:
    """Width x height of square images: of the run's buckets, or what a file says, or the UNet's own size."""
    if source.config:
        side = source.config.data.buckets.resolution
    elif told := source.metadata.get(f"{PREFIX}resolution"):
        return told
    else:
        size = source.parts["unet"].config.get("sample_size")
        side = 8 * size if isinstance(size, int) else 1024
    return f"{side}x{side}"


def run_thumbnail(wish: Wish, checkpoint: Path | None) -> str | None:
    """The image that was given, or the run's newest samples."""
    if wish.thumbnail is not None:
        return thumbnail_of([wish.thumbnail])
    if checkpoint is None or not wish.with_thumbnail:
        return None
    samples, step = checkpoint.parent.parent / "samples", checkpoint_step(checkpoint)
    own = sorted(samples.glob(f"step-????????-{wish.weights}/")) or sorted(samples.glob("step-????????/"))
    drawn = [sorted(folder.glob("*.png")) for folder in own if checkpoint_step(folder) <= step]
    newest = next((images for images in reversed(drawn) if images), None)
    return thumbnail_of(newest[:4]) if newest else None
