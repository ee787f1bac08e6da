"""The names of precisions in the configuration, as dtypes of what is held and what is computed."""

from dataclasses import dataclass

import torch

from trainer.errors import UserError
from trainer.optim.adamw import Rounding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Dtypes of what trains.

    Attributes:
        weights: in which weights are held, and updated.
        compute: in which forward and backward passes compute.
        rounding: how updated bf16 weights are rounded; None where they are fp32.
    """

    weights: torch.dtype
    compute: torch.dtype
    rounding: Rounding | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that the arithmetic on the weights is cast to; None where it has the weights' own."""
        return None if self.weights == self.compute else self.compute


def precision_of(name: str) -> Precision:
    """The meaning of `train.precision`."""
    return {
        "fp32": Precision(torch.float32, torch.float32),
        "bf16": Precision(torch.float32, torch.bfloat16),
        "fp16": Precision(torch.float32, torch.float16),
        "bf16_stochastic": Precision(torch.bfloat16, torch.bfloat16, "stochastic"),
        "bf16_kahan": Precision(torch.bfloat16, torch.bfloat16, "kahan"),
    }[name]


def require_arithmetic(name: str, device: torch.device) -> None:
    """Raise UserError where the device cannot compute as `train.precision` says."""
    if device.type == "cuda":
        require_bf16(name, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def require_bf16(name: str, card: str, capability: tuple[int, int]) -> None:
    """Raise UserError where `train.precision` computes in bf16 and a card of this compute capability does not.

    PyTorch would emulate it there, which gives up the speed of fp16.
    """
    if precision_of(name).compute == torch.bfloat16 and capability < (8, 0):
        raise UserError(
            f"train.precision = {name}: {card} (compute capability {capability[0]}.{capability[1]}) has no bf16 "
            "arithmetic; cards have it from 8.0 (Ampere) on. Set train.precision: fp16"
        )


def set_fp32_arithmetic(name: str) -> None:
    """On CUDA: whether products and convolutions of fp32 tensors may use TF32, with 10 bits of mantissa as in fp16.

    With `train.precision: fp32` they may not, though PyTorch allows it for convolutions. Otherwise they may: what
    trains computes with fewer bits, and what is left in fp32 is frozen (VAE, text encoders) and needs fp32's range
    more than its last bits.
    """
    allowed = name != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
