"""What the host's graphics cards are, asked of the driver's own tool; no torch."""

import subprocess


def card_bytes() -> int | None:
    """Memory of the smallest NVIDIA card of this host; None where there is none, or none that can be asked."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(line) for line in done.stdout.split() if line.isdecimal()]
    return min(sizes) * 2**20 if sizes else None
