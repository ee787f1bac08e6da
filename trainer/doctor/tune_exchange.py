"""Which settings of NCCL make this machine's all-reduce faster: tried one by one, and kept where it shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.doctor.exchange import MIB, ExchangeFacts
from trainer.doctor.told_sizes import seconds, speed

SIZES = (16 * MIB, 64 * MIB)  # about DDP's buckets, and the gradients of one of FSDP2's blocks
# In the order in which they are tried. Channels are thread blocks that a card cannot use for computing: few first.
# Only what is safe to force: LL128 may corrupt data where NCCL does not choose it by itself (its graph/tuning.cc), as
# without NVLink, and Tree knows neither gathers nor broadcasts, which would fail.
ROUNDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NCCL_MAX_NCHANNELS", ("1", "2", "4", "8")),
    ("NCCL_BUFFSIZE", (str(2 * MIB), str(8 * MIB), str(16 * MIB))),
    ("NCCL_PROTO", ("Simple",)),
    ("NCCL_ALGO", ("Ring",)),
)
_LEAST_GAIN = 0.03  # below which two measurements of the same settings may differ on a machine at rest

Settings = Mapping[str, str]
Measure = Callable[[Settings], ExchangeFacts]


@dataclass(frozen=True)
class Tried:
    """One start of the workers.

    Attributes:
        settings: variables of NCCL beside those of the shell.
        total_s: seconds of one exchange of each of `SIZES`, medians; None where it failed.
        bus_bytes_per_s: of the largest size, at the median and at the 99th percentile.
        kept: it was faster than what was kept before it, by more than the measurement's own spread.
        error: why there is no figure.
    """

    settings: Settings
    total_s: float | None
    bus_bytes_per_s: tuple[float, float] = (0.0, 0.0)
    kept: bool = False
    error: str = ""


@dataclass(frozen=True)
class Tuned:
    """All that was tried, in its order, and the settings to keep; {} where NCCL's own choice is as fast."""

    tried: tuple[Tried, ...]
    best: Settings
    least_gain: float

    @property
    def gain(self) -> float:
        """By which share an exchange became shorter."""
        first = self.tried[0].total_s
        kept = [each.total_s for each in self.tried if each.kept and each.total_s is not None]
        return 1 - kept[-1] / first if kept and first else 0.0


def tune(
    measure: Measure,
    *,
    rounds: Sequence[tuple[str, Sequence[str]]] = ROUNDS,
    tick: Callable[[str], None] = lambda told: None,
) -> Tuned:
    """Try each value of each setting beside the best ones of the settings before.

    A value is kept if it makes the exchange shorter than the best so far, by more than 3 % and more than two
    measurements without any settings differ.
    """
    tried: list[Tried] = []
    for _ in range(2):
        tick("NCCL as it is")
        tried.append(_try(measure, {}))
    first, second = (each.total_s for each in tried)
    if first is None or second is None:
        return Tuned(tuple(tried), {}, _LEAST_GAIN)
    best, best_s = {}, min(first, second)
    least_gain = max(_LEAST_GAIN, abs(first - second) / max(first, second))
    for name, values in rounds:
        before, before_s = best, best_s
        for value in values:
            tick(f"{name}={value}")
            now = _try(measure, {**before, name: value})
            if now.total_s is not None and now.total_s < min(best_s, before_s * (1 - least_gain)):
                best, best_s = dict(now.settings), now.total_s
                now = Tried(now.settings, now.total_s, now.bus_bytes_per_s, kept=True)
            tried.append(now)
    return Tuned(tuple(tried), best, least_gain)


def ticks(rounds: Sequence[tuple[str, Sequence[str]]] = ROUNDS) -> int:
    """How often `tune` says what it does."""
    return 2 + sum(len(values) for _, values in rounds)


def _try(measure: Measure, settings: Settings) -> Tried:
    facts = measure(settings)
    if facts.error or not facts.sizes:
        return Tried(settings, None, error=facts.error or "nothing was exchanged")
    largest = max(facts.sizes, key=lambda each: each.size)
    total_s = sum(each.median_s for each in facts.sizes)
    return Tried(settings, total_s, (largest.bus_bytes_per_s, largest.slow_bus_bytes_per_s))


def tuned_lines(tuned: Tuned) -> list[str]:
    """A table of what was tried, and the lines for the configuration."""
    lines = [f"all-reduce of {' and '.join(str(size // MIB) for size in SIZES)} MiB of bf16, one after the other:", ""]
    for each in tuned.tried:
        name = " ".join(f"{name}={value}" for name, value in each.settings.items()) or "as NCCL chooses"
        if each.total_s is None:
            lines.append(f"  {'-':>9}  {'':>24}  {name}: {each.error}")
            continue
        median, slow = each.bus_bytes_per_s
        speeds = f"{speed(median)}, p99 {speed(slow)}"
        lines.append(f"  {seconds(each.total_s):>9}  {speeds:>24}  {name}{'  <- kept' if each.kept else ''}")
    if not tuned.best:
        return [*lines, "", f"nothing was faster by {tuned.least_gain:.0%}: leave NCCL as it is"]
    chosen = ", ".join(f"{name}: {value}" for name, value in tuned.best.items())
    told = f"{tuned.gain:.0%} shorter. Computing goes on beside an exchange in a run: compare with `sdxl-train bench`."
    return [*lines, "", told, "", "launch:", f"  nccl: {{{chosen}}}"]
