"""The names of precisions in the configuration, as dtypes."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that the UNet's arithmetic is cast to; None where it stays fp32."""
    return None if precision == "fp32" else DTYPES[precision]
