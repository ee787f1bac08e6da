"""Measures one way to train: real model, strategy and optimizer, synthetic batches of the largest bucket."""

import gc
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.config.schema import Config
from trainer.data.buckets import Bucket, make_buckets
from trainer.data.loader import Batch
from trainer.data.mixture import Mixture
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import OutOfMemory
from trainer.measure.bench_report import BenchRow
from trainer.measure.card_peak import card_peak
from trainer.measure.phases import PhaseClock, exposed_s
from trainer.memory.planned_run import PlannedRun
from trainer.memory.run_choice import MemoryChoice, choose_memory, is_out_of_memory, smallest_card
from trainer.memory.run_plan import Setting, fullness, memory_plan
from trainer.model.compiled import compilations
from trainer.model.latents import encoded_batches
from trainer.model.text import TOKENS_PER_CHUNK, text_positions
from trainer.model_files.run_model import RunModel
from trainer.optim.precision import precision_of, require_arithmetic
from trainer.parallel.comm import Comm, barrier, gather_objects, sum_floats
from trainer.parallel.strategy import Strategy
from trainer.train.arithmetic import arithmetic_of, batch_factors
from trainer.train.build import Run, build_parts, worker_setting
from trainer.train.loop import open_training_loader
from trainer.train.memory_inputs import planned_run
from trainer.train.placement import starting_state
from trainer.train.saved.averages import follow
from trainer.train.step import StepParts, train_step

_log = logging.getLogger(__name__)
_PROFILED_STEPS = 2
_POSITIONS = TOKENS_PER_CHUNK + 2


@dataclass(frozen=True)
class SyntheticData:
    """Stands in for a prepared data set: its largest bucket, as if it held one image."""

    bucket: Bucket
    scaling_factor: float
    text_shape: tuple[int, int, int] | None
    holds_images: bool
    chunks: int
    words: int
    has_masks: bool = False

    def buckets(self, split: str) -> list[Bucket]:
        """The one bucket."""
        return [self.bucket]

    def rows_per_bucket(self, split: str) -> list[int]:
        """One row."""
        return [1]


@dataclass(frozen=True)
class TimedStrategy(Strategy):
    """A strategy that marks the parts of a step on a clock.

    Attributes:
        exchanges: as always; if not (`ddp` alone), gradients stay with their worker, to see what the exchange costs.
    """

    clock: PhaseClock = field(kw_only=True)
    exchanges: bool = True

    @staticmethod
    def of(strategy: Strategy, clock: PhaseClock) -> "TimedStrategy":
        """The same strategy, timed."""
        return TimedStrategy(**{f.name: getattr(strategy, f.name) for f in fields(strategy)}, clock=clock)

    @contextmanager
    def reduction(self, *, last: bool) -> Iterator[None]:
        """As in `Strategy`; what follows the last pass is the optimizer's."""
        with super().reduction(last=last and self.exchanges):
            yield
        self.clock.mark("optimizer" if last else "forward")

    def backward(self, loss: Tensor) -> None:
        """As in `Strategy`."""
        self.clock.mark("backward")
        super().backward(loss)


def bench(config: Config, model: RunModel, comm: Comm, steps: int, warmup: int, prepared: bool, result: Path) -> None:
    """Measure, and let rank 0 write the row to `result`.

    Args:
        steps, warmup: optimizer steps that count, and before them.
        prepared: the data are there: the wait for the real loader is measured as well.
    """
    data = synthetic_data(config, model, prepared)
    way = build_way(config, model, comm, data)
    row = measured_row(config, way.parts, data, steps, warmup)
    if prepared:
        wait_s = _loader_wait_s(config, model, way.parts, PreparedSet.open(config.data.prepared), steps, warmup)
        row = replace(row, split={**(row.split or {}), "data": wait_s})
    if comm.rank == 0:
        row = with_plan(way.planned, way.setting, way.choice, row)
        result.write_text(json.dumps(asdict(row)), encoding="utf-8")


class Way(NamedTuple):
    """A way to train that is ready to be measured, with what its memory plan was made of."""

    parts: StepParts
    planned: PlannedRun
    setting: Setting
    choice: MemoryChoice


def build_way(config: Config, model: RunModel, comm: Comm, data: SyntheticData) -> Way:
    """Plan, build and try out, as training does."""
    begin = time.perf_counter()
    require_arithmetic(config.train.precision, comm.device)
    planned, setting = planned_run(config, model), worker_setting(config, comm, data, smallest_card(comm))
    choice = choose_memory(planned, comm, setting)
    parts = build_parts(config, model, comm, data, choice)
    _log.info("built in %.0f s", time.perf_counter() - begin)
    return Way(parts, planned, setting, choice)


def measured_row(config: Config, parts: StepParts, data: SyntheticData, steps: int, warmup: int) -> BenchRow:
    """Speed, split of a step and memory of parts that are built; all workers must ask. The weights move.

    Raises:
        OutOfMemory: a step did not fit.
    """
    row, comm = timed_row(config, parts, data, steps, warmup), parts.comm
    peak = card_peak(comm.device, precision_of(config.train.precision).compute)
    return replace(row, peak_flops=_mean(comm, peak.flops_per_s), peak_source=peak.source, compilations=compilations())


def timed_row(
    config: Config, parts: StepParts, data: SyntheticData, steps: int, warmup: int, *, finds_exposed: bool = True
) -> BenchRow:
    """As `measured_row`, without the card's peak and, unless `finds_exposed`, without what communication costs."""
    parts = replace(parts, strategy=TimedStrategy.of(parts.strategy, PhaseClock(parts.comm.device)))
    with out_of_memory_told():
        return _measured(config, parts, data, steps, warmup, finds_exposed)


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Around steps that were planned.

    Raises:
        OutOfMemory: one did not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("a step did not fit, though it was planned to") from error


def synthetic_data(config: Config, model: RunModel, prepared: bool) -> SyntheticData:
    """The largest bucket of the data, if they are prepared; else of those that the configuration allows."""
    rules = config.data.buckets
    if prepared:
        buckets = PreparedSet.open(config.data.prepared).buckets("train")
    else:
        buckets = make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)
    largest = max(zip(buckets, batch_factors(config, buckets), strict=True), key=fullness)[0]
    unet = model.config("unet")
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    positions = text_positions(config.captions.max_tokens // TOKENS_PER_CHUNK, config.captions.chunks)
    return SyntheticData(
        bucket=largest,
        scaling_factor=model.config("vae")["scaling_factor"],
        text_shape=(positions, unet["cross_attention_dim"], pooled) if config.data.cache_text else None,
        holds_images=config.data.mode == "images",
        chunks=config.captions.max_tokens // TOKENS_PER_CHUNK,
        words=min(model.config(name)["vocab_size"] for name in ("text_encoder", "text_encoder_2")),
        has_masks=config.objective.loss.masked,
    )


def synthetic_batch(data: SyntheticData, channels: int, images: int, seed: int, pin_memory: bool = False) -> Batch:
    """Random latents, or pixels, and texts of the full length.

    Args:
        pin_memory: in page-locked memory, as the loader's batches are on CUDA, so that copies wait for nothing there.
    """
    draw = torch.Generator().manual_seed(seed)
    height, width, text = data.bucket.height_px, data.bucket.width_px, data.text_shape
    latents = pixels = vae_seeds = None
    if data.holds_images:
        pixels = torch.randint(256, (images, 3, height, width), generator=draw, dtype=torch.uint8)
        vae_seeds = torch.randint(2**62, (images,), generator=draw)
    else:
        latents = torch.randn(images, channels, height // 8, width // 8, generator=draw).half()
    batch = Batch(
        latents=latents,
        pixels=pixels,
        vae_seeds=vae_seeds,
        input_ids=None if text else torch.randint(data.words, (images, 2, data.chunks, _POSITIONS), generator=draw),
        text_hidden=torch.randn(images, *text[:2], generator=draw).half() if text else None,
        pooled=torch.randn(images, text[2], generator=draw).half() if text else None,
        time_ids=torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(images, 1),
        weights=torch.ones(images),
        draw_seeds=torch.randint(2**62, (images,), generator=draw),
        keys=("",) * images,
        problems=(),
        masks=torch.randint(256, (images, height // 8, width // 8), generator=draw, dtype=torch.uint8)
        if data.has_masks
        else None,
        loss_weights=torch.ones(images),
    )
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    return replace(batch, **{name: tensor.pin_memory() for name, tensor in tensors.items()}) if pin_memory else batch


def _measured(
    config: Config, parts: StepParts, data: SyntheticData, steps: int, warmup: int, finds_exposed: bool
) -> BenchRow:
    """Speed, phases, exposed communication and memory."""
    comm, strategy = parts.comm, parts.strategy
    assert isinstance(strategy, TimedStrategy)
    clock, arithmetic = strategy.clock, arithmetic_of(config, comm.world, [data.bucket], [1])
    passes, factor = arithmetic.accumulation, arithmetic.batch_factors[0]
    images = config.train.batch_size_per_gpu * factor
    channels = parts.denoiser.unet.config["in_channels"]
    seeds, pin = [number * comm.world + comm.rank for number in range(passes)], comm.device.type == "cuda"
    batches = [synthetic_batch(data, channels, images, seed, pin) for seed in seeds]
    images_per_step = images * passes * comm.world
    norms: list[float] = []
    first_step = parts.averages.step if parts.averages else 0

    def run(parts: StepParts, count: int, what: str) -> float:
        """Seconds a step."""
        barrier(comm)
        wait_for(comm.device)
        clock.clear()
        gc.collect()
        begin = time.perf_counter()
        for _ in tqdm(range(count), desc=f"  {what}", disable=None if comm.rank == 0 else True, leave=False):
            clock.mark("forward")
            encoded = encoded_batches(parts.denoiser.image_encoder, batches)
            parts.strategy.begin_exchange(config.exchange.plain_steps + first_step + len(norms), 1.0)
            result = train_step(parts, encoded, passes, float(images_per_step), 1.0, False)
            norms.append(result.grad_norm)
            follow(parts, first_step + len(norms), result)
            clock.mark(None)
        wait_for(comm.device)
        return (time.perf_counter() - begin) / count

    _log.info("warm-up: %.2f s a step, the first ones included", run(parts, warmup, "warm-up"))
    if comm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(comm.device)
    step_s = _mean(comm, run(parts, steps, "measuring"))
    split = {
        phase: _mean(comm, clock.seconds().get(phase, 0.0) / steps) for phase in ("forward", "backward", "optimizer")
    }
    measured, reserved = _card_memory(comm)
    exposed, how = _exposed(parts, run, step_s, steps) if finds_exposed else (None, "not asked for")
    finite = all(torch.tensor(norms).isfinite())
    return BenchRow(
        strategy=strategy.sharing.kind,
        batch_size=config.train.batch_size_per_gpu,
        compiled=config.train.compile == "blocks",
        workers=comm.world,
        accumulation=passes,
        bucket=(data.bucket.height_px, data.bucket.width_px),
        images_per_s=images_per_step / step_s,
        step_s=step_s,
        split=split,
        exposed_s=exposed,
        exposed_how=how,
        measured_bytes=measured,
        reserved_bytes=reserved,
        bucket_mib=strategy.sharing.bucket_mib,
        rss_bytes=max(gather_objects(comm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)),
        notes=() if finite else ("some gradients were not finite; such a step leaves out AdamW",),
    )


def _exposed(
    parts: StepParts, run: Callable[[StepParts, int, str], float], step_s: float, steps: int
) -> tuple[float | None, str]:
    """Seconds of a step in which communication was hidden by nothing, mean over the workers, and how it was found."""
    comm, strategy = parts.comm, parts.strategy
    assert isinstance(strategy, TimedStrategy)
    if comm.world == 1:
        return 0.0, "one worker has nobody to talk to"
    if comm.device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run(parts, _PROFILED_STEPS, "profiling")
        alone_s = exposed_s(profile.events() or []) / _PROFILED_STEPS
        return _mean(comm, alone_s), "time in which no kernel but NCCL's ran, waiting for slower workers included"
    if strategy.sharing.kind == "ddp":
        # Weights drift apart here, so it comes last.
        silent = replace(parts, strategy=replace(strategy, exchanges=False, outer=None))
        silent_s = _mean(comm, run(silent, steps, "without exchange"))
        return max(0.0, step_s - silent_s), "on the CPU, ddp: the difference to steps that exchange no gradients"
    return None, "on the CPU, zero2 and zero3: not measured, for without exchange there are no weights to compute with"


def _loader_wait_s(
    config: Config, model: RunModel, parts: StepParts, prepared: PreparedSet, steps: int, warmup: int
) -> float:
    """Seconds that a real step waits for its batch, mean over the workers."""
    comm, buckets = parts.comm, prepared.buckets("train")
    arithmetic = arithmetic_of(config, comm.world, buckets, prepared.rows_per_bucket("train"))
    run = Run(parts, None, prepared, Mixture.of(prepared, config.run.seed), {})
    state = starting_state(config, run, arithmetic.images_per_step)
    waited_before = 0.0
    with open_training_loader(config, model, comm, run, state, arithmetic.accumulation) as loader:
        for step in range(warmup + steps):
            if step == warmup:
                waited_before = loader.wait_s
            batches = next(loader)
            encoded = encoded_batches(parts.denoiser.image_encoder, batches.batches)
            train_step(parts, encoded, arithmetic.accumulation, batches.weight, 1.0, False)
        return _mean(comm, (loader.wait_s - waited_before) / steps)


def with_plan(run: PlannedRun, setting: Setting, choice: MemoryChoice, row: BenchRow) -> BenchRow:
    """What the plan says of this run: operations and memory; and what was chosen."""
    plan = memory_plan(run, setting)
    forward, backward, again = plan.flops_per_image
    on_card, notes, planned = setting.kernels == "cuda", row.notes, None
    if not on_card:
        notes = (*notes, "RSS is a whole process on the host, libraries included; a plan counts tensors alone")
    elif plan.chosen and choice.needed == plan.chosen.needed:
        planned = sum(plan.chosen.split.values())
    else:
        notes = (*notes, f"{row.label}: what was planned first did not fit, and it was tried again with less")
    return replace(
        row,
        flops_per_image=(forward + backward, again),
        planned_bytes=planned,
        recomputed=f"{len(choice.recompute)} of {plan.num_blocks}{_moved(choice)}",
        notes=notes,
    )


def _moved(choice: MemoryChoice) -> str:
    return ", offloaded" if choice.offloads else f", {len(choice.moved)} moved" if choice.moved else ""


def _card_memory(comm: Comm) -> tuple[int | None, int | None]:
    """Most bytes of tensors, and of memory that the allocator took for them, over the workers."""
    if comm.device.type != "cuda":
        return None, None
    measured, reserved = torch.cuda.max_memory_allocated(comm.device), torch.cuda.max_memory_reserved(comm.device)
    found = gather_objects(comm, [measured, reserved])
    return max(pair[0] for pair in found), max(pair[1] for pair in found)


def _mean(comm: Comm, value: float) -> float:
    return sum_floats(comm, [value])[0] / comm.world


def wait_for(device: torch.device) -> None:
    """Until a card has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
