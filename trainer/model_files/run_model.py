"""A run's model as it lies on this host, opened once: whoever needs a part of it is given this value.

Opening reads nothing but a file's first bytes; headers, configurations and folders of tokenizers are read when they are
first asked for, and once. Free of torch but for pickles and the components' tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.components import Component, TextProjection
from trainer.model_files.model_source import (
    ModelPath,
    ModelSource,
    component_config,
    count_weights,
    find_source,
    open_component,
    weight_counts,
    weights_fingerprint,
)
from trainer.model_files.tokenizer_files import tokenizer_folders
from trainer.model_files.told_prediction import ToldPrediction, told_prediction


@dataclass(frozen=True, eq=False)
class RunModel:
    """The run's model.

    Attributes:
        source: of all but the VAE.
        vae_source: of the VAE: the same one, or the one that stands in for the model's own.
        tokenizer: folder with tokenizers in place of the model's own.
    """

    source: ModelSource
    vae_source: ModelSource
    tokenizer: Path | None = None
    text_projection: TextProjection = "correct"
    _configs: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _parts: dict[str, Component] = field(default_factory=dict, repr=False)

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of one of `COMPONENTS`."""
        if component not in self._configs:
            self._configs[component] = component_config(self.source_of(component), component)
        return self._configs[component]

    def part(self, component: str) -> Component:
        """One of `COMPONENTS` with its tensors.

        Raises:
            UserError: as `open_component`.
        """
        if component not in self._parts:
            self._parts[component] = open_component(self.source_of(component), component, self.text_projection)
        return self._parts[component]

    def count_weights(self, component: str) -> int:
        """Number of weights of a component, from headers."""
        return count_weights(self.source_of(component), component)

    def weight_counts(self, component: str) -> dict[str, int]:
        """Number of weights in each tensor of a component, from headers, by the names of the module's parameters."""
        return weight_counts(self.source_of(component), component)

    def fingerprint(self, component: str) -> str:
        """As `weights_fingerprint`; reads all of the component's weights."""
        return weights_fingerprint(self.source_of(component), component, self.text_projection)

    @cached_property
    def tokenizers(self) -> tuple[Path, Path | None]:
        """As `tokenizer_folders`.

        Raises:
            UserError: there are none.
        """
        return tokenizer_folders(self.source, self.tokenizer)

    @cached_property
    def prediction(self) -> ToldPrediction:
        """What the model says that it predicts.

        Raises:
            UserError: as `told_prediction`.
        """
        return told_prediction(self.source)

    def source_of(self, component: str) -> ModelSource:
        """Where a component's files are."""
        return self.vae_source if component == "vae" else self.source


def open_model(
    path: ModelPath,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    text_projection: TextProjection = "correct",
    limits: Limits = DEFAULT_LIMITS,
) -> RunModel:
    """Find a run's model; nothing below opens these places again. As `check_model`, without its checks.

    Args:
        path, vae, tokenizer, text_projection: as in the configuration's `model`.
        limits: what is read of its small files and headers.
    Raises:
        UserError: there is nothing.
    """
    source = find_source(path, limits)
    return RunModel(source, source if vae is None else find_source(vae, limits), tokenizer, text_projection)
