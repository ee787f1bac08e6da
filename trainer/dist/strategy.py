"""How the workers share one model. Today: each holds all of it, gradients are averaged (DDP)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.dist.comm import Comm

BUCKET_MB = 64  # fewer, larger reductions than DDP's 25 MiB: 1,680 tensors, most of them small


@dataclass(frozen=True)
class Strategy:
    """The model as the step sees it.

    Attributes:
        model: called in the forward pass; reduces gradients in the backward pass.
        parameters: what trains, by name.
        world: gradients are averaged over this many workers, so `backward` multiplies the loss by it:
            the step's loss is a sum over workers.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter] = field(repr=False)
    world: int

    def reduction(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: workers exchange gradients in the last one only."""
        if last or self.world == 1:
            return nullcontext()
        return self.model.no_sync()  # pyright: ignore[reportCallIssue]

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this worker's part of the step's loss."""
        (loss * self.world).backward()


def make_strategy(unet: nn.Module, comm: Comm) -> Strategy:
    """Wrap `unet` for `comm.world` workers; a single worker runs the plain model."""
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    if comm.world == 1:
        return Strategy(unet, parameters, 1)
    model = nn.parallel.DistributedDataParallel(
        unet,
        device_ids=[comm.device.index] if comm.device.type == "cuda" else None,
        bucket_cap_mb=BUCKET_MB,
        gradient_as_bucket_view=True,
        batched_grad_copy=True,
        forward_sync_buffers=False,  # the UNet has no buffers
    )
    return Strategy(model, parameters, comm.world)


def warm_up(strategy: Strategy, throw_away_loss: Callable[[nn.Module], Tensor]) -> None:
    """One forward and backward pass whose gradients are thrown away, before the first real step.

    DDP orders its buckets by registration in its first backward pass and by arrival afterwards. With
    three or more workers the ring then sums in another order, so a resumed run's first step would
    differ in the last bit from the same step of an uninterrupted run. After this both are alike.
    """
    if strategy.world > 1:
        throw_away_loss(strategy.model).backward()
        strategy.model.zero_grad(set_to_none=True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode without gradients; its mode is put back afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield module
    finally:
        module.train(training)
