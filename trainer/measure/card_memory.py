"""What the host's graphics cards are, asked of the driver's own tool; no torch."""

import subprocess
from collections.abc import Sequence

# nvidia-smi tells the memory that is printed on the card; CUDA has less, for the driver keeps some for itself. Of
# 24,576 MiB of an RTX 3090, PyTorch's total_memory is 23.68 to 23.70 GiB, of 24,564 MiB of an RTX 4090 23.64.
KEPT_BY_DRIVER = round(0.35 * 2**30)


def card_bytes(gpus: Sequence[str]) -> int | None:
    """What CUDA has of the smallest of these cards; None where none of them can be asked.

    Args:
        gpus: as `trainer.parallel.environment.detect_gpus` lists those that workers may use.
    """
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    listed = [line.partition(",") for line in done.stdout.splitlines()]
    visible = [mib.strip() for uuid, _, mib in listed if any(f"(UUID: {uuid.strip()})" in gpu for gpu in gpus)]
    sizes = [int(mib) for mib in visible if mib.isdecimal()]
    return min(sizes) * 2**20 - KEPT_BY_DRIVER if sizes else None
