"""AdamW in chunks: fp32 arithmetic over fp32 or bf16 weights, with moments in fp32 or 8 bits.

torch's fused AdamW rounds bf16 weights to the nearest and keeps moments in the weights' dtype; this one does neither.
A step takes little beside weights, gradients and state (tens of MB on the CPU), however large the model is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.keyed import draw_seed
from trainer.optim.adamw_chunk import Chunk, Factors, Update, update_chunk
from trainer.optim.eight_bit import block_size, blocks_per_row, code_tables, takes_8_bits
from trainer.optim.rounding import rounding_key
from trainer.parallel.local_shard import local_part

Rounding = Literal["stochastic", "kahan"]

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}
"""Elements that are updated at a time, with about 40 bytes of scratch each; on the CPU that stays in its last cache."""

ELEMENTS_WORTH_THREADS = 1 << 15
"""Of a smaller parameter, one thread makes the update; torch does not split its operations either."""


class _Todo(NamedTuple):
    """A parameter that has a gradient, and the group that it is in."""

    name: str
    parameter: nn.Parameter
    group: Mapping[str, Any]


def require_rounding(groups: Iterable[Mapping[str, Any]], rounding: Rounding | None) -> None:
    """ValueError where bf16 weights come without rounding, others with it, or weights are of another dtype."""
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    if not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(f"weights of {dtypes} cannot be trained; they must be fp32 or bf16")
    if (torch.bfloat16 in dtypes) != (rounding is not None):
        raise ValueError(f"rounding = {rounding} with weights of {dtypes}: bf16 weights need it, others have none")


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
        update: a chunk's arithmetic, compiled; results may differ in the last bit.

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
        update: Update | None = None,
    ) -> None:
        super().__init__(groups, defaults={})
        self.eight_bit, self.rounding, self.seed = eight_bit, rounding, seed
        self.free_gradients, self.chunk_elements = free_gradients, chunk_elements
        self._update, self._is_compiled = update or update_chunk, update is not None
        require_rounding(self.param_groups, rounding)

    def keeps_8_bits(self, parameter: nn.Parameter) -> bool:
        """Whether the moments of `parameter` are kept in 8 bits."""
        return self.eight_bit and takes_8_bits(parameter.shape)

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_factor: float = 1.0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            gradient_factor: gradients are taken times this, which costs no pass over them.
        """
        todo = [
            _Todo(name, parameter, group)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        if not todo:
            return
        numbers = self._numbers(todo, gradient_factor)
        with threads_for_chunks() as pool:
            for each, (factors, key) in zip(todo, numbers, strict=True):
                self._step_parameter(each.parameter, factors, key, pool)
                if self.free_gradients:
                    each.parameter.grad = None

    def _numbers(self, todo: "Sequence[_Todo]", gradient_factor: float) -> list[tuple[Factors, Tensor | None]]:
        """Count the step, and give what each parameter's update takes: two copies to the device, for all of them."""
        device, rows, keys = local_part(todo[0].parameter)[0].device, dict[tuple[int, int], list[float]](), []
        places = []
        for name, parameter, group in todo:
            state = self.state[parameter] or self.start(parameter)
            step = int(state["step"]) + 1
            state["step"].fill_(step)
            place = id(group), step
            rows.setdefault(place, [*_changing_factors(group, step), gradient_factor])
            places.append(place)
            draws = parameter.dtype == torch.bfloat16 and self.rounding == "stochastic"
            keys.append(rounding_key(draw_seed(self.seed, "rounding", step, name)) if draws else (0, 0))
        scalars = dict(zip(rows, _on_device(torch.tensor([*rows.values()]), device), strict=True))
        drawn = _on_device(torch.tensor(keys, dtype=torch.int32), device)
        return [
            (Factors(*group["betas"], *scalars[place].unbind()), key if self.rounding == "stochastic" else None)
            for (_, _, group), place, key in zip(todo, places, drawn, strict=True)
        ]

    def _step_parameter(
        self, parameter: nn.Parameter, factors: Factors, key: Tensor | None, pool: ThreadPoolExecutor
    ) -> None:
        """Update one parameter, a chunk of whole blocks at a time."""
        weight, first_row = local_part(parameter)
        # What the compiler sees must not be part of a graph.
        weight, gradient = weight.detach(), local_part(_gradient(parameter))[0].detach()
        block = block_size(parameter.shape)
        rows = _rows(weight, gradient, self.state[parameter], block)
        tables = None
        if rows.first_scale is not None:
            tables = code_tables(True, weight.device), code_tables(False, weight.device)
        key = key if parameter.dtype == torch.bfloat16 else None
        first_block = first_row * blocks_per_row(parameter.shape)
        at_a_time = max((self.chunk_elements or CHUNK_ELEMENTS[weight.device.type]) // block, 1)
        threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
        if self._is_compiled or weight.numel() < ELEMENTS_WORTH_THREADS:  # compiled code brings its own threads
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
def threads_for_chunks() -> Iterator[ThreadPoolExecutor]:
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


def _rows(weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], block: int) -> Chunk:
    """All blocks of a parameter."""

    def view(name: str, width: int) -> Tensor | None:
        return state[name].view(-1, width) if name in state else None

    return Chunk(
        weight=weight.contiguous().view(-1, block),
        gradient=gradient.contiguous().view(-1, block),
        first=state["exp_avg"].view(-1, block),
        second=state["exp_avg_sq"].view(-1, block),
        first_scale=view("exp_avg_scale", 1),
        second_scale=view("exp_avg_sq_scale", 1),
        compensation=view("compensation", block),
    )


def _changing_factors(group: Mapping[str, Any], step: int) -> tuple[float, float, float]:
    """`step_size`, `eps` and `decay`: see `Factors`."""
    beta1, beta2 = group["betas"]
    root = (1 - beta2**step) ** 0.5
    return group["lr"] / (1 - beta1**step) * root, group["eps"] * root, group["lr"] * group["weight_decay"]


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting for what the device still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
