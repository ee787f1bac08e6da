"""Gradients that never exist all at once: each block's update is made as its gradients arrive in the backward pass.

The optimizer's step is a step of each parameter alone, so taking it block by block changes nothing but the clipping,
which cannot know the norm of all gradients before the last has arrived: each block is clipped by its own norm. (LOMO,
Lv et al. 2023, arXiv 2306.09782, does so for SGD.) For one worker and one pass a step: else gradients are not done when
they arrive.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.memory.run_choice import MemoryChoice
from trainer.model.recompute import gathered_units, release_blocks
from trainer.optim.clipping import clip_units
from trainer.optim.hosted.hosted_state import HostedState
from trainer.optim.hosted.hosted_weights import HostedWeights
from trainer.optim.optimizers import scale_lr, take_optimizer_step
from trainer.parallel.strategy import Strategy
from trainer.train.gradient_blocks import GradientBlocks


class GradientRelease:
    """The updates of one model within its backward passes.

    Args:
        parameters: what trains, by name.
        block_of: the block that each is clipped and updated with, by name.
        max_norm: of a block's gradients; 0: they are not clipped.
        clip_share: adaptive clipping of rows and filters before that; 0: none.
        hosts_state: the optimizer's state lies in the host's memory, and comes to `device` with its block.
        weights: those of blocks of the same names that lie there as well; None: none do.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        block_of: Mapping[str, str],
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        clip_share: float = 0.0,
        hosts_state: bool = False,
        device: torch.device | None = None,
        weights: HostedWeights | None = None,
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._max_norm, self._clip_share = max_norm, clip_share
        self._block_of = {name: block_of[name] for name in parameters}
        self._places = {name: place for place, name in enumerate(parameters)}
        self._weights = weights
        if weights:
            weights.finish_block = self._finish
        self._factor = 1.0
        self._awaited: dict[str, set[str]] = {}
        self._held: dict[str, dict[str, Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self.hosted = self._hosted(device or torch.device("cpu")) if hosts_state else None
        """The state that lies in the host's memory; None: it stays with the weights."""
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._arrive, name))

    def _hosted(self, device: torch.device) -> HostedState:
        members: dict[str, list[nn.Parameter]] = {}
        for name, block in self._block_of.items():
            members.setdefault(block, []).append(self._parameters[name])
        return HostedState(self._optimizer, members, device)

    def begin(self, factor: float, lr_factor: float) -> None:
        """Before a step's backward pass: what its gradients are taken times, and its learning rates."""
        scale_lr(self._optimizer, lr_factor)
        self._factor = factor
        self._held, self._norms, self._awaited = {}, {}, {}
        for name, block in self._block_of.items():
            self._awaited.setdefault(block, set()).add(name)
        if self.hosted:
            self.hosted.begin()
        if self._weights:
            self._weights.begin()

    def finish(self, device: torch.device, blocks: GradientBlocks | None) -> tuple[Tensor, Tensor]:
        """After it: update what lacks a gradient of its block, and tell the norms, before clipping.

        Returns:
            The global L2 norm, float32, and those of `blocks`, float64 [their number], as `Strategy.grad_norm` does.
        """
        for block in list(self._held):
            self._update(block)
        places = torch.tensor([self._places[name] for name in self._norms], dtype=torch.int64, device=device)
        each = torch.zeros(len(self._places), device=device)
        if self._norms:
            each[places] = torch.stack(list(self._norms.values())).float()
        self._norms = {}
        of_blocks = each.new_zeros(len(blocks.names) if blocks else 0, dtype=torch.float64)
        if blocks:
            of_blocks.index_add_(0, blocks.index, each.double().square())
        if self.hosted:
            self.hosted.settle()
        if self._weights:
            self._weights.settle()
        return torch.linalg.vector_norm(each), of_blocks.sqrt()

    def _arrive(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or not self._awaited:
            return
        block = self._block_of[name]
        self._held.setdefault(block, {})[name] = gradient
        self._awaited[block].discard(name)
        if not self._awaited[block]:
            self._update(block)

    def _finish(self, block: str) -> None:
        """Update a block that the backward pass has left, with the gradients that are there."""
        if block in self._held:
            self._update(block)

    @torch.no_grad()
    def _update(self, block: str) -> None:
        """Of a block all of whose gradients are there; one with a number that is not finite stays as it is."""
        with self._weights.changing(block) if self._weights else nullcontext():
            self._update_here(block)

    def _update_here(self, block: str) -> None:
        held = self._held.pop(block)
        for name, gradient in held.items():
            self._parameters[name].grad = gradient
        updated = [self._parameters[name] for name in held]
        if self._clip_share:
            clip_units(updated, self._clip_share, 1.0)
        norms = torch._foreach_norm(list(held.values()))  # pyright: ignore[reportPrivateImportUsage]
        self._norms |= dict(zip(held, norms, strict=True))
        norm, factor = self._factor * float(torch.linalg.vector_norm(torch.stack(norms).float())), self._factor
        if math.isfinite(norm):
            if 0 < self._max_norm < norm:
                factor *= self._max_norm / (norm + 1e-6)
            with self._state_at_hand(block):
                take_optimizer_step(self._optimizer, factor)
        for parameter in updated:
            parameter.grad = None

    def _state_at_hand(self, block: str) -> AbstractContextManager[None]:
        return self.hosted.on_device(block) if self.hosted else nullcontext()


def release_of(
    config: Config,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    choice: MemoryChoice,
    device: torch.device,
    weights: HostedWeights | None = None,
) -> GradientRelease:
    """As `memory.release_gradients` wants it.

    Args:
        choice: how many passes a step has, and where the optimizer's state lies.
        weights: those that lie in the host's memory.
    Raises:
        UserError: the run has several workers or passes, and gradients are not done when they arrive.
    """
    if strategy.world > 1 or choice.passes > 1:
        raise UserError(
            f"memory.release_gradients = true: is for one worker with one pass a step; this run has {strategy.world} "
            f"and {choice.passes}"
        )
    block_of = release_blocks(strategy.parameters, gathered_units(strategy.model))
    train = config.train
    clip = train.max_grad_norm, train.adaptive_clip
    return GradientRelease(strategy.parameters, block_of, optimizer, *clip, choice.hosts_state, device, weights)
