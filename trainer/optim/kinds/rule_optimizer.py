"""The engine of all kinds but AdamW: parameter by parameter, in fp32, over fp32 or bf16 weights, whole or spread.

What a kind computes says its rule (`trainer.optim.kinds.rule`). Elementwise ones get chunks of blocks as AdamW does
(`trainer.optim.adamw`), so that little is alive at once; others get all rows that this worker has of a tensor, and
what they sum over rows is summed over the workers, for several tensors at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.keyed import draw_seed
from trainer.optim.adamw import CHUNK_ELEMENTS, Rounding, require_rounding, threads_for_chunks
from trainer.optim.eight_bit import block_size, blocks_per_row, code_tables, dequantize, quantize
from trainer.optim.kinds.block_views import Blocks, blocks_of, exact_of, gradient_of, in_chunks
from trainer.optim.kinds.row_sums import added, run_together, together
from trainer.optim.kinds.rule import Part, Rule, Scalars, as_matrix, is_matrix
from trainer.optim.kinds.rule_table import keeps_8_bits
from trainer.optim.rounding import round_stochastically, round_with_compensation, rounding_key
from trainer.parallel.local_shard import local_part


class _Todo(NamedTuple):
    """A parameter that has a gradient, and what its update takes.

    Attributes:
        key: of the stochastic rounding, int32 [2] on the device; None with others.
    """

    name: str
    parameter: nn.Parameter
    group: Mapping[str, Any]
    step: int
    numbers: Scalars
    key: Tensor | None


class RuleOptimizer(torch.optim.Optimizer):
    """The optimizer of one rule, over named parameters.

    State of each parameter, in the shape of this worker's part of it: the rule's tensors (fp32, or uint8 codes with
    `<name>_scale`), its numbers (fp64 scalars on the CPU), `compensation` (bf16, with Kahan summation), `step` (fp32
    scalar on the CPU).

    Args:
        groups: torch's parameter groups with named parameters, `lr`, and the numbers of the kind.
        rounding: of bf16 weights; None only where all weights are fp32.
        seed, free_gradients, chunk_elements: as of `trainer.optim.adamw.BlockAdamW`.

    Raises:
        ValueError: bf16 weights without `rounding`, `rounding` without bf16 weights, or another dtype.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rule: Rule,
        *,
        rounding: Rounding | None,
        seed: int = 0,
        free_gradients: bool = False,
        chunk_elements: int | None = None,
    ) -> None:
        super().__init__(groups, defaults={})
        self.rule, self.rounding, self.seed = rule, rounding, seed
        self.free_gradients, self.chunk_elements = free_gradients, chunk_elements
        require_rounding(self.param_groups, rounding)

    def keeps_8_bits(self, parameter: nn.Parameter) -> bool:
        """Whether the state of `parameter` is kept in 8 bits."""
        return keeps_8_bits(self.rule.kind, tuple(parameter.shape))

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_factor: float = 1.0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            gradient_factor: gradients are taken times this.
        """
        todo = self._begun()
        if not todo:
            return
        rule = self.rule
        with threads_for_chunks() as pool:
            if rule.surveys:
                todo = self._learnt(todo, gradient_factor, pool)
            if not rule.in_chunks:
                self._update_tensors(todo, gradient_factor)
                return
            for each in todo:
                in_chunks(partial(self._update_chunk, each, gradient_factor), each.parameter, self._chunk(each), pool)
                self._done(each)

    def _begun(self) -> list[_Todo]:
        """Count the step."""
        named = [
            (name, parameter, group)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        # A weight that trains from now on has the learning rate that was found without it, and counts its steps.
        states = [self.state[parameter] for _, parameter, _ in named if self.state[parameter]]
        oldest = max(states, key=lambda state: float(state["step"]), default=None) if self.rule.surveys else None
        common = None if oldest is None else (_scalars(oldest, self.rule, named[0][2]), int(oldest["step"]) + 1)
        found: list[_Todo] = []
        keys: list[tuple[int, int]] = []
        for name, parameter, group in named:
            state = self.state[parameter] or self.start(parameter, group, name)
            step = int(state["step"]) + 1
            state["step"].fill_(step)
            scalars, counted = common or (_scalars(state, self.rule, group), step)
            scalars, numbers = self.rule.begin(scalars, group, counted)
            _keep(state, scalars)
            draws = self.rounding == "stochastic"
            keys.append(rounding_key(draw_seed(self.seed, "rounding", step, name)) if draws else (0, 0))
            found.append(_Todo(name, parameter, group, step, numbers, None))
        if self.rounding != "stochastic" or not found:
            return found
        device = local_part(found[0].parameter)[0].device
        drawn = torch.tensor(keys, dtype=torch.int32)
        drawn = drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn
        return [each._replace(key=key) for each, key in zip(found, drawn, strict=True)]

    def start(self, parameter: nn.Parameter, group: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        """The state of this worker's part of a parameter before its first step."""
        (weight, _), shape, state = local_part(parameter), tuple(parameter.shape), self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        device, quantized = weight.device, self.keeps_8_bits(parameter)
        for key, tensor in self.rule.tensors(name, shape, parameter.dtype).items():
            own = (weight.shape[:1] + tensor.shape[1:]) if tensor.by_rows and tensor.shape else tensor.shape
            state[key] = torch.zeros(own, dtype=torch.uint8 if quantized else tensor.dtype, device=device)
            if quantized:
                state[f"{key}_scale"] = torch.zeros(len(weight), blocks_per_row(shape), device=device)
        self.rule.fill(state, weight)
        for key, value in self.rule.scalars(group).items():
            state[key] = torch.tensor(value, dtype=torch.float64)
        if parameter.dtype == torch.bfloat16 and self.rounding == "kahan":
            state["compensation"] = torch.zeros(weight.shape, dtype=torch.bfloat16, device=device)
        return state

    def _learnt(self, todo: Sequence[_Todo], factor: float, pool: ThreadPoolExecutor) -> list[_Todo]:
        """Survey all weights, and go on with what follows from it."""
        sums = [torch.zeros(2, dtype=torch.float64, device=local_part(todo[0].parameter)[0].device)]
        for each in todo:
            in_chunks(partial(self._survey_chunk, each, factor, sums), each.parameter, self._chunk(each), pool)
            if self.free_gradients:
                each.parameter.grad = None
        # Threads are done in any order; sorted, the last bit is always the same.
        (total,) = added(todo[0].parameter, [torch.stack(sums).sort(dim=0).values.sum(dim=0)])
        first = todo[0]
        kept = _scalars(self.state[first.parameter], self.rule, first.group)
        scalars, numbers = self.rule.learn(kept, first.numbers, total.tolist(), first.group)
        for each in todo:
            _keep(self.state[each.parameter], scalars)
        return [each._replace(numbers=numbers) for each in todo]

    def _chunk(self, each: _Todo) -> int:
        """Blocks at a time."""
        device = local_part(each.parameter)[0].device
        return max((self.chunk_elements or CHUNK_ELEMENTS[device.type]) // block_size(each.parameter.shape), 1)

    def _done(self, each: _Todo) -> None:
        if self.free_gradients:
            each.parameter.grad = None

    def _survey_chunk(self, each: _Todo, factor: float, sums: list[Tensor], start: int, stop: int) -> None:
        _, _, part = self._part_of_blocks(each, factor, start, stop)
        sums.append(self.rule.survey(part))

    def _update_chunk(self, each: _Todo, factor: float, start: int, stop: int) -> None:
        weight, blocks, part = self._part_of_blocks(each, factor, start, stop)
        self.rule.update(part)
        for key in blocks.quantized:
            signed = self.rule.tensors(each.name, part.shape, weight.dtype)[key].signed
            tables = code_tables(signed, weight.device)
            quantize(part.state[key], blocks.state[key], blocks.state[f"{key}_scale"], tables)
        self._write(each, weight, part.weight, blocks.state.get("compensation"), blocks.first + start)
        blocks.finish()

    def _part_of_blocks(self, each: _Todo, factor: float, start: int, stop: int) -> "tuple[Tensor, Blocks, Part]":
        """A chunk's weights as they are held, its views, and what the rule gets of it."""
        blocks = blocks_of(each.parameter, self.state[each.parameter], start, stop)
        weight, tensors = blocks.weight, dict[str, Tensor]()
        for key, view in blocks.state.items():
            if key in blocks.quantized:
                signed = self.rule.tensors(each.name, tuple(each.parameter.shape), weight.dtype)[key].signed
                view = dequantize(view, blocks.state[f"{key}_scale"], code_tables(signed, weight.device))
            tensors[key] = view
        gradient = weight.new_empty(0)
        if blocks.gradient is not None:
            gradient = blocks.gradient.to(torch.float32, copy=True).mul_(factor)
        exact = exact_of(weight, blocks.state.get("compensation"))
        shape = tuple(each.parameter.shape)
        return weight, blocks, Part(each.name, shape, exact, gradient, tensors, each.group, each.step, each.numbers)

    def _write(self, each: _Todo, weight: Tensor, exact: Tensor, compensation: Tensor | None, block: int) -> None:
        """Round what a rule has made of bf16 weights [n, block], of which the first block has this number."""
        if weight.dtype == torch.float32:
            return
        if each.key is not None:
            weight.copy_(round_stochastically(exact, block, each.key))
        else:
            assert compensation is not None
            weight.copy_(round_with_compensation(exact, compensation))

    def _update_tensors(self, todo: Sequence[_Todo], factor: float) -> None:
        """Whole tensors, as many at a time as one exchange serves."""
        for batch in together(todo, self.chunk_elements):
            parts = [self._part_of_rows(each, factor) for each in batch]
            run_together([self.rule.updates(part) for part in parts], partial(added, batch[0].parameter))
            for each, part in zip(batch, parts, strict=True):
                self._write_rows(each, part.weight)
                self._done(each)

    def _part_of_rows(self, each: _Todo, factor: float) -> Part:
        parameter, state = each.parameter, self.state[each.parameter]
        (weight, first_row), shape = local_part(parameter), tuple(parameter.shape)
        size = (len(weight), as_matrix(shape)[1]) if is_matrix(shape) else (weight.numel(),)
        gradient = gradient_of(parameter).to(torch.float32, copy=True).contiguous().view(size).mul_(factor)
        tensors = {
            key: value.view(size) if value.shape == weight.shape else value
            for key, value in state.items()
            if value.ndim
        }
        compensation = state.get("compensation")
        exact = exact_of(weight.detach().contiguous(), compensation).view(size)
        return Part(each.name, shape, exact, gradient, tensors, each.group, each.step, each.numbers, first_row)

    def _write_rows(self, each: _Todo, exact: Tensor) -> None:
        weight, first_row = local_part(each.parameter)
        weight, shape = weight.detach(), each.parameter.shape
        if weight.dtype == torch.float32:
            if weight.data_ptr() != exact.data_ptr():
                weight.copy_(exact.view(weight.shape))
            return
        block, first = block_size(shape), first_row * blocks_per_row(shape)
        rounded, exact = weight.contiguous().view(-1, block), exact.view(-1, block)
        compensation = self.state[each.parameter].get("compensation")
        compensation = None if compensation is None else compensation.view(-1, block)
        at_a_time = self._chunk(each)
        for start in range(0, len(rounded), at_a_time):
            rows = slice(start, start + at_a_time)
            misses = None if compensation is None else compensation[rows]
            self._write(each, rounded[rows], exact[rows], misses, first + start)
        if not weight.is_contiguous():
            weight.copy_(rounded.view(weight.shape))


def _scalars(state: Mapping[str, Tensor], rule: Rule, group: Mapping[str, Any]) -> Scalars:
    return {key: float(state[key]) for key in rule.scalars(group)}


def _keep(state: Mapping[str, Tensor], scalars: Scalars) -> None:
    for key, value in scalars.items():
        state[key].fill_(value)
