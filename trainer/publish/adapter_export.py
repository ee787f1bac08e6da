"""Publishes the adapter of a checkpoint: one file as kohya's scripts and LyCORIS name it, or a folder of PEFT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from trainer import __version__
from trainer.adapters.adapter_file import AdapterLayer
from trainer.adapters.adapter_names import (
    COMPONENT_OF,
    FROM_KOHYA,
    Place,
    kohya_name,
    original_unet_modules,
)
from trainer.checkpoint.run_dir import checkpoint_step, config_beside
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import AdapterConfig, changes_convolutions, rank_of
from trainer.config.yaml_source import dump
from trainer.errors import UserError
from trainer.model_files.model_source import find_source
from trainer.model_files.modelspec import PREFIX, modelspec, without_folders
from trainer.model_files.tensor_file import TensorSpec, aligned, torch_dtype, write_tensor_file
from trainer.publish.adapter_layers import StoredAdapter, adapter_in, stored_adapter, weight_of
from trainer.publish.export_source import Source, model_parts, prediction_of
from trainer.publish.plan_export import CONFIG_KEY, PreparedExport, Wish, disk_errors, run_thumbnail
from trainer.publish.write_model import PlannedTensor, replace_folder, total_bytes, write_single_file

__all__ = ["adapter_in", "planned_file", "prepare_adapter"]

_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_ALGORITHMS = {"loha": "loha", "lokr": "lokr", "dora": "locon", "oft": "diag-oft"}
_SDXL = "sdxl_base_v1-0"


def prepare_adapter(checkpoint: Path, wish: Wish, config: Config | None = None) -> PreparedExport:
    """Look at everything that writing a checkpoint's adapter needs.

    Args:
        checkpoint: from `adapter_in`.
        config: of its run; None: as it lies beside it.
    Raises:
        UserError: something is missing, damaged, or does not go together.
    """
    if wish.layout == "diffusers":
        raise UserError(
            "--layout diffusers: an adapter is written as one file or with --layout peft; `sdxl-train adapter merge` "
            "puts it into a model"
        )
    if wish.vae is not None or wish.vae_dtype is not None:
        raise UserError(f"--vae and --vae-dtype: have no effect; {checkpoint} holds an adapter")
    beside = config_beside(checkpoint)
    if config is None and beside.is_file():
        config = load_config(beside, check_paths=False)
    base = wish.model or (config.model.path if config else None)
    if base is None:
        raise UserError(
            f"{checkpoint}: {beside}, which names the model that its run started from, is missing; give --model"
        )
    source = Source(model_parts(base), find_source(base), checkpoint, config)
    adapter = stored_adapter(checkpoint, wish.weights, source.parts)
    dtype = torch_dtype(_stored_dtype(adapter.layers) if wish.dtype == "same" else _DTYPES[wish.dtype])
    if wish.layout == "peft":
        return _prepare_peft(adapter, source, wish, dtype)
    planned = planned_file(adapter.layers, source, dtype)
    metadata = _metadata(adapter.config, source, wish)

    def write(on_written: Callable[[int], None] | None) -> None:
        with disk_errors(wish.out):
            write_single_file(wish.out, planned, metadata, on_written)

    notes = ()
    if adapter.config.kind == "oft":
        notes = ("oft: other programs turn outputs where this turns inputs; with diffusers use --layout peft",)
    return PreparedExport(total_bytes(planned), notes, write)


def _stored_dtype(layers: dict[Place, AdapterLayer]) -> str:
    """The one in which a file holds what the checkpoint holds, bit for bit."""
    stored = {tensor.dtype for layer in layers.values() for tensor in layer.tensors.values()}
    return stored.pop() if len(stored) == 1 else "F32"


def planned_file(layers: dict[Place, AdapterLayer], source: Source, dtype: torch.dtype) -> list[PlannedTensor]:
    """The tensors of a file with kohya's names, in the order of their data; alphas are fp32 scalars."""
    original, planned = original_unet_modules(source.parts["unet"].config), list[PlannedTensor]()
    for place, layer in layers.items():
        name = kohya_name(place, original)
        for leaf, tensor in layer.tensors.items():
            planned.append(PlannedTensor(TensorSpec(f"{name}.{leaf}", dtype, tuple(tensor.meta.shape)), tensor.read))
        if layer.alpha is not None:
            planned.append(PlannedTensor(TensorSpec(f"{name}.alpha", torch.float32, ()), layer.alpha.read))
    by_name = {tensor.spec.name: tensor for tensor in planned}
    return [by_name[spec.name] for spec in aligned([tensor.spec for tensor in planned])]


def adapter_metadata(title: str, config: AdapterConfig) -> dict[str, str]:
    """What kohya's tools and model sites look for in any adapter's file."""
    arguments: dict[str, object] = {}
    if changes_convolutions(config):
        rank = rank_of(config, is_conv=True)
        alpha = config.conv_alpha or (config.alpha or config.rank) * rank / config.rank
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(alpha)}
    if config.kind in _ALGORITHMS:
        arguments |= {"algo": _ALGORITHMS[config.kind]}
    if config.kind == "dora":
        arguments |= {"dora_wd": "True"}
    if config.dropout:
        arguments |= {"dropout": str(config.dropout)}
    return {
        "ss_output_name": title,
        "ss_base_model_version": _SDXL,
        "ss_v2": "False",
        "ss_network_module": "lycoris.kohya" if config.kind in _ALGORITHMS else "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(float(config.alpha or config.rank)),
        "ss_network_args": json.dumps(arguments),
    }


def _metadata(adapter: AdapterConfig, source: Source, wish: Wish) -> dict[str, str]:
    config, checkpoint = source.config, source.checkpoint
    assert checkpoint is not None
    prediction, ztsnr = prediction_of(source, wish.prediction_type, wish.ztsnr)
    title = wish.description.title or wish.out.stem
    side = config.data.buckets.resolution if config else 1024
    spec = modelspec(
        replace(wish.description, title=title),
        resolution=f"{side}x{side}",
        prediction_type="epsilon" if prediction == "edm" else prediction,
        unet_dtype="",
        vae_dtype="",
        thumbnail=run_thumbnail(wish, checkpoint),
    )
    for name in ("unet_dtype", "vae_dtype"):
        spec.pop(PREFIX + name)
    spec[f"{PREFIX}architecture"] += "/lora"
    own = {"format": "pt", "sdxl_train.version": __version__, "sdxl_train.step": str(checkpoint_step(checkpoint))}
    own |= {"sdxl_train.weights": wish.weights, "sdxl_train.adapter": adapter.kind}
    found = spec | own | adapter_metadata(title, adapter)
    found |= {"ss_zero_terminal_snr": str(ztsnr), "ss_steps": str(checkpoint_step(checkpoint))}
    if config is None:
        return found
    found |= {
        "ss_sd_model_name": Path(str(config.model.path)).name,
        "ss_learning_rate": str(config.optimizer.lr),
        "ss_text_encoder_lr": str(
            config.adapter.text_encoder_lr or config.optimizer.lr if adapter.text_encoders else None
        ),
        "ss_seed": str(config.run.seed),
        "ss_resolution": f"({side}, {side})",
        "ss_batch_size_per_device": str(config.train.batch_size_per_gpu),
        "ss_mixed_precision": {"fp32": "no"}.get(config.train.precision, config.train.precision.split("_")[0]),
        "ss_optimizer": config.optimizer.kind,
        "ss_lr_scheduler": config.lr_schedule.kind,
    }
    if wish.with_config:
        found[CONFIG_KEY] = dump(without_folders(json.loads(config.model_dump_json(exclude={"notify"}))))
    return found


def _prepare_peft(adapter: StoredAdapter, source: Source, wish: Wish, dtype: torch.dtype) -> PreparedExport:
    """`unet/`, `text_encoder/`, `text_encoder_2/`: those that have one, as `PeftModel.from_pretrained` reads them."""
    from trainer.adapters.inject import peft_config

    by_part: dict[str, dict[Place, AdapterLayer]] = {}
    for place, layer in adapter.layers.items():
        by_part.setdefault(place.part, {})[place] = layer
    folders = {COMPONENT_OF[part]: _peft_tensors(layers, dtype) for part, layers in by_part.items()}

    def write(on_written: Callable[[int], None] | None) -> None:
        temporary = wish.out.with_name(wish.out.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with disk_errors(wish.out):
                for part, layers in by_part.items():
                    folder, planned = temporary / COMPONENT_OF[part], folders[COMPONENT_OF[part]]
                    folder.mkdir(parents=True)
                    names = {place.module: _is_wide(place, source) for place in layers}
                    peft_config(names, adapter.config).save_pretrained(str(folder))
                    file = folder / "adapter_model.safetensors"
                    made = (tensor.make().to(tensor.spec.dtype) for tensor in planned)
                    specs = [tensor.spec for tensor in planned]
                    write_tensor_file(file, specs, made, {"format": "pt"}, on_written=on_written)
                replace_folder(temporary, wish.out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    return PreparedExport(sum(map(total_bytes, folders.values())), (), write)


def _is_wide(place: Place, source: Source) -> bool:
    shape = weight_of(place, source.parts).meta.shape
    return len(shape) == 4 and tuple(shape[2:]) != (1, 1)


def _peft_tensors(layers: dict[Place, AdapterLayer], dtype: torch.dtype) -> list[PlannedTensor]:
    """PEFT counts with its own scale, so that a factor that a file's matrix carries is taken out again."""
    planned = []
    for place, layer in layers.items():
        for leaf, tensor in layer.tensors.items():
            ours = FROM_KOHYA[leaf]
            shape, make = tuple(tensor.meta.shape), tensor.read
            if leaf == "dora_scale":
                ours = "lora_magnitude_vector"
                shape = (shape[0],) if len(shape) == 2 else (1, shape[0], 1, 1)
                make = lambda read=tensor.read, shape=shape: read().reshape(shape)  # noqa: E731
            if layer.kind == "lokr" and layer.rank is None and leaf == "lokr_w1" and layer.alpha is not None:
                make = lambda read=tensor.read, alpha=layer.alpha: read() / alpha.read()  # noqa: E731
            name = f"base_model.model.{place.module}.{ours}"
            planned.append(PlannedTensor(TensorSpec(name, dtype, shape), make))
    by_name = {tensor.spec.name: tensor for tensor in planned}
    return [by_name[spec.name] for spec in aligned([tensor.spec for tensor in planned])]
