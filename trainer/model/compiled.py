"""torch.compile for the blocks that a model repeats: one compilation serves all blocks that are alike."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.model.recompute import repeated_blocks

_log = logging.getLogger(__name__)
# Each kind of block is compiled for training, and again for validation without gradients; either may happen twice,
# because PyTorch takes a size of 1 for another case than all sizes above it.
_PER_KIND = 4
_count = 0


def compilations() -> int:
    """How many graphs of blocks this process has compiled."""
    return _count


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the forward pass of every repeated block when it is first called; in place.

    Heights, widths, sequence lengths and batch sizes are unknowns of the compiled code, so that buckets of other
    shapes need no other code. Call it before `apply_recompute` and before the model is wrapped.

    Args:
        backend: of `torch.compile`.

    Returns:
        kinds of blocks, which is how often the forward pass is compiled in training.
    """
    blocks = repeated_blocks(model)
    kinds = len({_kind(block) for block in blocks.values()})
    dynamo = torch._dynamo.config
    # All blocks of one class share one place for compiled code, which takes 8 by default.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _PER_KIND * kinds)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * _PER_KIND * kinds)
    # DDP's wrapper would have each block cut at its buckets' borders; blocks are small enough to overlap with it.
    dynamo.optimize_ddp = False
    # Else a square bucket that comes first makes height and width one and the same unknown.
    torch.fx.experimental._config.use_duck_shape = False  # pyright: ignore[reportAttributeAccessIssue]
    counting = _counting(backend, _PER_KIND * kinds)
    for block in blocks.values():
        block.forward = torch.compile(block.forward, backend=counting, dynamic=True)
    return kinds


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of the same kind run the same code on weights of the same shapes."""
    return type(block).__name__, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _counting(backend: str, expected: int) -> Callable[..., Any]:
    """The backend, with a warning when it is asked for more than can be meant."""
    compiler = torch._dynamo.lookup_backend(backend)
    before, warn_at = _count, expected + 1

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal warn_at
        global _count
        _count += 1
        if _count - before == warn_at:
            _log.warning(
                "torch.compile has compiled %d times where at most %d were expected; with `train.compile: off` the run"
                " would not wait for it",
                *(_count - before, expected),
            )
            warn_at *= 2
        return compiler(graph, inputs)

    return compile_graph
