"""Says what a file or folder is (SDXL, another model, a LoRA, a web page ...) from headers alone, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.guards import DEFAULT_LIMITS, Limits, printable
from trainer.model_files.diffusers_folder import object_or_nothing
from trainer.model_files.examine.adapter_kinds import adapter
from trainer.model_files.header import Header, HeaderFault, header_fault, read_header

SDXL = "an SDXL base model"
WANTED = "SDXL base (one .safetensors file or a diffusers folder)"
_PARTS: tuple[str, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")
_PART_NAMES: dict[str, str] = dict(
    zip(_PARTS, ("UNet", "VAE", "first text encoder", "second text encoder"), strict=True)
)
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."

KINDS = (
    # models
    *("sdxl", "sdxl-refiner", "sdxl-inpainting", "sdxl-other", "sd1", "sd1-inpainting", "sd2", "sd2-inpainting"),
    *("sd3", "flux", "other-diffusion", "language-model"),
    # parts and additions
    *("unet", "vae", "text-encoder", "lora", "embedding", "controlnet", "adapter", "upscaler"),
    # files of no model, or of one that cannot be read
    *("missing", "unreadable", "empty", "truncated", "damaged", "html", "lfs-pointer", "json", "text", "zeros"),
    *("pickle", "zip", "tar", "archive", "gguf", "image", "not-a-model", "folder"),
)
"""What `Identity.kind` can be."""


@dataclass(frozen=True)
class Identity:
    """What a file or folder is."""

    kind: str
    """One of `KINDS`."""
    layout: str
    """`single-file`, `diffusers` (a folder of components), `component` (a component's folder), `checkpoint` (of this
    trainer: a folder with `unet/` and a manifest), `run`, `folder` or `file`."""
    description: str
    """One line that follows "is": `the SDXL refiner`, `a LoRA for SDXL (kohya, rank 32)`."""
    mend: str = ""
    """What helps, as a clause; may be empty."""
    parts: tuple[str, ...] = ()
    """Which of SDXL's components are there: `unet`, `vae`, `text_encoder`, `text_encoder_2`."""

    @property
    def is_readable(self) -> bool:
        """Whether there are tensors to look into."""
        return KINDS.index(self.kind) < KINDS.index("missing")


def identify(path: Path, limits: Limits = DEFAULT_LIMITS) -> Identity:
    """What a file or folder is. Reads headers and configurations, never the weights; raises nothing."""
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            return Identity("missing", "file", "not there", "check the path")
        if not path.is_file():
            return Identity("not-a-model", "file", "neither a file nor a folder")
        return classify(read_header(path, limits))
    except HeaderFault as fault:
        return Identity(fault.kind, "file", fault.description, fault.mend)
    except OSError as error:
        return Identity("unreadable", "file", f"not readable ({error.strerror or error})")


def wrong_model_line(place: str, path: Path, found: Identity, wanted: str = WANTED) -> str:
    """The one line of a refusal: place, path, what it is, what is wanted, and what helps."""
    mend = f"; {found.mend}" if found.mend else ""
    return f"{place}: {path} is {found.description}; wanted {wanted}{mend}"


def classify(header: Header) -> Identity:
    """What the tensors of a safetensors file are, by their names and shapes."""
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    if not shapes:
        return Identity("not-a-model", "file", "a safetensors file without tensors")
    found = adapter(shapes, header.metadata)
    if found:
        return Identity(found[0], "single-file", found[1])
    if _holds(shapes, _UNET):
        return _checkpoint(shapes)
    return _part(shapes)


def _holds(names: Iterable[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)


def _checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> Identity:
    """A file with `model.diffusion_model.`: a whole model, or a UNet in the names of one."""
    unet = {name.removeprefix(_UNET): shape for name, shape in shapes.items() if name.startswith(_UNET)}
    if "input_blocks.0.0.weight" not in unet:
        return _transformer(unet, "single-file")
    texts = {
        "text_encoder": _holds(shapes, "conditioner.embedders.0.transformer.", "cond_stage_model."),
        "text_encoder_2": _holds(shapes, "conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    }
    there = {"unet": True, "vae": _holds(shapes, _VAE), **texts}
    parts = tuple(part for part in _PARTS if there[part])
    kind, name = _unet_kind(
        channels=_axis(unet, "input_blocks.0.0.weight", 1),
        width=_axis(unet, "input_blocks.0.0.weight", 0),
        context=_first_axis(unet, r".*attn2\.to_k\.weight", 1),
        vector=_axis(unet, "label_emb.0.0.weight", 1),
        depths=_depths(unet),
    )
    if parts == ("unet",):
        return Identity("unet", "single-file", f"the UNet alone of {name}, without VAE and text encoders", parts=parts)
    if kind == "sdxl":
        missing = [_PART_NAMES[part] for part in _PARTS if part not in parts]
        name += f" without its {' and '.join(missing)}" if missing else ""
    return Identity(kind, "single-file", name, parts=parts)


def _unet_kind(
    channels: int | None, width: int | None, context: int | None, vector: int | None, depths: tuple[int, ...] | None
) -> tuple[str, str]:
    """(kind, name) of a UNet, from its input channels, first width, widths of text and vector conditioning, and the
    number of transformer blocks on each level where it is known."""
    if vector is None:
        family = {768: ("sd1", "Stable Diffusion 1"), 1024: ("sd2", "Stable Diffusion 2")}.get(context or 0)
        if family is None:
            return "other-diffusion", f"a diffusion model that is not SDXL (text conditioning of width {context})"
        if channels == 9:
            return f"{family[0]}-inpainting", f"an inpainting model of {family[1]} (9 input channels)"
        extra = "" if channels == 4 else f" with {channels} input channels"
        return (family[0] if not extra else "other-diffusion"), f"a {family[1]} model{extra}"
    if context == 1280 and vector == 2560:
        return "sdxl-refiner", "the SDXL refiner"
    if context == 1024:
        return "other-diffusion", "a Stable Diffusion 2 unCLIP model"
    if channels == 9:
        return "sdxl-inpainting", "an SDXL inpainting model (9 input channels)"
    if channels != 4:
        return "sdxl-other", f"a relative of SDXL with {channels} input channels"
    if width == 320 and (context, vector) != (2048, 2816):
        return (
            "sdxl-other",
            f"a relative of SDXL (text conditioning {context}, vector {vector}; SDXL has 2048 and 2816)",
        )
    if width == 320 and depths is not None and depths != (0, 2, 10):
        return "sdxl-other", f"a relative of SDXL with transformer depths {depths}, such as SSD-1B (SDXL has 0, 2, 10)"
    scaled = "" if width == 320 else f" of another size (first width {width} instead of 320)"
    return "sdxl", SDXL + scaled


def _depths(unet: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Transformer blocks on the way down at each of SDXL's three levels, in the names of a single file."""
    deepest = {1: 0, 4: 0, 7: 0}
    for name in unet:
        found = re.match(r"input_blocks\.([1-8])\.1\.transformer_blocks\.(\d{1,3})\.", name)
        if found:
            level = (int(found[1]) - 1) // 3 * 3 + 1
            deepest[level] = max(deepest[level], int(found[2]) + 1)
    return tuple(deepest.values())


_TRANSFORMERS = (
    (r"joint_blocks\.", "sd3", "a Stable Diffusion 3 model"),
    (r"(.*\.)?distilled_guidance_layer\.", "other-diffusion", "a Chroma model"),
    (r"double_blocks\.0\.img_attn|single_transformer_blocks\.|double_blocks\.", "flux", "a Flux model"),
    (r"double_layers\.|joint_transformer_blocks\.", "other-diffusion", "an AuraFlow model"),
    (r"(effnet_mapper|clip_txt_mapper|clip_txt_pooled_mapper)\.", "other-diffusion", "a Stable Cascade model"),
    (r"(cap_embedder|context_refiner|noise_refiner)\.", "other-diffusion", "a Lumina model"),
    (r"blocks\.\d+\.scale_shift_table", "other-diffusion", "a PixArt model"),
    (r"transformer_blocks\.\d+\.(img_mlp|txt_mlp)", "other-diffusion", "a Qwen-Image model"),
    (r"blocks\.\d+\.(self_attn|cross_attn)\.", "other-diffusion", "a video or image transformer (Wan, Cosmos)"),
    (r"transformer_blocks\.\d+\.ff_context", "sd3", "a Stable Diffusion 3 model"),
)


def _transformer(names: Iterable[str], layout: str) -> Identity:
    for pattern, kind, name in _TRANSFORMERS:
        if any(re.match(pattern, own) for own in names):
            return Identity(kind, layout, f"{name}, a transformer and not SDXL's UNet")
    return Identity("other-diffusion", layout, "a diffusion model that is not SDXL")


def _part(shapes: Mapping[str, tuple[int, ...]]) -> Identity:
    """A file without `model.diffusion_model.`: one component in any naming, or something else."""
    plain = {re.sub(r"^(first_stage_model|text_model|vae|module)\.", "", name): s for name, s in shapes.items()}
    if "input_blocks.0.0.weight" in plain and _holds(plain, "output_blocks."):
        wrapped = _checkpoint({_UNET + name: shape for name, shape in plain.items()})
        return Identity(wrapped.kind, "single-file", wrapped.description, parts=wrapped.parts)
    if _holds(plain, "down_blocks.") and _holds(plain, "up_blocks.") and "conv_in.weight" in plain:
        name = _unet_kind(
            channels=_axis(plain, "conv_in.weight", 1),
            width=_axis(plain, "conv_in.weight", 0),
            context=_first_axis(plain, r".*attn2\.to_k\.weight", 1),
            vector=_axis(plain, "add_embedding.linear_1.weight", 1),
            depths=None,
        )[1]
        return Identity("unet", "single-file", f"the UNet alone of {name}, in diffusers' names", parts=("unet",))
    if _holds(plain, "decoder.conv_in.") and _holds(plain, "decoder.conv_out."):
        latent = _axis(plain, "decoder.conv_in.weight", 1)
        known = ", as SD 1, SD 2 and SDXL have them" if latent == 4 else "; SDXL's has 4"
        return Identity("vae", "single-file", f"a VAE alone ({latent} latent channels{known})", parts=("vae",))
    if any(re.search(r"(encoder\.layers|resblocks)\.\d+\.", name) for name in shapes):
        return _text_encoder(shapes)
    if any(re.match(r"(encoder\.)?block\.\d+\.layer\.", name) for name in shapes):
        return Identity("text-encoder", "single-file", "a T5 text encoder alone; SDXL has two of CLIP")
    if any(re.match(r"(language_)?(model\.)?layers\.\d+\.(self_attn|mlp)\.", name) for name in shapes):
        return Identity("language-model", "single-file", "a language model")
    if any(re.match(pattern, name) for pattern, *_ in _TRANSFORMERS for name in shapes):
        return _transformer(shapes, "single-file")
    if any(re.match(r"(model\.\d+\.sub\.|conv_first\.|body\.\d+\.rdb)", name) for name in shapes):
        return Identity("upscaler", "single-file", "an image upscaler (ESRGAN's kind)")
    some = printable(", ".join(sorted(shapes)[:2]), 80)
    return Identity("not-a-model", "file", f"a safetensors file of no model known here ({len(shapes)} tensors: {some})")


def _text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> Identity:
    width = _first_axis(shapes, r".*token_embedding\.weight", 1)
    if any("vision" in name or name.startswith("visual.") for name in shapes) and width is None:
        return Identity("other-diffusion", "single-file", "an image encoder (CLIP vision)")
    known = {768: "CLIP-L, SDXL's first", 1280: "OpenCLIP bigG, SDXL's second", 1024: "OpenCLIP H, as SD 2 has"}
    return Identity(
        "text-encoder", "single-file", f"a CLIP text encoder alone ({known.get(width or 0, f'width {width}')})"
    )


def _axis(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else None


def _first_axis(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int) -> int | None:
    name = next((name for name in shapes if re.fullmatch(pattern, name)), "")
    return _axis(shapes, name, axis)


def _folder(path: Path) -> Identity:
    if (path / "manifest.json").is_file() and (path / "unet").is_dir():
        return _checkpoint_folder(path)
    if (path / "checkpoints").is_dir() and (path / "config.resolved.yaml").is_file():
        return Identity("folder", "run", "a run directory", "give one of the checkpoints in it")
    if (path / "adapter_config.json").is_file():
        return Identity("lora", "folder", "a LoRA in PEFT's layout")
    pipeline = object_or_nothing(path / "model_index.json").get("_class_name")
    if (path / "unet").is_dir():
        return _pipeline(path)
    if isinstance(pipeline, str):
        kind = {"StableDiffusion3": "sd3", "Flux": "flux"}.get(re.sub(r"(Img2Img|Inpaint)?Pipeline$", "", pipeline))
        return Identity(kind or "other-diffusion", "diffusers", f"a diffusers folder of {pipeline[:60]!r}")
    if (path / "config.json").is_file():
        return _component(path, path.name)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return Identity("folder", "folder", "a folder with one safetensors file", f"give {files[0].name} itself")
    if files:
        return Identity("folder", "folder", f"a folder of {len(files)} safetensors files", "give one of them")
    return Identity("folder", "folder", "a folder without a model in it" if any(path.iterdir()) else "an empty folder")


def _checkpoint_folder(path: Path) -> Identity:
    """A checkpoint of this trainer holds what was trained, in diffusers' layout."""
    found = _component(path / "unet", "unet")
    parts = tuple(part for part in _PARTS if (path / part / "config.json").is_file())
    faults = [fault for part in parts if part != "unet" and (fault := _fault_in(path / part, part))]
    if faults or found.kind != "unet":
        found = faults[0] if faults else found
        return Identity(found.kind, "checkpoint", found.description, found.mend, parts)
    name = found.description.removeprefix("the UNet alone of ")
    *names, last = (_PART_NAMES[part] for part in parts)
    holds = f"{', '.join(names)} and {last}" if names else last
    mend = "`sdxl-train export` makes a whole model of it"
    return Identity("unet", "checkpoint", f"a checkpoint of this trainer, with the {holds} of {name}", mend, parts)


def _pipeline(path: Path) -> Identity:
    """A folder of components; its UNet decides, since pipelines of several names share one."""
    found = _component(path / "unet", "unet")
    parts = tuple(part for part in _PARTS if (path / part / "config.json").is_file())
    for part in parts:
        fault = None if part == "unet" else _fault_in(path / part, part)
        if fault and found.kind in ("unet", "sdxl"):
            return Identity(fault.kind, "diffusers", fault.description, fault.mend, parts)
    if found.kind not in ("unet", "sdxl"):
        return Identity(found.kind, "diffusers", found.description, found.mend, parts)
    missing = [_PART_NAMES[part] for part in _PARTS if part not in parts]
    without = f" without its {' and '.join(missing)}" if missing else ""
    name = found.description.removeprefix("the UNet alone of ")
    return Identity("sdxl", "diffusers", f"{name} in diffusers' layout{without}", parts=parts)


def _component(folder: Path, name: str) -> Identity:
    """A component's folder, by its configuration and by the headers of its weights."""
    config = object_or_nothing(folder / "config.json")
    if not config:
        return Identity("damaged", "component", f"without a readable {name}/config.json", "copy it again")
    fault = _fault_in(folder, name)
    if fault:
        return fault
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    kind = str(config.get("_class_name", named))[:60]
    if kind == "AutoencoderKL":
        return Identity("vae", "component", "the folder of a VAE alone", parts=("vae",))
    if kind.startswith("CLIPText"):
        width = _int(config.get("hidden_size"))
        return Identity("text-encoder", "component", f"the folder of a text encoder alone ({width} wide)")
    if kind.startswith("ControlNet"):
        return Identity("controlnet", "component", "a ControlNet")
    if kind != "UNet2DConditionModel":
        return Identity("other-diffusion", "component", f"the folder of {kind!r}, a component that SDXL has not")
    return _unet_by_config(config)


def _fault_in(folder: Path, name: str) -> Identity | None:
    """What is wrong with the first weight file of a component that is not whole."""
    for file in sorted(folder.glob("*.safetensors")):
        fault = header_fault(file)
        if fault:
            line = f"not whole: {name}/{file.name} is {fault.description}"
            return Identity(fault.kind, "component", line, fault.mend)
    return None


def _unet_by_config(config: Mapping[str, Any]) -> Identity:
    widths, depths = config.get("block_out_channels"), config.get("transformer_layers_per_block")
    kinds = config.get("down_block_types")
    down = None
    if isinstance(depths, list) and isinstance(kinds, list) and len(depths) == len(kinds):
        # SDXL's smaller relatives give a list of numbers for each level.
        levels = [max((_int(n) or 0 for n in d), default=0) if isinstance(d, list) else _int(d) or 0 for d in depths]
        down = tuple(d if str(k).startswith("CrossAttn") else 0 for d, k in zip(levels, kinds, strict=True))
    kind, name = _unet_kind(
        channels=_int(config.get("in_channels", 4)),
        width=_int(widths[0]) if isinstance(widths, list) and widths else None,
        context=_int(config.get("cross_attention_dim")),
        vector=_int(config.get("projection_class_embeddings_input_dim")),
        depths=down,
    )
    if kind == "sdxl":
        return Identity("unet", "component", f"the UNet alone of {name}", parts=("unet",))
    return Identity(kind, "component", name, parts=("unet",))


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None
