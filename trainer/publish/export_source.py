"""What is published: the parts of a checkpoint and of the model that its run started from, and what they say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.ema_folders import average_folder, averages_in, components_of
from trainer.checkpoint.manifest import MANIFEST, manifest_entry, read_manifest
from trainer.checkpoint.run_dir import CHECKPOINTS, checkpoint_at, config_beside
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.model_files.components import PROJECTION_KEY, Component, TextProjection, require_whole
from trainer.model_files.diffusers_folder import read_object
from trainer.model_files.examine.identify import wrong_model_line
from trainer.model_files.examine.inspection import look
from trainer.model_files.key_map import COMPONENTS
from trainer.model_files.model_source import (
    ModelPath,
    ModelSource,
    find_source,
    open_component,
    open_folder_component,
)
from trainer.model_files.presets import preset
from trainer.model_files.tokenizer_files import tokenizer_folders
from trainer.model_files.told_prediction import told_prediction

# diffusers' own for a network with EDM's preconditioning; the values are those of `diffusion.prediction.edm`.
_EDM_SCHEDULER = {
    "_class_name": "EDMEulerScheduler",
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}


@dataclass(frozen=True)
class Source:
    """A model that can be written.

    Attributes:
        base: the model that says what the checkpoint does not: scheduler, tokenizers, markers.
        checkpoint: None if the source is no checkpoint.
        config: of the checkpoint's run, if it is known.
        metadata: of the single file that is written anew.
    """

    parts: dict[str, Component]
    base: ModelSource
    checkpoint: Path | None = None
    config: Config | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_source(
    place: Path,
    model: Path | None,
    vae: Path | None,
    weights: str,
    text_projection: TextProjection = "correct",
    config: Config | None = None,
) -> Source:
    """The parts of what is to be published, each from where it lies; reads headers and checksums alone.

    Args:
        place: a checkpoint, a run directory (its newest checkpoint), a diffusers folder or a single file.
        model: what the parts that a checkpoint lacks are taken from; None: the model that its run started from.
        weights: of a checkpoint: `live` for those that train, or an average of them by its name.
        vae: replaces the model's.
        text_projection: how a single file that is no run's model holds it.
        config: of the checkpoint's run; None: as it lies beside it.

    Raises:
        UserError: something is missing, damaged, or does not go together.
    """
    checkpoint = _checkpoint_at(place)
    if checkpoint is None:
        for given, option in ((model, "--model"), (weights != LIVE, f"--weights {weights}")):
            if given:
                raise UserError(f"{option}: has no effect; {place} is no checkpoint of a run")
        source = _sdxl(place)
        metadata = source.header.metadata if source.kind == "file" else {}
        text_projection = _file_projection(place, source, metadata, text_projection)
        return Source(model_parts(place, vae, text_projection), source, metadata=metadata)
    if (checkpoint / "adapter").is_dir():
        mend = "`sdxl-train adapter merge MODEL RUN` puts it into a model, and that can be taken here"
        raise UserError(f"{checkpoint}: holds an adapter, and no model; {mend}")
    if text_projection == "kohya" and not model:
        raise UserError("--from-kohya: has no effect; a run knows how its model holds the text projection")
    run_config = config_beside(checkpoint)
    if config is None and run_config.is_file():
        config = load_config(run_config, check_paths=False)
    base = model or (config.model.path if config else None)
    if base is None:
        raise UserError(
            f"{checkpoint}: only what was trained is in it, and {run_config}, which names the model that its run "
            "started from, is missing; give --model"
        )
    vae = vae or (config.model.vae if config and not model else None)
    if config and not model:
        text_projection = config.model.text_projection
    parts = model_parts(base, vae, text_projection)
    return Source(parts | _trained_parts(checkpoint, weights), find_source(base), checkpoint, config)


def _sdxl(place: Path) -> ModelSource:
    source = find_source(place)
    found = look(place)
    if found.kind != "sdxl":
        raise UserError(wrong_model_line("", place, found).removeprefix(": "))
    return source


def _file_projection(
    place: Path, source: ModelSource, metadata: Mapping[str, str], wished: TextProjection
) -> TextProjection:
    """How a single file holds the text projection: as it says of itself, or as the user does."""
    if wished == "kohya" and source.kind == "folder":
        raise UserError(f"--from-kohya: has no effect on {place}; in a folder the matrix has one meaning")
    told = metadata.get(PROJECTION_KEY)
    if told == "correct" and wished == "kohya":
        raise UserError(f"--from-kohya: {place} says of itself that it was exported with its text projection as others")
    return "kohya" if told == "kohya" else wished


def _checkpoint_at(place: Path) -> Path | None:
    """The checkpoint that is meant by `place`: itself, or a run's newest; None if it is a model."""
    if (place / MANIFEST).is_file() or (place / CHECKPOINTS).is_dir():
        found = checkpoint_at(place)
        if found is None:
            raise UserError(f"{place}: the run has no complete checkpoint")
        return found.absolute()
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    return None


def require_average(checkpoint: Path, name: str) -> None:
    """Refuse the name of an average that a checkpoint does not hold; `live` is always there.

    Raises:
        UserError: with the nearest right spelling, or what there is.
    """
    names = [LIVE, *averages_in(checkpoint)]
    if name in names:
        return
    if len(names) == 1:
        raise UserError(f"--weights {name}: {checkpoint} holds no running average; `ema.averages` makes a run keep one")
    near = nearest(name, names)
    mend = f"did you mean `{near}`?" if near else f"it holds {', '.join(names)}"
    raise UserError(f"--weights {name}: {checkpoint} holds no such average; {mend}")


def _trained_parts(checkpoint: Path, weights: str) -> dict[str, Component]:
    trained = [name for name in COMPONENTS if (checkpoint / name).is_dir()]
    folders = {name: checkpoint / name for name in trained}
    if weights != LIVE:
        require_average(checkpoint, weights)
        folders |= {name: checkpoint / average_folder(name, weights) for name in components_of(checkpoint, weights)}
    entries = read_manifest(checkpoint)
    for folder in folders.values():
        for file in sorted(folder.iterdir()):
            name = file.relative_to(checkpoint).as_posix()
            if entries.get(name) != manifest_entry(file):
                raise UserError(f"{checkpoint}: {name} is not what was written (checksum); take another checkpoint")
    return {name: require_whole(open_folder_component(name, folder)) for name, folder in folders.items()}


def model_parts(
    model: ModelPath, vae: Path | None = None, text_projection: TextProjection = "correct"
) -> dict[str, Component]:
    """All components of a model; `vae` (a model, or a VAE alone) replaces its VAE.

    Raises:
        UserError: a component is missing or incomplete.
    """
    source = find_source(model)
    parts = {}
    for name in COMPONENTS:
        of = find_source(vae) if name == "vae" and vae else source
        parts[name] = require_whole(open_component(of, name, text_projection))
    return parts


def prediction_of(source: Source, wished: str | None, wished_ztsnr: bool) -> tuple[str, bool]:
    """(epsilon, v_prediction or flow; zero terminal SNR), as asked for, or as the model says of itself."""
    told, told_ztsnr = _told_prediction(source)
    prediction = wished or told
    ztsnr = wished_ztsnr or (told_ztsnr and prediction == told)
    if prediction == "v_prediction":
        return prediction, ztsnr
    if wished_ztsnr:
        raise UserError(f"--ztsnr with prediction type {prediction}: zero terminal SNR needs v_prediction")
    return prediction, False  # loaders ignore the marker of zero terminal SNR where it stands alone


def _told_prediction(source: Source) -> tuple[str, bool]:
    """What the run has trained, or what the model says."""
    told = told_prediction(source.base)
    wished = source.config.objective if source.config else ObjectiveConfig()
    kind = told.kind if wished.prediction == "auto" else wished.prediction
    zero = told.zero_terminal_snr and kind == told.kind
    return kind, zero if wished.zero_terminal_snr == "auto" else wished.zero_terminal_snr


def _read_scheduler(base: ModelSource) -> dict[str, Any]:
    file = base.path / "scheduler" / "scheduler_config.json"
    return read_object(file, base.limits) if file.is_file() else preset("scheduler")


def scheduler_of(source: Source, prediction: str, ztsnr: bool) -> dict[str, Any]:
    """`scheduler_config.json` of a diffusers folder."""
    scheduler = _read_scheduler(source.base)
    if prediction == "flow":
        raise UserError("prediction type flow: there is no SDXL folder of that kind; write a single file")
    if prediction == "edm":
        return _EDM_SCHEDULER
    scheduler["prediction_type"] = prediction
    if ztsnr:
        # The first step must be at the last timestep, where there is no signal (Lin et al. 2024, section 3.3).
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler


def tokenizers_of(source: Source, given: Path | None) -> tuple[Path, Path | None]:
    """The folders of both tokenizers: of `given`, else of the run, else of the model; see `tokenizer_folders`.

    Raises:
        UserError: there are none.
    """
    of_run = source.config.model.tokenizer if source.config else None
    try:
        return tokenizer_folders(source.base, given or of_run)
    except UserError as error:
        said = " ".join(error.lines).replace("model.tokenizer", "--tokenizer").replace("model.path: ", "")
        raise UserError(f"the diffusers layout needs tokenizers: {said}") from None
