"""How often a steady step makes the host wait for the device: once, for its loss and norm.

On the CPU nothing waits, so what would lie on a card is followed from the weights on: whatever is computed from it lies
there too. Reading a number of such a tensor, or bringing it to the host, is a wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.train.step import StepParts

READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
READS |= {torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.nonzero}


class OnDevice(TorchDispatchMode):
    """Follows what would lie on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()

    def add(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self.known[tensor] = True

    def holds(self, *values: Any) -> bool:
        return any(isinstance(each, torch.Tensor) and each in self.known for each in tree_leaves(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.holds(args, kwargs):
            self.add(out)
        return out


class Reads(TorchFunctionMode):
    """Counts reads of what `device` follows."""

    def __init__(self, device: OnDevice) -> None:
        super().__init__()
        self.device, self.found = device, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.device.holds(args[0]):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_of_steps(found: list[list[str]], first: int) -> Iterator[Callable[[int, StepParts], None]]:
    """What to call before each step with what it works on; reads from step `first` on are in `found`."""
    device = OnDevice()
    reads = Reads(device)

    def before(step: int, parts: StepParts) -> None:
        if step == 0:
            device.add([*parts.denoiser.model.parameters(), *parts.denoiser.model.buffers()])
            if parts.denoiser.image_encoder:
                device.add([*parts.denoiser.image_encoder.vae.parameters()])
        if step > first:
            found.append(reads.found)
        reads.found = []

    with device, reads:
        yield before


def steady_reads(config: Config) -> list[list[str]]:
    found: list[list[str]] = []
    with reads_of_steps(found, first=2) as before:
        watched_run(config, before_parts=before)
    return found


@pytest.mark.e2e
@pytest.mark.parametrize(
    "more", [{}, {"ema": {"averages": [{"kind": "plain", "decay": 0.9}]}, "log": {"block_norms": True}}]
)
def test_a_steady_step_is_read_once(model_folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """Of two passes, with records of every step, clipping, the guard, and what a worker tells of its time."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 8})
    config = run_config(model_folder, root, tmp_path / "run", steps=6, gradient_accumulation_steps=2)
    config = Config.model_validate(config.model_dump(mode="json", exclude_unset=True) | more)
    assert steady_reads(config) == [["tolist"]] * 3


def test_reads_are_found() -> None:
    """Of what comes from the weights, in the backward pass too, and not of what is the host's."""
    device = OnDevice()
    reads = Reads(device)
    weight, seeds = torch.ones(3, requires_grad=True), torch.arange(3)
    device.add(weight)
    with device, reads:
        loss = (weight * seeds).sum()
        loss.backward()
        assert weight.grad is not None
        seeds.tolist(), float(seeds.sum())
        float(loss.detach()), weight.grad.tolist(), bool(weight.grad.isfinite().all()), loss.detach().item()
    assert reads.found == ["__float__", "tolist", "__bool__", "item"]
