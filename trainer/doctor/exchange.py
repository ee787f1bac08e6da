"""How fast workers add up gradients, and whether some exchanges stall: workers are started for it, as a run does."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.doctor.disk_facts import percentile
from trainer.parallel.launch import Wish, run_workers
from trainer.parallel.worker import CORES

MIB = 1 << 20
SIZES = (1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
STALL = 3.0  # times the median, from which an exchange is counted as stalled
_PER_SIZE_S = 2.0
_LIMIT_S = 180.0  # for all of it; it takes a quarter of a minute where nothing hangs
_OURS = str(Path(__file__).parents[2])
# Not `-m`: the first place of the path would be the current directory's, where a folder may be called `trainer`.
_PROGRAM = f"import sys; sys.path[0] = {_OURS!r}; from trainer.doctor.exchange_worker import main; main()"


@dataclass(frozen=True)
class SizeFacts:
    """All-reduces of one size.

    Attributes:
        size: bytes that every worker gives.
        times: exchanges that were measured.
        median_s, slowest_s: of the slowest worker in each exchange, the median and the 99th percentile.
        stalls: exchanges that took more than `STALL` medians.
        workers: that took part.
    """

    size: int
    times: int
    median_s: float
    slowest_s: float
    stalls: int
    workers: int

    @property
    def bus_bytes_per_s(self) -> float:
        """What every worker sends a second in the median: a ring sends 2 (n - 1) / n of the size, as nccl-tests say."""
        return self.sent / self.median_s

    @property
    def slow_bus_bytes_per_s(self) -> float:
        """The same of the 99th percentile."""
        return self.sent / self.slowest_s

    @property
    def sent(self) -> float:
        """Bytes that a worker sends in a ring."""
        return 2 * (self.workers - 1) / self.workers * self.size


@dataclass(frozen=True)
class ExchangeFacts:
    """What workers measured.

    Attributes:
        workers: how many.
        backend: `nccl` between cards, `gloo` between processes.
        sizes: [] for one worker; the largest are missing where they would have taken too long.
        to_card, from_card: bytes a second between page-locked memory and the slowest card, all at once; 0 without.
        copies: of pairs of cards, whether what was copied between them arrived as it was.
        nccl: its version; "" without cards.
        error: why there is nothing, in a line.
    """

    workers: int
    backend: str
    sizes: tuple[SizeFacts, ...] = ()
    to_card: float = 0.0
    from_card: float = 0.0
    copies: Mapping[str, bool] | None = None
    nccl: str = ""
    error: str = ""


def measure_exchange(
    workers: int,
    *,
    gpu: bool,
    env: Mapping[str, str] = os.environ,
    cpus: Sequence[Sequence[int]] = (),
    sizes: Sequence[int] = SIZES,
    copies: bool = True,
    tick: Callable[[str], None] = lambda told: None,
    watch: Callable[[], None] = lambda: None,
    limit_s: float = _LIMIT_S,
) -> ExchangeFacts:
    """Start workers that exchange, and wait for them. Call it from the main thread.

    Args:
        gpu: each worker has a card.
        env: of the workers.
        cpus: where each of them runs; [] leaves it to the kernel.
        copies: copy to the cards and between them as well.
        tick: told what is being done.
        watch: called a few times a second meanwhile; must return at once.
        limit_s: after which they are ended: something hangs.
    """
    backend = "nccl" if gpu else "gloo"
    if workers == 1 and not gpu:
        return ExchangeFacts(workers, backend)
    with tempfile.TemporaryDirectory(prefix="sdxl-train-doctor-") as folder:
        found, said = Path(folder) / "found.json", Path(folder) / "says.txt"
        end_s, last = time.monotonic() + limit_s, ""

        def look(process_ids: Sequence[int], steps: int) -> Wish | None:
            nonlocal last
            watch()
            now = said.read_text() if said.exists() else ""
            if now and now != last:
                last = now
                tick(now)
            late = time.monotonic() > end_s
            return Wish(f"no end after {limit_s:.0f} s, while {last or 'starting'}", 0) if late else None

        result = run_workers(
            [sys.executable, "-c", _PROGRAM, json.dumps([str(found), str(said), list(sizes), _PER_SIZE_S, copies])],
            workers=workers,
            log_dir=Path(folder),
            env=env,
            threads=None,
            gpu=gpu,
            stop_notice="ending",
            look=look,
            own_env=[{CORES: ",".join(map(str, each))} for each in cpus],
        )
        if result.stopped_by is not None:
            raise KeyboardInterrupt
        if result.failure is not None or not found.exists():
            text = result.failure.text if result.failure else "the workers ended without a word"
            return ExchangeFacts(workers, backend, error=_last_line(text))
        return facts_from(json.loads(found.read_text()), workers, backend)


def facts_from(record: Mapping[str, Any], workers: int, backend: str) -> ExchangeFacts:
    """What rank 0 wrote: of each size, the seconds of every exchange by every worker; and the copies of all workers."""
    sizes = []
    for size, by_worker in record["sizes"]:
        slowest = [max(times) for times in zip(*by_worker, strict=True)]
        median = percentile(slowest, 50)
        stalls = sum(seconds > STALL * median for seconds in slowest)
        sizes.append(SizeFacts(size, len(slowest), median, percentile(slowest, 99), stalls, workers))
    return ExchangeFacts(
        workers,
        backend,
        tuple(sizes),
        to_card=min((each[0] for each in record["cards"]), default=0.0),
        from_card=min((each[1] for each in record["cards"]), default=0.0),
        copies=record["copies"],
        nccl=record["nccl"],
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "they failed without a word"
