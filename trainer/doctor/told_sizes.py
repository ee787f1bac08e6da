"""Sizes, speeds and times for a person."""

_GIB = 1 << 30
_MIB = 1 << 20


def gib(count: float) -> str:
    """Memory, as `free -h` and `nvidia-smi` count it."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def speed(bytes_per_s: float) -> str:
    """As disks, links and nccl-tests count it."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def seconds(value: float) -> str:
    """With three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
