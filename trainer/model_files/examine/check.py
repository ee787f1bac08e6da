"""Whether a model can be trained: looks at configurations, names and shapes before anything is started; without torch.

Only a pickled checkpoint takes torch, which alone can read its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.components import PROJECTION_KEY, TextProjection, name_in_module, require_unscaled
from trainer.model_files.diffusers_folder import WEIGHTS_STEMS, read_config, weight_files
from trainer.model_files.examine.identify import WANTED, Identity, classify, identify, wrong_model_line
from trainer.model_files.header import Header, HeaderFault, TensorEntry, read_header
from trainer.model_files.hub import cached_model, download_model
from trainer.model_files.key_map import COMPONENTS, TEXT_PROJECTION, UNET_PREFIX, single_file_keys
from trainer.model_files.model_source import (
    LINEAR_PROJECTIONS,
    ModelPath,
    ModelSource,
    bounded_config,
    component_folder,
    file_config,
    file_keys,
    find_source,
    names_of,
)
from trainer.model_files.run_model import RunModel
from trainer.model_files.tokenizer_files import require_sound, tokenizer_folders

LAYOUT = "SDXL in diffusers' folder layout (unet/, vae/, text_encoder/, text_encoder_2/)"
_BAD_CONFIGS = "the configurations in its metadata cannot be used"
_WANTED_VAE = "an SDXL VAE (one .safetensors file or a folder)"
# What the weights are in; integers are of quantised models, which keep their scales elsewhere.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_model(
    model: ModelPath,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    text_projection: TextProjection = "correct",
    limits: Limits = DEFAULT_LIMITS,
) -> RunModel:
    """Opens a complete SDXL model that this trainer can train; refuses anything else. A hub id is downloaded.

    Takes milliseconds where the model lies here.

    Args:
        model: `model.path` of the configuration.
        vae: `model.vae`, which stands in for the model's own.
        tokenizer: `model.tokenizer`.
        text_projection: `model.text_projection`.
        limits: `limits` of the configuration.
    Raises:
        UserError: with one line per problem; a model of another kind gets one line alone.
    """
    if isinstance(model, str):
        model = _hub_folder(model, vae, tokenizer, limits)
    source, configs, problems = _problems(model, vae is None, text_projection, limits)
    opened = RunModel(source, source, tokenizer, text_projection)
    if vae is not None:
        vae_source, config, found = _check_vae(vae, limits)
        opened = replace(opened, vae_source=vae_source or source)
        configs |= {"vae": config} if config else {}
        problems += found
    try:
        one, two = opened.tokenizers
        words = [configs.get(name, {}).get("vocab_size", 49408) for name in ("text_encoder", "text_encoder_2")]
        require_sound(one, limits, min(words) if two is None else words[0])
        if two is not None:
            require_sound(two, limits, words[1])
    except UserError as error:
        problems += error.lines
    if "unet" in configs:
        problems += _check_fit(configs)
    if problems:
        raise UserError(*problems)
    return opened


def _hub_folder(hub_id: str, vae: Path | None, tokenizer: Path | None, limits: Limits) -> Path:
    """The model in the hub's cache, downloaded if it is not there as a whole."""
    folder = cached_model(hub_id)
    if folder is None or _folder_problems(folder, vae is None, limits)[1]:
        return download_model(hub_id)
    try:
        tokenizer_folders(ModelSource(folder, "folder"), tokenizer)
    except UserError:
        return download_model(hub_id)
    return folder


def _problems(
    path: Path, needs_vae: bool, text_projection: TextProjection, limits: Limits
) -> tuple[ModelSource, dict[str, dict[str, Any]], list[str]]:
    """The model opened, configurations of the components that were found, and what is wrong with them."""
    found = identify(path, limits)
    if found.kind == "pickle" and path.is_file():
        found = classify(ModelSource(path, "pickle", limits).header)
    # A model of another kind lacks parts by its nature: its one line says more than the list of them.
    if found.kind != "sdxl" and (found.is_readable or not path.is_dir()):
        raise UserError(wrong_model_line("model.path", path, found))
    if not path.is_dir():
        source = find_source(path, limits)
        return source, *_file_problems(source, found, needs_vae, text_projection)
    if not (path / "unet").is_dir():
        raise UserError(wrong_model_line("model.path", path, found))
    configs, problems = _folder_problems(path, needs_vae, limits)
    if text_projection == "kohya":
        problems.append(
            "model.text_projection = kohya: has no effect on a folder, where the matrix has one meaning; "
            "use it with the single file of a kohya run"
        )
    return ModelSource(path, "folder", limits), configs, problems


def _folder_problems(path: Path, needs_vae: bool, limits: Limits) -> tuple[dict[str, dict[str, Any]], list[str]]:
    configs: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in COMPONENTS:
        if name != "vae" or needs_vae:
            config, found = _check_component("model.path", path / name, name, limits)
            problems += found
            configs |= {name: config} if config is not None else {}
    return configs, problems


def _check_component(place: str, folder: Path, name: str, limits: Limits) -> tuple[dict[str, Any] | None, list[str]]:
    if not folder.is_dir():
        return None, [f"{place}: {folder}: the folder is missing; wanted {LAYOUT}"]
    file = folder / "config.json"
    if not file.is_file():
        return None, [f"{place}: {file}: the file is missing"]
    try:
        config = bounded_config(name, folder, read_config(folder, limits))
    except UserError as error:
        return None, [f"{place}: {line}" for line in error.lines]
    return config, _check_weights(place, folder, name, config, limits)


def _check_weights(place: str, folder: Path, name: str, config: Mapping[str, Any], limits: Limits) -> list[str]:
    stem = WEIGHTS_STEMS[name]
    try:
        files = weight_files(folder, limits)
    except UserError as error:
        return [f"{place}: {line}" for line in error.lines]
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        mend = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        return [f"{place}: {folder}: no weights; wanted {stem}.safetensors{mend}"]
    lines: list[str] = []
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if not file.is_file():
            lines.append(f"{place}: {file}: the file is missing, and the index beside it names it")
            continue
        header, line = _header_of(place, file, limits)
        tensors |= header.tensors if header else {}
        lines += [line] if line else []
    return lines or _check_stored(place, folder, name, config, tensors)


def _header_of(place: str, file: Path, limits: Limits) -> tuple[Header | None, str]:
    """The header of a file, or what is wrong with it."""
    try:
        return read_header(file, limits), ""
    except HeaderFault as fault:
        return None, f"{place}: {file} is {fault.description}{f'; {fault.mend}' if fault.mend else ''}"


# Tensors that say how large a component is: name in its module, and the keys of its configuration by axis.
_SIZES = {
    "unet": ("conv_in.weight", ("block_out_channels", "in_channels")),
    "text_encoder": ("embeddings.token_embedding.weight", ("vocab_size", "hidden_size")),
    "text_encoder_2": ("text_model.embeddings.token_embedding.weight", ("vocab_size", "hidden_size")),
}


def _check_stored(
    place: str, folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> list[str]:
    """Whether a folder holds the tensors that its configuration asks for, of the sizes that it says.

    The rest of the shapes is compared when the network is laid out, which takes as long as the network is large.
    """
    try:
        require_unscaled(folder, tensors)
    except UserError as error:
        return [f"{place}: {line}" for line in error.lines]
    wanted = {own for entry in single_file_keys({name: config}) for own in entry.names}
    stored = {name_in_module(own, wanted): entry for own, entry in tensors.items()}
    missing = sorted(wanted - stored.keys())
    if missing:
        lacks = f"lacks {len(missing):,} of the {name}'s {len(wanted):,} tensors, such as {missing[0]}"
        return [f"{place}: {folder}: {lacks}; its configuration asks for them"]
    own, keys = _SIZES.get(name, ("", ()))
    for key, found in zip(keys, stored[own].shape if own else (), strict=False):
        said = config.get(key)
        said = said[0] if isinstance(said, list) else said
        if said is not None and said != found:
            return [f"{place}: {folder / 'config.json'}: {key} = {said}, and the weights have {found} ({own})"]
    return []


def _file_problems(
    source: ModelSource, found: Identity, needs_vae: bool, text_projection: TextProjection
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    path, missing = source.path, [name for name in COMPONENTS if name not in found.parts]
    if missing == ["vae"]:
        if needs_vae:
            raise UserError(f"model.path: {path} is {found.description}; give one by model.vae")
    elif missing:
        raise UserError(wrong_model_line("model.path", path, found))
    header = source.header
    try:
        configs = {name: file_config(header, name) for name in COMPONENTS if name != "vae" or needs_vae}
    except ValueError as error:
        return {}, [f"model.path: {path}: {_BAD_CONFIGS}: {error}"]
    width = header.tensors[f"{UNET_PREFIX}input_blocks.0.0.weight"].shape[0]
    if width != configs["unet"]["block_out_channels"][0]:
        description = f"{found.description}, without configurations in its metadata"
        unknown = replace(found, description=description, mend="convert it to a diffusers folder")
        raise UserError(wrong_model_line("model.path", path, unknown))
    problems = [line for name in configs for line in _check_names("model.path", path, header, name)]
    return configs, problems + _check_projection(path, header, text_projection)


def _check_names(place: str, path: Path, header: Header, component: str) -> list[str]:
    """Whether a component of a file has all tensors that its configuration asks for, as numbers, and in the UNet no
    others."""
    keys = file_keys(header, component)
    try:
        require_unscaled(path, names_of(header, component))
    except UserError as error:
        return [f"{place}: {line}" for line in error.lines]
    missing = [key.file_name for key in keys if key.file_name not in header.tensors]
    if missing:
        lacks = f"lacks {len(missing)} of the {component}'s {len(keys)} tensors, such as {missing[0]}"
        return [f"{place}: {path}: {lacks}; wanted {WANTED}"]
    quantised = [key.file_name for key in keys if header.tensors[key.file_name].dtype not in _WEIGHT_DTYPES]
    if quantised:
        dtype = header.tensors[quantised[0]].dtype
        return [f"{place}: {path}: holds {quantised[0]} as {dtype}; wanted fp32, bf16, fp16 or fp8 that is not scaled"]
    known = {key.file_name for key in keys}
    unknown = [name for name in header.tensors if component == "unet" and name.startswith(UNET_PREFIX)]
    unknown = [name for name in unknown if name not in known]
    if unknown:
        return [f"{place}: {path}: holds {len(unknown)} tensors that SDXL's UNet has not, such as {unknown[0]}"]
    return []


def _check_projection(path: Path, header: Header, text_projection: TextProjection) -> list[str]:
    told = header.metadata.get(PROJECTION_KEY)
    if told in ("correct", "kohya") and told != text_projection:
        return [
            f"model.text_projection = {text_projection}: {path} says of itself that it was exported with its text "
            f"projection as {told}; write `model.text_projection: {told}`"
        ]
    if text_projection == "correct" or TEXT_PROJECTION in header.tensors:
        return []
    own = next((name for name in LINEAR_PROJECTIONS if name in header.tensors), LINEAR_PROJECTIONS[0])
    return [f"model.text_projection = kohya: has no effect on {path}, which holds the matrix as {own}, not transposed"]


def _check_vae(vae: Path, limits: Limits) -> tuple[ModelSource | None, dict[str, Any] | None, list[str]]:
    found = identify(vae, limits)
    if found.kind == "pickle" and vae.is_file():
        found = classify(ModelSource(vae, "pickle", limits).header)
    if vae.is_dir():
        folder = component_folder(ModelSource(vae, "folder"), "vae")
        if folder == vae and found.kind != "vae" and found.is_readable:
            return None, None, [wrong_model_line("model.vae", vae, found, _WANTED_VAE)]
        return ModelSource(vae, "folder", limits), *_check_component("model.vae", folder, "vae", limits)
    if "vae" not in found.parts:
        return None, None, [wrong_model_line("model.vae", vae, found, _WANTED_VAE)]
    source = find_source(vae, limits)
    try:
        return source, file_config(source.header, "vae"), _check_names("model.vae", vae, source.header, "vae")
    except ValueError as error:
        return None, None, [f"model.vae: {vae}: {_BAD_CONFIGS}: {error}"]


def _check_fit(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether the UNet's configuration fits the other parts that were found."""
    unet = configs["unet"]
    problems = []
    if {"text_encoder", "text_encoder_2"} <= configs.keys():
        one, two = configs["text_encoder"], configs["text_encoder_2"]
        text_width = one.get("hidden_size", 512) + two.get("hidden_size", 512)
        if unet.get("cross_attention_dim") != text_width:
            problems.append(
                f"model.path: unet cross_attention_dim is {unet.get('cross_attention_dim')}, "
                f"and the text encoders' hidden sizes add up to {text_width}; they must be equal"
            )
        vector = two.get("projection_dim", 512) + 6 * (unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != vector:
            problems.append(
                f"model.path: unet projection_class_embeddings_input_dim is "
                f"{unet.get('projection_class_embeddings_input_dim')}, and text_encoder_2 projection_dim + "
                f"6 x unet addition_time_embed_dim is {vector}; they must be equal"
            )
    for key, meaning in (("in_channels", "takes"), ("out_channels", "gives")):
        channels = configs.get("vae", {}).get("latent_channels", 4)
        if unet.get(key, 4) != channels:
            problems.append(
                f"model.path: the UNet {meaning} {unet[key]} channels, and the VAE's latents have {channels}; "
                "they must be equal (inpainting models are not trained)"
            )
    return problems
