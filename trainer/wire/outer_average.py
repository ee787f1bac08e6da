"""Workers that take steps each by itself, and average how far they have come every H steps: DiLoCo, also streamed.

Each worker's difference to the common weights is a gradient to them ("outer"); its mean over the workers is applied by
SGD with Nesterov momentum, and all go on from the new common weights (Douillard et al. 2023, arXiv 2311.08105). The
optimizer's state stays each worker's own. Streamed (Douillard et al. 2025, arXiv 2501.18512): runs of layers in turn,
each every H steps; an average may take effect some steps after it began, mixed with what the worker has learnt since.

Until the first `begin` all of it is a rehearsal (`warm_up`, the dry run), in which nothing is averaged.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Work  # pyright: ignore[reportPrivateImportUsage]

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.errors import UserError
from trainer.optim.ema_memory import host_tensors
from trainer.parallel.comm import Comm
from trainer.parallel.strategy import Strategy
from trainer.wire.gradient_exchange import GradientExchange
from trainer.wire.row_codecs import rounded_at_random
from trainer.wire.wire_cost import averaged_together, cut_evenly

_log = logging.getLogger(__name__)
_REHEARSAL = -1  # in place of a step's number


@dataclass
class _Travelling:
    """Differences on their way, or arrived: by name, views of one buffer of sums, or means where nothing sums."""

    differences: Mapping[str, Tensor]
    buffer: Tensor
    work: "Work | torch.cuda.Event | None" = None


class OuterAverage:
    """Of one worker; see `trainer.parallel.strategy.Outer`."""

    def __init__(
        self,
        config: ExchangeConfig,
        parameters: Mapping[str, nn.Parameter],
        comm: Comm,
        seed: int,
        exchange: GradientExchange | None = None,
    ) -> None:
        """`parameters`: as they are, the common weights; `exchange`: of differences; None: they are summed in fp32."""
        self._config, self._comm, self._seed, self._exchange = config, comm, seed, exchange
        self._parameters = dict(parameters)
        self.common, self.momentum = (self._laid_out() for _ in range(2))
        for name, parameter in parameters.items():
            self.common[name].copy_(parameter.detach())
            self.momentum[name].zero_()
        self.is_common, self.is_renewed = True, False
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._fragments = cut_evenly(sizes, config.fragments)
        self._travelling: list[_Travelling] = []
        self._step, self._is_last = _REHEARSAL, False

    def _laid_out(self) -> dict[str, Tensor]:
        if self._config.outer_place == "host":
            shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
            return host_tensors(shapes, self._comm.device)
        return {name: torch.empty_like(p, dtype=torch.float32) for name, p in self._parameters.items()}

    @property
    def _is_streamed(self) -> bool:
        return self._config.fragments > 1 or self._config.overlap_steps > 0 or self._config.kept_share > 0

    def begin(self, step: int, *, is_last: bool) -> None:
        """As in `Outer`."""
        self._step, self._is_last = step, is_last

    @torch.no_grad()
    def end(self) -> None:
        """As in `Outer`: begin the averages that are due after this step, and let those take effect that are."""
        if self._step == _REHEARSAL:
            return
        done, self.is_common = self._step + 1, False
        self.is_renewed = self._is_last or done % self._config.average_every == 0
        for names in self._due(done - self._config.overlap_steps):
            self._take_effect(names)
        for names in self._due(done):
            self._take_effect(names)  # of another schedule, before this start of the run
            if self._config.overlap_steps:
                self._travelling += [self._sent(group) for group in self._groups(names)]
            else:
                self._average(names, self._config.outer_lr, self._config.outer_momentum, self._config.kept_share)
                self.is_common = not self._is_streamed
        if self._is_last and not self.is_common:
            # Less than H steps since the latest average: momentum would carry the weights as far as H.
            self._take_effect(self._parameters)
            self._average([*self._parameters], 1.0, None, 0.0, exactly=True)
            self.is_common = True

    def _due(self, step: int) -> Iterator[Sequence[str]]:
        """The fragments whose average begins after so many steps; the last one after a multiple of H."""
        every, number = self._config.average_every, len(self._fragments)
        for index, names in enumerate(self._fragments, start=1):
            if step > 0 and step % every == (every * index // number) % every:
                yield names

    def _groups(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        return averaged_together({name: self._parameters[name].numel() for name in names})

    def _average(
        self, names: Sequence[str], lr: float, momentum: float | None, kept: float, *, exactly: bool = False
    ) -> None:
        """Exchange and apply; while one group travels, the one before is applied."""
        before: _Travelling | None = None
        for group in self._groups(names):
            now = self._sent(group, exactly=exactly)
            if before:
                self._apply(before, lr, momentum, kept)
            before = now
        if before:
            self._apply(before, lr, momentum, kept)

    def _sent(self, names: Sequence[str], *, exactly: bool = False) -> _Travelling:
        """This worker's differences, on their way to be the mean of all; `exactly`: whatever `method` is."""
        parameters = {name: self._parameters[name] for name in names}
        buffer = torch.empty(sum(p.numel() for p in parameters.values()), device=self._comm.device)
        parts = buffer.split([p.numel() for p in parameters.values()])
        differences = {n: part.view(p.shape) for part, (n, p) in zip(parts, parameters.items(), strict=True)}
        for name, difference in differences.items():
            difference.copy_(self.common[name])
            # Where they go on from the common weights alone, workers began at these in the weights' own precision.
            if not self._config.kept_share and parameters[name].dtype != torch.float32:
                difference.copy_(difference.to(parameters[name].dtype))
            difference -= parameters[name]
        if self._exchange and not exactly:
            arrival = torch.cuda.Event() if buffer.is_cuda else None
            with self._exchange.beside():
                self._exchange.average_together(buffer, differences)
                if arrival:
                    arrival.record()
            return _Travelling(differences, buffer, arrival)
        buffer /= self._comm.world
        return _Travelling(differences, buffer, dist.all_reduce(buffer, async_op=True))

    def _take_effect(self, names: Sequence[str] | Mapping[str, nn.Parameter]) -> None:
        """What travels of these tensors, and with it whatever has been sent together with them."""
        chosen, config = {*names}, self._config
        due = [each for each in self._travelling if not chosen.isdisjoint(each.differences)]
        self._travelling = [each for each in self._travelling if chosen.isdisjoint(each.differences)]
        for each in due:
            self._apply(each, config.outer_lr, config.outer_momentum, config.kept_share)

    def _apply(self, arrived: _Travelling, lr: float, momentum: float | None, kept: float) -> None:
        """A step of SGD with Nesterov momentum as PyTorch has it; and the worker goes on from there.

        Args:
            momentum: None: the step is taken without, and leaves it as it is.
            kept: share of the worker's own weights that stays.
        """
        if arrived.work is not None:
            arrived.work.wait()
        names = [*arrived.differences]
        common = [self.common[name] for name in names]
        gradients = [arrived.differences[name].to(self.common[name].device) for name in names]
        torch._foreach_add_(common, gradients, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
        if momentum is not None:
            speeds = [self.momentum[name] for name in names]
            torch._foreach_mul_(speeds, momentum)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(speeds, gradients)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(common, speeds, alpha=-lr * momentum)  # pyright: ignore[reportPrivateImportUsage]
        for name, weights in zip(names, common, strict=True):
            self._go_on(name, self._parameters[name], weights, kept)

    def _go_on(self, name: str, parameter: nn.Parameter, common: Tensor, kept: float) -> None:
        if not kept:
            parameter.copy_(common)
            return
        mixed = common.to(parameter.device).lerp(parameter.float(), kept)
        if parameter.dtype == torch.bfloat16:  # to the nearest, own steps of less than half a digit would be lost
            mixed = rounded_at_random(mixed, name, self._seed, self._step, "mix", self._comm.rank)
        parameter.copy_(mixed)

    def pending(self) -> dict[str, Tensor]:
        """As in `Outer`."""
        for each in self._travelling:
            if each.work is not None:
                each.work.wait()
                each.work = None
        if self._travelling and self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)  # errors of rounding, which are saved too, are made beside
        return {name: mean for each in self._travelling for name, mean in each.differences.items()}

    def take_up(self, pending: Mapping[str, Tensor], *, is_common: bool) -> None:
        """As in `Outer`."""
        self.is_common = is_common
        for names in self._fragments:
            for group in self._groups(names):
                found = {name: pending[name].to(self._comm.device) for name in group if name in pending}
                if found:
                    self._travelling.append(_Travelling(found, next(iter(found.values()))))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """As in `Outer`. fp32 weights change places with the common ones, which takes no memory."""
        if self.is_common:
            yield
            return
        kept = {n: p.detach().clone() for n, p in self._parameters.items() if p.dtype != torch.float32}
        swapped = [name for name in self._parameters if name not in kept]
        try:
            self._swap(swapped)
            with torch.no_grad():
                for name in kept:
                    self._parameters[name].copy_(self.common[name])
            yield
        finally:
            self._swap(swapped)
            with torch.no_grad():
                for name, weights in kept.items():
                    self._parameters[name].copy_(weights)

    @torch.no_grad()
    def _swap(self, names: Sequence[str]) -> None:
        for name in names:
            parameter, common = self._parameters[name], self.common[name]
            own = parameter.detach().clone()
            parameter.copy_(common)
            common.copy_(own)


def with_average(config: ExchangeConfig, strategy: Strategy, comm: Comm, seed: int) -> Strategy:
    """The strategy, whose workers take steps each by itself; its weights as they are now are what all have in common.

    Raises:
        UserError: the weights are spread over the workers.
    """
    if comm.world == 1:
        _log.warning("exchange.average_every = %d: has no effect, for there is one worker", config.average_every)
        return strategy
    if not strategy.sharing.steps_alone:
        kind = strategy.sharing.kind
        raise UserError(
            f"exchange.average_every = {config.average_every}: is for memory.strategy: ddp; this run shares by {kind}"
        )
    parameters = strategy.parameters
    exchange = None if config.method == "plain" else GradientExchange(config, parameters, comm, seed)
    return replace(strategy, exchange=exchange, outer=OuterAverage(config, parameters, comm, seed, exchange))
