"""AdamW in chunks: fp32 arithmetic over fp32 or bf16 weights, with moments in fp32 or 8 bits.

torch's fused AdamW rounds bf16 weights to the nearest and keeps moments in the weights' dtype; this one does neither.
A step takes a few MB beside weights, gradients and state, however large the model is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.keyed import draw_seed
from trainer.train.blockwise import (
    CodeTables,
    block_size,
    blocks_per_row,
    code_tables,
    dequantize,
    quantize,
    takes_8_bits,
)
from trainer.train.local_part import local_part
from trainer.train.rounding import round_stochastically, round_with_compensation, rounding_key

Rounding = Literal["stochastic", "kahan"]

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Elements that are updated at a time, with about 40 bytes of scratch each; on the CPU that stays in its cache."""

ELEMENTS_WORTH_THREADS = 1 << 15
"""Of a smaller parameter, one thread makes the update; torch does not split its operations either."""


class _Factors(NamedTuple):
    """The numbers of AdamW (Loshchilov and Hutter 2019, algorithm 2) at one step of one parameter.

    The weight's change is -(step_size * first / (sqrt(second) + eps) + decay * weight), with the bias corrections of
    both moments within `step_size` and `eps`. What changes from step to step is a tensor (fp32 scalar), so that
    compiled code stays the same.
    """

    beta1: float
    beta2: float
    step_size: Tensor
    eps: Tensor
    decay: Tensor


class _Chunk(NamedTuple):
    """Views [n, block] of a part of a parameter, its gradient and its state; scales are [n, 1]."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    first_scale: Tensor | None
    second_scale: Tensor | None
    compensation: Tensor | None

    def blocks(self, start: int, stop: int) -> "_Chunk":
        """Some of the blocks."""

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[start:stop]

        whole = self.weight[start:stop], self.gradient[start:stop], self.first[start:stop], self.second[start:stop]
        return _Chunk(*whole, cut(self.first_scale), cut(self.second_scale), cut(self.compensation))


class BlockAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay on everything, over named parameters.

    State of each parameter, in the shape of this worker's part of it: `exp_avg` and `exp_avg_sq` (fp32, or uint8 codes
    with `exp_avg_scale` and `exp_avg_sq_scale`, fp32 [rows, blocks per row]), `compensation` (bf16, with Kahan
    summation), `step` (fp32 scalar on the CPU).

    Args:
        groups: torch's parameter groups with named parameters, and `lr`, `betas`, `eps`, `weight_decay`.
        eight_bit: keep moments of large parameters in 8 bits.
        rounding: of bf16 weights; None only where all weights are fp32.
        seed: of the stochastic rounding, which further depends on step, name and element, and on nothing else.
        free_gradients: drop each gradient as soon as it has been used, so that memory falls during the step.
        chunk_elements: see `CHUNK_ELEMENTS`; the result does not depend on it.
        compiled: fuse a chunk's arithmetic with torch.compile; results may differ in the last bit.

    Raises:
        ValueError: bf16 weights without `rounding`, `rounding` without bf16 weights, or another dtype.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        eight_bit: bool,
        rounding: Rounding | None,
        seed: int = 0,
        free_gradients: bool = False,
        chunk_elements: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(groups, defaults={})
        self.eight_bit, self.rounding, self.seed = eight_bit, rounding, seed
        self.free_gradients, self.chunk_elements = free_gradients, chunk_elements
        self._update: Callable[..., None] = torch.compile(_update, dynamic=True) if compiled else _update
        dtypes = {parameter.dtype for group in self.param_groups for parameter in group["params"]}
        if not dtypes <= {torch.float32, torch.bfloat16}:
            raise ValueError(f"weights of {dtypes} cannot be trained; they must be fp32 or bf16")
        if (torch.bfloat16 in dtypes) != (rounding is not None):
            raise ValueError(f"rounding = {rounding} with weights of {dtypes}: bf16 weights need it, others have none")

    def keeps_8_bits(self, parameter: nn.Parameter) -> bool:
        """Whether the moments of `parameter` are kept in 8 bits."""
        return self.eight_bit and takes_8_bits(parameter.shape)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        with _threads_for_chunks() as pool:
            for group in self.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    if parameter.grad is not None:
                        self._step_parameter(name, parameter, group, pool)
                        if self.free_gradients:
                            parameter.grad = None

    def _step_parameter(
        self, name: str, parameter: nn.Parameter, group: Mapping[str, Any], pool: ThreadPoolExecutor
    ) -> None:
        """Update one parameter, a chunk of whole blocks at a time."""
        weight, first_row = local_part(parameter)
        state = self.state[parameter] or self.start(parameter)
        step = int(state["step"]) + 1
        state["step"].fill_(step)
        block = block_size(parameter.shape)
        rows = _rows(weight, local_part(_gradient(parameter))[0], state, block)
        draws = parameter.dtype == torch.bfloat16 and self.rounding == "stochastic"
        key = rounding_key(draw_seed(self.seed, "rounding", step, name), weight.device) if draws else None
        tables = None
        if rows.first_scale is not None:
            tables = code_tables(True, weight.device), code_tables(False, weight.device)
        first_block = first_row * blocks_per_row(parameter.shape)
        factors = _factors(group, step, weight.device)
        at_a_time = max((self.chunk_elements or CHUNK_ELEMENTS[weight.device.type]) // block, 1)
        threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
        if weight.numel() < ELEMENTS_WORTH_THREADS:
            threads = 1
        at_a_time = max(min(at_a_time, -(-len(rows.weight) // threads)), 1)
        starts = range(0, len(rows.weight), at_a_time)

        @torch.no_grad()
        def update(starts: range) -> None:
            for start in starts:
                self._update(rows.blocks(start, start + at_a_time), factors, tables, first_block + start, key)

        if threads > 1:
            list(pool.map(update, [starts[i::threads] for i in range(threads)]))
        else:
            update(starts)
        if not weight.is_contiguous():  # channels-last weights were updated in a copy
            weight.copy_(rows.weight.view(weight.shape))

    def start(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Zero moments of this worker's part of a parameter."""
        weight, _ = local_part(parameter)
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        quantized = self.keeps_8_bits(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if quantized else torch.float32
            state[name] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if quantized:  # a scale of 0 makes any code 0
                state[f"{name}_scale"] = torch.zeros(len(weight), blocks_per_row(parameter.shape), device=weight.device)
        if parameter.dtype == torch.bfloat16 and self.rounding == "kahan":
            state["compensation"] = torch.zeros(weight.shape, dtype=torch.bfloat16, device=weight.device)
        return state


@contextmanager
def _threads_for_chunks() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each with operations of its own that are not split further.

    They meet once per parameter, instead of sixty times per chunk as torch's do: with other work on the machine, that
    waiting was measured at ten times the work.
    """
    # glibc gives memory back to the system at each free until a larger block has been freed once; a step allocates
    # some hundred GB of scratch, which would all be mapped anew.
    torch.empty(30 << 20, dtype=torch.uint8)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the setting of one thread is also what later ones begin with


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _rows(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], block: int) -> _Chunk:
    """All blocks of a parameter."""

    def view(name: str, width: int) -> Tensor | None:
        return state[name].view(-1, width) if name in state else None

    return _Chunk(
        weight=weight.contiguous().view(-1, block),
        gradient=gradient.contiguous().view(-1, block),
        first=state["exp_avg"].view(-1, block),
        second=state["exp_avg_sq"].view(-1, block),
        first_scale=view("exp_avg_scale", 1),
        second_scale=view("exp_avg_sq_scale", 1),
        compensation=view("compensation", block),
    )


def _factors(group: Mapping[str, Any], step: int, device: torch.device) -> _Factors:
    beta1, beta2 = group["betas"]
    root = (1 - beta2**step) ** 0.5
    changing = [group["lr"] / (1 - beta1**step) * root, group["eps"] * root, group["lr"] * group["weight_decay"]]
    return _Factors(beta1, beta2, *torch.tensor(changing, dtype=torch.float32, device=device).unbind())


def _update(
    chunk: _Chunk, factors: _Factors, tables: tuple[CodeTables, CodeTables] | None, first_block: int, key: Tensor | None
) -> None:
    """Update one chunk in place."""
    gradient = chunk.gradient.to(torch.float32)
    first, second = chunk.first, chunk.second
    if tables is not None:
        assert chunk.first_scale is not None and chunk.second_scale is not None
        first = dequantize(chunk.first, chunk.first_scale, tables[0])
        second = dequantize(chunk.second, chunk.second_scale, tables[1])
    first.mul_(factors.beta1).add_(gradient, alpha=1 - factors.beta1)
    second.mul_(factors.beta2).addcmul_(gradient, gradient, value=1 - factors.beta2)
    change = (first * factors.step_size).div_(second.sqrt().add_(factors.eps))
    if tables is not None:
        assert chunk.first_scale is not None and chunk.second_scale is not None
        quantize(first, chunk.first, chunk.first_scale, tables[0])
        quantize(second, chunk.second, chunk.second_scale, tables[1])
    if chunk.weight.dtype == torch.float32:
        chunk.weight.sub_(change.add_(chunk.weight * factors.decay))
        return
    weight = chunk.weight.to(torch.float32)
    change.add_(weight * factors.decay)
    if key is not None:
        chunk.weight.copy_(round_stochastically(weight.sub_(change), first_block, key))
    else:
        assert chunk.compensation is not None
        exact = weight.add_(change.neg_().add_(chunk.compensation))
        chunk.weight.copy_(round_with_compensation(exact, chunk.compensation))
