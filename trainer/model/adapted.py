"""A run's model laid out with an adapter in it, and its values: the frozen base, held once, and the adapter."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.adapters.adapter_names import base_name, original_unet_modules, stored_name
from trainer.adapters.initial_values import IN_ONE_PIECE, Access, AdapterStart, draw_initial, fill_magnitudes
from trainer.adapters.keyed_dropout import add_dropout
from trainer.adapters.parameters import adapter_parameters
from trainer.adapters.start_from_file import values_of_file
from trainer.adapters.targets import find_targets
from trainer.config.sections.adapter_config import AdapterConfig, only_additions_train, trains_adapter
from trainer.config.sections.trainable_config import TrainableConfig
from trainer.config.values import FrozenWeights
from trainer.errors import UserError
from trainer.model.denoiser import TrainedModel
from trainer.model.freeze import never_used
from trainer.model.frozen.packed_layers import pack_frozen, packed_layers, stands_for
from trainer.model.load_weights import empty_text_encoders, empty_unet, read_weights
from trainer.model.new_tokens import NO_NEW_TOKENS, NewTokens, add_new_tokens
from trainer.model.text import ChunkJoin
from trainer.model.trainable import lay_out_model
from trainer.model_files.components import Component
from trainer.model_files.run_model import RunModel

SETTINGS = "adapter_settings.json"
"""File beside a checkpoint's adapter: what a reader has to know of it."""
_TOLD = (
    "kind",
    "rank",
    "alpha",
    "conv_rank",
    "conv_alpha",
    "rank_stabilized",
    "lokr_factor",
    "targets",
    "text_encoders",
)


def lay_out_run(
    model_files: RunModel,
    parts: TrainableConfig,
    adapter: AdapterStart,
    weights: torch.dtype,
    compute: torch.dtype,
    join: ChunkJoin = "a1111",
    resting: Collection[str] = (),
    new_tokens: NewTokens = NO_NEW_TOKENS,
    frozen_weights: FrozenWeights = "compute",
) -> TrainedModel:
    """What trains, on the meta device: the model's weights in `weights`, or an adapter in it and the base in `compute`.

    Args:
        resting: parts that train at another time of the run.
        new_tokens: whose vectors train as well, in `weights`; where nothing else does, the base is in `compute`.
        frozen_weights: in how many bits the base is held, where no weight of it trains.
    Raises:
        UserError: as `lay_out_model`; or the adapter has nowhere to be; or what packs the base is not there.
    """
    with_text, only_added = bool(new_tokens.tokens), only_additions_train(parts, adapter.config)
    if trains_adapter(adapter.config):
        model = _lay_out_adapted(model_files, adapter, weights, compute, join, with_text=with_text)
    else:
        dtype = compute if only_added else weights
        model = lay_out_model(model_files, parts, dtype, join, resting, with_text=with_text)
    if only_added:
        pack_frozen(model, frozen_weights)
    if new_tokens.tokens:
        assert model.text_encoders is not None
        model.new_tokens = add_new_tokens(model.text_encoders, new_tokens, weights)
    return model


def _lay_out_adapted(
    model_files: RunModel,
    adapter: AdapterStart,
    weights: torch.dtype,
    compute: torch.dtype,
    join: ChunkJoin,
    *,
    with_text: bool,
) -> TrainedModel:
    from trainer.adapters.inject import inject  # and with it PEFT

    config = adapter.config
    texts = with_text or config.text_encoders
    model = TrainedModel(empty_unet(model_files), empty_text_encoders(model_files, join) if texts else None)
    model.adapter = adapter
    model.requires_grad_(False).to(compute)
    within = {"unet": model.unet, **(_text_parts(model) if config.text_encoders else {})}
    targets = find_targets(within, config, original_unet_modules(dict(model.unet.config)), _unused(model))
    if not targets:
        raise UserError("adapter.targets: the model has no layer of a kind that can be changed")
    for part, module in within.items():
        if of_part := [target for target in targets if target.place.part == part]:
            inject(module, of_part, config, weights)
    if config.dropout:
        model.dropout = add_dropout(model, config.dropout)
    return model


def _text_parts(model: TrainedModel) -> dict[str, nn.Module]:
    encoders = model.text_encoders
    return {"text_encoder_1": encoders.one, "text_encoder_2": encoders.two} if encoders else {}


def _unused(model: TrainedModel) -> frozenset[str]:
    """Modules of the first text encoder whose weights would get no gradients."""
    if model.text_encoders is None:
        return frozenset()
    one = model.text_encoders.one
    unused = never_used([name for name, _ in one.named_parameters()], one.config.num_hidden_layers)
    return frozenset(name.rpartition(".")[0] for name in unused)


def fill_adapted(
    model_files: RunModel, stored: Path | None, model: TrainedModel, access: Access = IN_ONE_PIECE
) -> None:
    """Give an adapted model, which has memory, its values.

    Args:
        stored: folder of a checkpoint that holds the adapter, or an average of it; None: it starts here.
        access: to its parameters; where they are spread over workers, all of them call this.
    Raises:
        UserError: the files do not fit the configuration.
    """
    assert model.adapter is not None
    _fill_base(model_files, model, access)
    own = adapter_parameters(model)
    if stored is not None:
        require_same_settings(stored, model.adapter.config)
        _fill_stored(stored, own, access)
        return
    for name, parameter in own.items():
        draw_initial(parameter, name, model.adapter.seed, access)
    found: Mapping[str, torch.Tensor] = {}
    if model.adapter.initial is not None:
        found = values_of_file(model.adapter.initial, own, model, dict(model.unet.config))
    for name, values in found.items():
        access.put(own[name], values)
    fill_magnitudes(model, found, access)


@torch.no_grad()
def _fill_base(model_files: RunModel, model: TrainedModel, access: Access) -> None:
    names = {"unet": "unet", "text_encoder": "text_encoder_1", "text_encoder_2": "text_encoder_2"}
    adapters = adapter_parameters(model).keys()
    for component, part in names.items():
        module = getattr(model, part, None)
        if not isinstance(module, nn.Module):
            continue
        base = {base_name(n): p for n, p in module.named_parameters() if f"{part}.{n}" not in adapters}
        packed = {base_name(name): layer for name, layer in packed_layers(module).items()}
        wanted = base | {name: stands_for(layer) for name, layer in packed.items()}

        def place(name: str, values: torch.Tensor, base: Any = base, packed: Any = packed) -> None:
            if name in packed:
                packed[name].fill(values)
            else:
                access.put(base[name], values)

        read_weights(wanted, model_files.part(component), place)


def _fill_stored(stored: Path, own: Mapping[str, nn.Parameter], access: Access) -> None:
    from trainer.model_files.model_source import open_tensors

    wanted = {stored_name(name): parameter for name, parameter in own.items()}
    part = Component("adapter", stored, {}, open_tensors(stored / "adapter_model.safetensors"))
    read_weights(wanted, part, lambda name, values: access.put(wanted[name], values))


def settings_text(config: AdapterConfig) -> str:
    """What a checkpoint says of its adapter."""
    plain = json.loads(config.model_dump_json())
    return json.dumps({name: plain[name] for name in _TOLD}, indent=1) + "\n"


def read_settings(folder: Path) -> AdapterConfig:
    """The settings of the adapter in a checkpoint's folder.

    Raises:
        UserError: they are missing or not what was written.
    """
    from trainer.guards import DEFAULT_LIMITS, read_json

    try:
        told: Any = read_json(folder / SETTINGS, most_bytes=DEFAULT_LIMITS.config_bytes)
        return AdapterConfig.model_validate(told)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS}: not the settings of an adapter ({type(error).__name__})") from None


def require_same_settings(folder: Path, config: AdapterConfig) -> None:
    """Refuse to go on with another adapter than the checkpoint's.

    Raises:
        UserError: with the first key that differs.
    """
    before, now = json.loads(settings_text(read_settings(folder))), json.loads(settings_text(config))
    for name in _TOLD:
        if before[name] != now[name]:
            raise UserError(
                f"adapter.{name} = {now[name]}: {folder} was trained with {before[name]}; give that, or a run.dir of "
                "its own and adapter.initial"
            )
