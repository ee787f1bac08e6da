"""The exchange of gradients inside DDP's backward pass: its hook, what is kept between steps, and what a step means.

DDP calls the hook with each bucket that is full, in the same order on all workers. Until the first `begin` all of it is
a rehearsal (`warm_up`, the dry run): everything is computed and sent, and nothing that is kept changes.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.errors import UserError
from trainer.parallel.comm import Comm
from trainer.parallel.strategy import Strategy
from trainer.wire.bucket_rows import BucketRows
from trainer.wire.low_rank import ThinMatrices, next_basis, starting_basis, summed_together
from trainer.wire.row_codecs import ROW_CODECS, Draws, key_of, round_at_random, rounded_at_random
from trainer.wire.shared_rows import mean_of_share, put_means
from trainer.wire.wire_cost import is_changed, rank_of, told

_log = logging.getLogger(__name__)
_REHEARSAL = -1  # in place of a step's number


class GradientExchange:
    """Averages the gradients of one worker's model with the others', by `exchange.method`.

    Attributes:
        errors: what was left out of each tensor so far and will be added to its next gradient, bf16, in its shape; of
            the gradient without fp16's loss scale.
        bases: with `powersgd`, the second thin matrix of each tensor, fp32 [columns, rank], the same on all workers.
    """

    def __init__(self, config: ExchangeConfig, parameters: Mapping[str, nn.Parameter], comm: Comm, seed: int) -> None:
        self._config, self._comm, self._seed = config, comm, seed
        self._parameters = dict(parameters)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._changed = frozenset(name for name, p in parameters.items() if is_changed(config, p.shape))
        self._step, self._loss_scale = _REHEARSAL, 1.0
        self._rows: dict[tuple[str, ...], BucketRows] = {}
        kept = [name for name in parameters if name in self._changed and config.keeps_errors]
        self.errors = {name: torch.zeros_like(parameters[name], dtype=torch.bfloat16) for name in kept}
        self.bases: dict[str, Tensor] = {}
        self._begin_bases()

    def _begin_bases(self) -> None:
        if self._config.method != "powersgd":
            return
        for name in self.errors:
            shape = self._parameters[name].shape
            basis = starting_basis(shape, rank_of(shape, self._config.rank), self._seed, name)
            self.bases[name] = basis.to(self._comm.device)

    @property
    def keeps_errors(self) -> bool:
        """Whether anything is kept between steps, and changes in the backward pass."""
        return bool(self.errors)

    def begin(self, step: int, loss_scale: float) -> None:
        """Before the passes of a step, after so many of the run, whose loss is multiplied by `loss_scale`."""
        self._step, self._loss_scale = step, loss_scale

    def end(self, *, took_effect: bool) -> None:
        """After a step. Of one that was skipped, what was kept is part of gradients that are gone, and is given up."""
        if self._step == _REHEARSAL or took_effect:
            return
        for error in self.errors.values():
            error.zero_()
        self._begin_bases()

    def attach(self, model: DistributedDataParallel) -> None:
        """Let DDP exchange gradients this way."""
        model.register_comm_hook(self, _hook)

    @torch.no_grad()
    def average(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's bucket averaged, in its own memory; on a card while the backward pass goes on."""
        buffer = bucket.buffer()
        on_card = buffer.device.type == "cuda"
        with self.beside():
            gradients = {
                self._names[parameter]: gradient
                for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
            }
            self.average_together(buffer, gradients)
            future: Future[Tensor] = Future(devices=[buffer.device] if on_card else None)
            future.set_result(buffer)
        return future

    def average_together(self, buffer: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Contiguous tensors by name, which are all of `buffer`, averaged in place."""
        if _REHEARSAL < self._step < self._config.plain_steps:
            dist.all_reduce(buffer.div_(self._comm.world))
        elif self._config.method == "powersgd":
            self._average_products(tensors)
        else:
            self._average_rows(tensors)

    @cached_property
    def _stream(self) -> "torch.cuda.Stream":
        return torch.cuda.Stream(self._comm.device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On a card, on a stream of its own, which begins with what is there now; DDP waits for it by the future."""
        if self._comm.device.type != "cuda":
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._comm.device))
        with torch.cuda.stream(self._stream):
            yield

    def _average_rows(self, gradients: Mapping[str, Tensor]) -> None:
        """As rows of bf16 or of integers; small tensors of the latter as they are."""
        changed = {name: gradient for name, gradient in gradients.items() if name in self._changed}
        rest = [gradient for name, gradient in gradients.items() if name not in self._changed]
        self._put_means(rest, summed_together([gradient.float() for gradient in rest]))
        if not changed:
            return
        codec, keeps = ROW_CODECS[self._config.method], self.keeps_errors
        place = self._rows_of(changed, codec.block)
        rows, tensors = place.empty(), [*changed.values()]
        place.fill(rows, tensors)
        if self._loss_scale != 1.0:
            rows /= self._loss_scale
        if keeps:
            place.add(rows, [self.errors[name] for name in changed])
        own, mean = (None, None) if keeps else (self._draws(place, "own", self._comm.rank), self._draws(place, "mean"))
        encoded = mean_of_share(rows, codec, own, mean, keeps_errors=keeps)
        if keeps and self._step != _REHEARSAL:
            rounded = round_at_random(rows, self._draws(place, "error", self._comm.rank))
            place.take(rounded, [self.errors[name] for name in changed])
            del rounded
        put_means(encoded, rows, codec)
        if self._loss_scale != 1.0:
            rows *= self._loss_scale
        narrow = tensors[0].dtype == torch.bfloat16 and self._config.method != "bf16"
        place.take(round_at_random(rows, self._draws(place, "result")) if narrow else rows, tensors)

    def _average_products(self, gradients: Mapping[str, Tensor]) -> None:
        """As products of thin matrices; tensors that would not get smaller as they are."""
        matrices = {name: g.view(g.shape[0], -1) for name, g in gradients.items() if name in self._changed}
        rest = [gradient for name, gradient in gradients.items() if name not in self._changed]
        thin = ThinMatrices(matrices, self.errors, 1 / self._loss_scale)
        summed = summed_together([*(gradient.float() for gradient in rest), *thin.left(self.bases)])
        self._put_means(rest, summed[: len(rest)])
        rights = thin.right(summed[len(rest) :])
        means = summed_together(rights)
        for (name, matrix), own, mean in zip(matrices.items(), rights, means, strict=True):
            mean /= self._comm.world
            if self._step != _REHEARSAL:
                error = self.errors[name]
                error.copy_(self._rounded(thin.error(name, own), "error", name, self._comm.rank).view(error.shape))
                self.bases[name] = next_basis(mean, self.bases[name])
            product = thin.product(name, mean)
            product *= self._loss_scale
            is_narrow = matrix.dtype == torch.bfloat16
            matrix.copy_(self._rounded(product, "result", name) if is_narrow else product)

    def _put_means(self, tensors: list[Tensor], sums: list[Tensor]) -> None:
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total / self._comm.world)

    def _rows_of(self, tensors: Mapping[str, Tensor], block: int) -> BucketRows:
        names = tuple(tensors)
        if names not in self._rows:
            sizes = {name: tensor.numel() for name, tensor in tensors.items()}
            self._rows[names] = BucketRows(sizes, block, self._comm.world, self._comm.device)
        return self._rows[names]

    def _draws(self, rows: BucketRows, *purpose: int | str) -> Draws:
        return Draws(rows.ids, key_of(self._seed, self._step, *purpose))

    def _rounded(self, exact: Tensor, purpose: str, name: str, *of: int) -> Tensor:
        return rounded_at_random(exact, name, self._seed, self._step, purpose, *of)


def _hook(exchange: GradientExchange, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return exchange.average(bucket)


def with_exchange(config: ExchangeConfig, strategy: Strategy, comm: Comm, seed: int) -> Strategy:
    """The strategy, whose DDP exchanges gradients as configured; call it before the first backward pass.

    Raises:
        UserError: the weights are spread over the workers.
    """
    if config.method == "plain":
        return strategy
    if comm.world == 1:
        _log.warning("exchange.method = %s: has no effect, for there is one worker", config.method)
        return strategy
    if not isinstance(strategy.model, DistributedDataParallel):
        kind = strategy.sharing.kind
        raise UserError(f"exchange.method = {config.method}: is for memory.strategy: ddp; this run shares by {kind}")
    exchange = GradientExchange(config, strategy.parameters, comm, seed)
    exchange.attach(strategy.model)
    return replace(strategy, exchange=exchange)


def gradients_told(config: ExchangeConfig, strategy: Strategy) -> str:
    """A line about how the gradients of DDP travel, and in how many bytes."""
    parameters = [*strategy.parameters.values()]
    shapes = [parameter.shape for parameter in parameters]
    return told(config, shapes, strategy.world, parameters[0].element_size() if parameters else 4)
