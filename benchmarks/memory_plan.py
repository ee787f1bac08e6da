"""Planned against measured peak memory: real training of UNets of 16M to 654M weights on the CPU.

    python benchmarks/memory_plan.py [--models tiny,m100] [--workers 1,4] [--alone] [--adapters | --moved]

Each row trains for real (gloo between the workers); the measured peak is PyTorch's own count of what it allocates,
in an optimizer step in steady state. The planned one comes from a pass over the same model without memory
(`trainer.memory.trace`). Takes an hour on 2 cores; a few minutes for `tiny` alone. With `--alone`, worker 0 of
four trains without the others and its messages go nowhere: the same memory, but for the copies that gloo makes. With
`--adapters`, a LoRA of rank 16 trains beside frozen weights, in place of the other rows; with `--moved`, activations of
some blocks wait in the host's memory, which PyTorch does not count.
"""

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.sections.exchange_config import ExchangeConfig
from trainer.memory.choice import spread
from trainer.memory.holdings import Holding, Peak
from trainer.memory.hosted_holding import with_state_in_host, with_weights_in_host
from trainer.memory.strategy_peak import parameter_sizes, strategy_peak
from trainer.memory.trace import trace_pass
from trainer.model.denoiser import TrainedModel
from trainer.model.recompute import apply_recompute, gathered_units, release_blocks, repeated_blocks
from trainer.optim.hosted.hosted_activations import HostedActivations
from trainer.optim.hosted.hosted_weights import HostedWeights
from trainer.parallel.comm import Comm
from trainer.parallel.sharding import local_tensor
from trainer.parallel.strategy import Sharing, StrategyKind, bucket_bytes, make_strategy, warm_up
from trainer.parallel.worker import end_process
from trainer.train.release import GradientRelease
from trainer.wire.gradient_exchange import with_exchange
from trainer.wire.outer_average import with_average

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_POSITIONS, POOLED_WIDTH = 77, 80
GLOO_RELEASE_S = 0.003
AVERAGED = "averages of weights"
METHODS = (
    "bf16",
    "int8",
    "int4",
    "powersgd",
    AVERAGED,
)  # whose memory does not hang on the group being whole, see `--alone`


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    kind: StrategyKind
    workers: int
    accumulation: int
    recompute: bool
    exchange_every_pass: bool = False
    weights: str = "fp32"
    compute: str = "fp32"
    batch: int = 2
    side_px: int = 256
    release: bool = False
    hosts_state: bool = False
    hosts_weights: bool = False
    exchange: str = "plain"
    adapter: str = ""
    within: int | None = None  # workers over which it is spread
    moves: int = 0  # blocks whose activations wait in the host's memory; `recompute` is of the others

    @property
    def gradients(self) -> ExchangeConfig:
        """How they travel, or weights in their place."""
        if self.exchange == AVERAGED:
            return ExchangeConfig(average_every=2)  # so that there is an average in the second step
        return ExchangeConfig.model_validate({"method": self.exchange})


def unet_config(model: str) -> dict[str, Any]:
    """SDXL's topology in other widths; depths of the transformers as in SDXL or fewer."""
    widths, depths, text_width = {
        "mini": ((32, 64, 96), (1, 1, 2), 160),  # for the tests
        "tiny": ((32, 64, 96), (1, 2, 10), 160),
        "m100": ((128, 256, 320), (1, 2, 10), 512),
        "m250": ((128, 256, 576), (1, 2, 8), 768),
        "m600": ((192, 384, 704), (1, 2, 8), 1024),
    }[model]
    return {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": widths,
        "transformer_layers_per_block": list(depths),
        "attention_head_dim": [width // (32 if widths[0] == 32 else 64) for width in widths],
        "cross_attention_dim": text_width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + POOLED_WIDTH,
    }


def make_model(
    case: Case,
    dtype: torch.dtype,
    before_recompute: Callable[[TrainedModel], None] = lambda _: None,
    device: str = "meta",
) -> TrainedModel:
    """The model on "meta", its weights in `dtype`; below an adapter, they have the dtype that is computed in.

    Args:
        device: on which it will compute.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        model = TrainedModel(UNet2DConditionModel(**unet_config(case.model)).train())
    model.to(DTYPES[case.compute] if case.adapter else dtype)
    if case.adapter:
        _add_adapter(model, case.adapter)
    before_recompute(model)
    blocks = repeated_blocks(model)
    moved = spread([*blocks], case.moves)
    if case.recompute:
        apply_recompute(model, blocks.keys() - {*moved})
    HostedActivations(blocks, moved, torch.device(device))
    return model


def _add_adapter(model: TrainedModel, kind: str) -> None:
    from trainer.adapters.inject import inject
    from trainer.adapters.targets import find_targets
    from trainer.config.sections.adapter_config import AdapterConfig

    config = AdapterConfig.model_validate({"kind": kind})
    model.requires_grad_(False)
    inject(model.unet, find_targets({"unet": model.unet}, config, {}, frozenset()), config)


def make_loss(case: Case, model: nn.Module, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """A pass over one micro-batch."""
    size, text_width = case.side_px // 8, unet_config(case.model)["cross_attention_dim"]

    def loss() -> Tensor:
        latents = torch.zeros(case.batch, 4, size, size, dtype=dtype, device=device)
        prediction = model(
            latents,
            torch.zeros(case.batch, dtype=torch.int64, device=device),
            torch.zeros(case.batch, 6, device=device),
            text_hidden=torch.zeros(case.batch, TEXT_POSITIONS, text_width, dtype=dtype, device=device),
            text_pooled=torch.zeros(case.batch, POOLED_WIDTH, dtype=dtype, device=device),
        )
        return F.mse_loss(prediction.float(), latents.float())

    return loss


def input_dtype(case: Case) -> torch.dtype:
    """Spread weights are gathered in the dtype that is computed in; others are cast by autocast, as adapters are."""
    return DTYPES[case.compute if case.kind in ("zero2", "zero3") and not case.adapter else case.weights]


def plan(case: Case) -> Peak:
    """The peak of `case` from a pass without memory."""
    dtype = input_dtype(case)
    model = make_model(case, dtype)
    autocast = DTYPES[case.compute] if dtype != DTYPES[case.compute] else None
    trace = trace_pass(model, make_loss(case, model, dtype, "meta"), gathered_units(model), "cpu", autocast)
    size = DTYPES[case.weights].itemsize
    holding = Holding(
        strategy=case.kind,
        world=case.workers,
        stored_bytes=size,
        base_bytes=DTYPES[case.compute].itemsize if case.adapter else None,
        compute_bytes=dtype.itemsize,
        reduce_bytes=dtype.itemsize,
        optimizer_bytes=2 * size,
        accumulation=case.accumulation,
        reduce_each_pass=case.exchange_every_pass,
        released_with=release_blocks(trace.trains, {*trace.unit_of.values()}) if case.release else {},
        exchange=case.gradients,
        bucket_bytes=bucket_bytes(size * sum(math.prod(trace.shapes[name]) for name in trace.trains)),
        replicas=case.workers // (case.within or case.workers),
    )
    if case.hosts_state:
        state = {name: 2 * size * math.prod(trace.shapes[name]) for name in trace.trains}
        holding = with_state_in_host(holding, state)
    if case.hosts_weights:
        hosted = repeated_blocks(model).keys()
        holding = with_weights_in_host(holding, parameter_sizes(trace), trace.unit_of, hosted)
    return strategy_peak(trace, holding)


def measure(case: Case, rank: int) -> int:
    """The peak of `case` as this worker trains it: its second optimizer step."""
    return measured_peak(lambda: _prepared(case, Comm(rank, case.workers, rank, torch.device("cpu"))), rank)


def measured_peak(make_step: Callable[[], Callable[[], None]], rank: int = 0) -> int:
    """Most bytes of tensors in the second step of what `make_step` makes ready; 0 on all ranks but the first."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    if rank == 0:  # from the beginning, for only what is allocated under its eyes is counted
        profiler.start()
    step = make_step()
    step()
    with torch.profiler.record_function("second step"):
        step()
    del step
    gc.collect()
    if rank != 0:
        return 0
    profiler.stop()
    results: Any = profiler.profiler
    events, totals, begin = list(results.kineto_results.experimental_event_tree()), [], 0
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            totals.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
        elif event.name == "second step":
            begin = event.start_time_ns
    # PyTorch's count goes on from what another measurement of this process left, and may have freed unseen since.
    _, first_total, first_size = min(totals)
    return max(total for time, total, _ in totals if time >= begin) - (first_total - first_size)


def _prepared(case: Case, comm: Comm) -> Callable[[], None]:
    """An optimizer step of a model that is ready to train."""
    dtype = input_dtype(case)
    mixed = dtype if case.weights != case.compute and dtype != DTYPES[case.weights] else None
    alone = case.gradients.averages_weights
    sharing = Sharing(case.kind, mixed, mixed, case.exchange_every_pass, case.accumulation, alone, case.within)
    weights = list[HostedWeights]()

    def host(model: TrainedModel) -> None:
        if case.hosts_weights:
            weights.append(HostedWeights(repeated_blocks(model), comm.device))

    model = make_model(case, DTYPES[case.weights], host, comm.device.type)
    hosted, elsewhere = (weights[0], weights[0].parameters) if weights else (None, ())
    strategy = make_strategy(model, sharing, gathered_units(model).values(), (), comm, _fill, elsewhere=elsewhere)
    strategy = (with_average if alone else with_exchange)(case.gradients, strategy, comm, seed=0)
    steps = itertools.count()
    # Workers but the first only keep it company: their optimizer's memory is another's.
    optimizer = torch.optim.AdamW(strategy.parameters.values(), lr=1e-5, fused=True) if comm.rank == 0 else None
    release = None
    if case.release and optimizer is not None:
        optimizer.param_groups[0] |= {"peak_lr": 1e-5, "name": "unet"}
        blocks = release_blocks(strategy.parameters, gathered_units(model))
        release = GradientRelease(
            strategy.parameters, blocks, optimizer, 1.0, hosts_state=case.hosts_state, weights=hosted
        )
    loss = make_loss(case, strategy.model, dtype, "cpu")
    autocast = torch.autocast("cpu", DTYPES[case.compute], enabled=dtype != DTYPES[case.compute])

    def step() -> None:
        strategy.begin_exchange(next(steps), 1.0)
        if release:
            release.begin(1.0, 1.0)
        for index in range(case.accumulation):
            with strategy.reduction(last=index == case.accumulation - 1):
                with autocast:
                    value = loss()
                strategy.backward(value)
        if release:
            release.finish(comm.device, None)
        elif optimizer is not None:
            optimizer.step()
        strategy.end_step(took_effect=True)

    with autocast:
        warm_up(strategy, lambda _: loss())
    return step


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    for parameter in model.parameters():
        local_tensor(parameter).fill_(0.01)


def cases(models: Sequence[str], worker_counts: Sequence[int]) -> list[Case]:
    """Every row."""
    found = []
    for model, workers in itertools.product(models, worker_counts):
        # Half of it, for four workers of 654M weights have little room in 24 GB of RAM.
        weights = "bf16" if model == "m600" else "fp32"
        kinds: list[StrategyKind] = ["single"] if workers == 1 else ["ddp", "zero2"]
        for kind, accumulation, recompute in itertools.product(kinds, (1, 4), (False, True)):
            each = (False, True) if kind == "zero2" and accumulation > 1 else (False,)
            found += [Case(model, kind, workers, accumulation, recompute, e, weights, weights) for e in each]
        kinds = ["single"] if workers == 1 else ["zero2"]
        if workers > 1:
            found += [Case(model, "ddp", workers, 1, False, False, weights, weights, exchange=m) for m in METHODS]
        if model != "m600":
            found += [Case(model, kind, workers, 1, False, compute="bf16") for kind in kinds]
    return found


def adapter_cases(models: Sequence[str], worker_counts: Sequence[int]) -> list[Case]:
    """Every row of `--adapters`."""
    found = []
    for model, workers in itertools.product(models, worker_counts):
        kinds: list[StrategyKind] = ["single"] if workers == 1 else ["ddp", "zero2", "zero3"]
        for kind, recompute, compute in itertools.product(kinds, (False, True), ("fp32", "bf16")):
            found.append(Case(model, kind, workers, 1, recompute, compute=compute, adapter="lora"))
    return found


def moved_cases(models: Sequence[str], worker_counts: Sequence[int]) -> list[Case]:
    """Every row of `--moved`: a few blocks' activations, or those of all, and the others' kept or recomputed."""
    found = []
    for model, workers in itertools.product(models, worker_counts):
        kinds: list[StrategyKind] = ["single"] if workers == 1 else ["ddp", "zero2", "zero3"]
        for kind, (moves, recompute) in itertools.product(kinds, ((8, False), (8, True), (24, False))):
            compute = "fp32" if kind == "ddp" else "bf16"
            found.append(Case(model, kind, workers, 1, recompute, compute=compute, moves=moves, side_px=512))
        found.append(Case(model, kinds[0], workers, 2, True, moves=8, side_px=512))
    return found


def measure_all(group: Sequence[Case], alone: bool) -> Iterator[int]:
    """Measured peaks of cases with one number of workers, trained one after the other by the same processes."""
    workers = group[0].workers
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cases", json.dumps([asdict(case) for case in group])]
        processes = []
        for rank in range(1 if alone else workers):
            store = "" if alone else f"{folder}/store"
            env = {**os.environ, "RANK": str(rank), "MEMORY_PLAN_STORE": store}
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            error = None if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=error, text=True))
        assert processes[0].stdout is not None
        with processes[0].stdout as lines:
            yield from (int(line) for line in lines if line.strip().isdigit())
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"workers ended with {codes}")


def run_cases(group: Sequence[Case]) -> None:
    """What one worker does."""
    torch.set_num_threads(1)
    _let_gloo_finish()
    rank, workers = int(os.environ["RANK"]), group[0].workers
    if workers > 1:
        if file := os.environ["MEMORY_PLAN_STORE"]:
            store = dist.FileStore(file, workers)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
        elif group[0].kind == "ddp":  # holds the same, however many take part
            dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        else:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=workers)
    for case in group:
        print(measure(case, rank), flush=True)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()
        end_process()


def _let_gloo_finish() -> None:
    """After each message, wait until gloo's thread has let go of its tensors as well.

    The profiler does not see what another thread frees: the last holder of a tensor has to be this one.
    """
    wait = dist.Work.wait

    def wait_longer(work: dist.Work, *arguments: Any) -> bool:
        done = wait(work, *arguments)
        time.sleep(GLOO_RELEASE_S)
        return done

    dist.Work.wait = wait_longer


def row(case: Case, measured: int) -> tuple[str, float]:
    """A row of the table, and by how much the plan is off (0.01: one percent too high)."""
    planned = plan(case)
    error = planned.total / measured - 1
    name = case.kind + (", gradients in each pass" if case.exchange_every_pass else "")
    name += f", {case.exchange}" * (case.exchange != "plain")
    model = f"{case.model}, {case.adapter}" if case.adapter else case.model
    numbers = f"{planned.total / 2**20:,.1f} | {measured / 2**20:,.1f} | {error:+.2%}"
    kept = ("recomputed" if case.recompute else "kept") + f", {case.moves} moved" * bool(case.moves)
    text = f"| {model} | {case.weights}/{case.compute} | {name} | {case.workers} | {case.accumulation} | {kept} |"
    return f"{text} {numbers} |", error


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny,m100,m250,m600")
    parser.add_argument("--workers", default="1,4")
    parser.add_argument("--alone", action="store_true", help="worker 0 alone")
    parser.add_argument("--adapters", action="store_true", help="a LoRA beside frozen weights")
    parser.add_argument("--moved", action="store_true", help="activations of some blocks in the host's memory")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases:
        run_cases([Case(**fields) for fields in json.loads(arguments.cases)])
        return
    print("| UNet | weights/compute | strategy | workers | passes | activations | planned MiB | measured MiB | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    make_cases = moved_cases if arguments.moved else adapter_cases if arguments.adapters else cases
    rows = make_cases(arguments.models.split(","), [int(count) for count in arguments.workers.split(",")])
    worst = 0.0
    for _, group in itertools.groupby(rows, key=lambda case: (case.model, case.workers, case.kind)):
        members = list(group)
        for case, measured in zip(members, measure_all(members, arguments.alone), strict=True):
            text, error = row(case, measured)
            print(text, flush=True)
            worst = max(worst, abs(error))
    print(f"\nlargest error: {worst:.2%} of {len(rows)} rows")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
