"""The plan of a run's memory as a value: printed as text, kept as JSON; no torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.measure.bench_report import BENCH_FILE, row_from_json
from trainer.measure.optimizer_bench import MeasuredOptimizers
from trainer.measure.run_arithmetic import format_duration
from trainer.memory.choice import CARD_FLOPS, GIB, WIRE_BYTES_PER_S, Budget, Rung, in_gib
from trainer.memory.holdings import PARTS, StrategyName

_PART_NAMES = {"communication": "buffers", "frozen": "frozen models"}


@dataclass(frozen=True)
class RungReport:
    """One way to run, in bytes per worker.

    Attributes:
        moved: blocks whose activations wait in the host's memory; `moved_bytes`: of a pass, also where all do so.
        again_share: of all operations, those that are done again.
        waits_s: seconds of a step for moved activations, that nothing hides.
        split: at the fullest moment, by part; CUDA's context, NCCL's buffers and the margin come on top in `needed`.
    """

    label: str
    strategy: StrategyName
    exchanges_every_pass: bool
    recomputed: int
    offloads: bool
    phase: str
    split: dict[str, int]
    needed: int
    fits: bool
    extra_s: float
    hosts_state: bool = False
    hosts_weights: bool = False
    shares: int = 1
    replicas: int = 1
    moved: int = 0
    again_share: float = 0.0
    moved_bytes: int = 0
    waits_s: float = 0.0

    @staticmethod
    def of(rung: Rung, budget: Budget) -> "RungReport":
        """The report of a rung, without the price of what it recomputes and moves."""
        return RungReport(
            label=rung.label,
            strategy=rung.holding.strategy,
            exchanges_every_pass=(
                rung.holding.strategy in ("zero2", "zero3")
                and rung.holding.reduce_each_pass
                and rung.holding.accumulation > 1
            ),
            recomputed=rung.recomputed,
            offloads=rung.offloads,
            phase=rung.peak.phase,
            split=rung.peak.split,
            needed=budget.needed(rung.peak),
            fits=rung.fits,
            extra_s=rung.extra_s,
            hosts_state=rung.holding.hosted_bytes > 0,
            hosts_weights=rung.holding.hosted_weight_bytes > 0,
            shares=rung.holding.shares,
            replicas=rung.holding.replicas,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, and how it was chosen.

    Attributes:
        kernels: `cuda` or `cpu`.
        image: the largest bucket's height and width in pixels, and images in one pass.
        chosen: the rung to run with; None: nothing fits.
        looked_at: all rungs that were worked out.
        num_blocks: that could be recomputed.
        recompute: names of the blocks that are recomputed; `moved`: of those whose activations are moved.
        link_bytes_per_s: of a card's own link to the host's memory, each way, that was counted with.
        advice: the smallest changes that make it fit, where nothing does.
        wire_bytes: sent by each worker in an optimizer step.
        flops_per_image: forward, backward, recomputed.
        host_bytes: RAM of this host, all workers together.
        checkpoint_bytes: of one checkpoint; `disk_bytes`: of all that are kept, and one being written.
        snapshot_bytes: of one snapshot of the averages; 0 where none are kept.
        num_trained: weights that train; `optimizer_bytes`: their state by kind of optimizer, all workers together.
    """

    kernels: str
    workers: int
    accumulation: int
    image: tuple[int, int, int]
    budget: Budget
    chosen: RungReport | None
    looked_at: tuple[RungReport, ...]
    num_blocks: int
    recompute: tuple[str, ...]
    advice: tuple[str, ...]
    wire_bytes: int
    flops_per_image: tuple[int, int, int]
    host_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    snapshot_bytes: int = 0
    num_trained: int = 0
    optimizer_bytes: Mapping[str, int] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    link_bytes_per_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "MemoryPlan":
        """What `to_json` gave."""
        fields = dict(stored)
        fields["image"] = tuple(fields["image"])
        fields["budget"] = Budget(**fields["budget"])
        fields["chosen"] = RungReport(**fields["chosen"]) if fields["chosen"] else None
        fields["looked_at"] = tuple(RungReport(**rung) for rung in fields["looked_at"])
        for name in ("recompute", "advice", "flops_per_image", "moved"):
            fields[name] = tuple(fields[name])
        return MemoryPlan(**fields)

    def describe(self) -> list[str]:
        """The lines that are printed: a table of all ways, what was chosen and why, and the other needs."""
        height, width, batch = self.image
        images = f"{batch} image{'' if batch == 1 else 's'} of {width} x {height} px"
        kept = f"memory per worker in GiB ({self.kernels}), {images} in a pass, {self.accumulation} passes a step"
        lines = [kept.replace(" 1 passes", " 1 pass"), *_table(self.looked_at, self.budget)]
        if self.chosen and self.chosen.replicas > 1:
            lines.append(f"sharded over {self.chosen.shares} workers, {self.chosen.replicas} replicas")
        if self.chosen is None:
            lines.append(f"nothing fits {self._limit()}")
            lines += [f"  this would: {advice}" for advice in self.advice]
        else:
            lines += self._choice(self.chosen)
        lines.append(
            f"host RAM about {in_gib(self.host_bytes)} GiB; a checkpoint takes {in_gib(self.checkpoint_bytes)} GiB,"
            f" all that are kept {in_gib(self.disk_bytes)} GiB of disk"
        )
        if self.snapshot_bytes:
            lines.append(f"each of the averages' snapshots takes {in_gib(self.snapshot_bytes)} GiB of disk")
        unit, size = ("TFLOP", 1e12) if sum(self.flops_per_image) >= 1e11 else ("GFLOP", 1e9)
        forward, backward, again = (flops / size for flops in self.flops_per_image)
        total = forward + backward + again
        lines.append(
            f"{total:.2f} {unit} an image: forward {forward:.2f}, backward {backward:.2f}, recomputed {again:.2f};"
            f" each worker sends {self.wire_bytes / 1e9:.2f} GB a step"
        )
        return lines

    def describe_optimizers(self, chosen: str, measured: MeasuredOptimizers | None = None) -> list[str]:
        """A table of what each kind of optimizer keeps of this model, the largest first.

        Args:
            chosen: the run's kind.
            measured: how long a step of each takes, as far as `sdxl-train bench --optimizers` has found out.
        """
        width = max(map(len, self.optimizer_bytes), default=0)
        lines = [f"optimizer state of {self.num_trained:,} weights, which zero2 and zero3 spread over the workers:"]
        for kind, num_bytes in sorted(self.optimizer_bytes.items(), key=lambda item: -item[1]):
            each = f"{num_bytes / max(self.num_trained, 1):>6.2f} bytes a weight"
            mark = "  chosen" if kind == chosen else ""
            seconds = measured.seconds.get(kind) if measured else None
            took = (
                "" if measured is None else f" {'not measured':>14}" if seconds is None else f" {seconds:>8.4f} s/step"
            )
            lines.append(f"  {kind:{width}} {each} {in_gib(num_bytes):>8} GiB{took}{mark}")
        if measured:
            lines.append(f"  s/step: the optimizer's alone, measured by `sdxl-train bench` on {measured.device}")
        return lines

    def _limit(self) -> str:
        assert self.budget.total is not None
        return f"{in_gib(self.budget.total)} GiB ({self.budget.given})"

    def _choice(self, chosen: RungReport) -> list[str]:
        if self.budget.total is None:
            return [f"chosen: {_way(chosen, self.num_blocks)}; nothing limits its memory"]
        line = f"chosen: {_way(chosen, self.num_blocks)}: {in_gib(chosen.needed)} of {self._limit()}"
        tighter = [rung for rung in self.looked_at if not rung.fits and rung.label == chosen.label]
        why = "it is the fastest that fits" if len(self.looked_at) > 1 else "it fits"
        if tighter and chosen.recomputed:
            fewest = min(tighter, key=lambda rung: rung.recomputed)
            why = f"with {fewest.recomputed} blocks recomputed it would take {in_gib(fewest.needed)}"
        assumed = f"{CARD_FLOPS / 1e12:.0f} TFLOP/s a card and {WIRE_BYTES_PER_S / 1e9:.0f} GB/s between cards"
        told = ["  extra s: seconds a step of recomputation and exchange, as if nothing hid them;"]
        if any(rung.moved_bytes for rung in self.looked_at):
            assumed += f", {self.link_bytes_per_s / 1e9:g} GB/s between a card and the host, each way"
            told.append("  with it what passes do not hide of moved activations (GiB a pass, each way);")
        if chosen.moved:
            told.append("  `some` moves as many as are no slower than recomputation alone at half of that rate either;")
        return [f"{line}; {why}", *told, f"  assumed: {assumed}. `sdxl-train bench` measures what is fastest"]


def run_time(plan: MemoryPlan, num_images: int, images_per_s: float | None, card_flops: float = CARD_FLOPS) -> str:
    """How long so many images take: at a measured speed of all workers, or by an assumption, which is named."""
    if images_per_s is not None:
        return f"{format_duration(num_images / images_per_s)} at the measured {images_per_s:.2f} images a second"
    speed = card_flops * plan.workers / max(sum(plan.flops_per_image), 1)
    return (
        f"{format_duration(num_images / speed)} at {speed:.2f} images a second, if every card does"
        f" {card_flops / 1e12:.0f} TFLOP/s (half of an RTX 3090's peak in bf16) and waits for nothing"
    )


def measured_speed(
    run_dir: Path, strategy: str, batch_size: int, compiled: bool, bucket_mib: float | None = None
) -> float | None:
    """Images a second that `sdxl-train bench` measured for this run in this way; None where it has not.

    Args:
        bucket_mib: see `BenchRow`; what was measured with other buckets serves where these were not.
    """
    try:
        stored = json.loads((run_dir / BENCH_FILE).read_text(encoding="utf-8"))
        rows = [row_from_json(row) for row in stored["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    way = strategy, batch_size, compiled
    known = [row for row in rows if row.error is None and row.way == way]
    known.sort(key=lambda row: row.bucket_mib != bucket_mib)
    return known[0].images_per_s if known else None


def _way(rung: RungReport, num_blocks: int) -> str:
    again = {0: "all activations kept", num_blocks: "all blocks recomputed"}
    text = f"{rung.label}, {again.get(rung.recomputed, f'{rung.recomputed} of {num_blocks} blocks recomputed')}"
    if rung.moved:
        return f"{text}, activations of {rung.moved} in the host's memory ({in_gib(rung.moved_bytes)} GiB a worker)"
    return f"{text}, what is kept waits in the host's memory" if rung.offloads else text


def _table(rungs: Sequence[RungReport], budget: Budget) -> Iterable[str]:
    """A row for each way; what only a card has, and what only a choice needs, is left out where there is none."""
    parts = [part for part in PARTS if any(rung.split.get(part, 0) >= GIB // 200 for rung in rungs)]
    heads = [_PART_NAMES.get(part, part) for part in parts]
    on_card, chooses = any(rung.needed > sum(rung.split.values()) for rung in rungs), budget.total is not None
    heads = [*heads, *["CUDA, margin"] * on_card, "total"]
    width = max(len(_short_way(rung)) for rung in rungs)
    head = " ".join(f"{head:>13}" for head in heads)
    moves = chooses and any(rung.moved_bytes for rung in rungs)
    prices = f" {'again':>8}" + f" {'GiB moved':>10} {'waits s':>8}" * moves + f" {'extra s':>8}"
    yield f"  {'':{width}} {head}  fullest in" + prices * chooses
    for rung in rungs:
        values = [rung.split.get(part, 0) for part in parts]
        numbers = [*values, *[rung.needed - sum(rung.split.values())] * on_card, rung.needed]
        row = " ".join(f"{in_gib(number):>13}" for number in numbers)
        moved = f" {in_gib(rung.moved_bytes):>10} {rung.waits_s:>8.2f}" * moves
        price = f" {rung.again_share:>8.1%}{moved} {rung.extra_s:>8.2f}"
        choice = f"{price}  {'fits' if rung.fits else 'too much'}" if chooses else ""
        yield f"  {_short_way(rung):{width}} {row}  {rung.phase:10}{choice}".rstrip()


def _short_way(rung: RungReport) -> str:
    text = f"{rung.label}, {rung.recomputed} recomputed"
    return f"{text}, offloaded" if rung.offloads else f"{text}, {rung.moved} moved" if rung.moved else text
