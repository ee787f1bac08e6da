"""What a borrowed card can prove in minutes: full-size steps, their memory and waits; a child of benchmarks/gpu.py.

    python -m benchmarks.gpu_proof --unet CONFIG --everything CONFIG --seconds 400 [--dry] [--only TASK ...]

Prints a line of JSON when a task begins, and one for each row as soon as it is there. Tasks come in the order of what
they are worth, and those that need the same weights together; none begins that by its forecast would end too late.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from benchmarks.gpu_rows import NOT_MEASURED, failure, told
from trainer.checkpoint.saver import Folder, Saver
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.measure.phases import covered
from trainer.memory.run_choice import MemoryChoice, choose_memory, is_out_of_memory, smallest_card
from trainer.memory.run_plan import Setting
from trainer.model.recompute import apply_recompute, repeated_blocks
from trainer.model_files.run_model import RunModel, open_model
from trainer.optim.hosted.hosted_activations import HostedActivations
from trainer.optim.precision import set_fp32_arithmetic
from trainer.parallel.comm import Comm, keep_group_alive
from trainer.parallel.strategy import StrategyKind
from trainer.train.build import build_parts, worker_setting
from trainer.train.memory_inputs import planned_run
from trainer.train.saved.checkpoint_contents import checkpoint_files
from trainer.train.step import StepParts, batch_losses, train_step
from trainer.train.workers.bench_worker import SyntheticData, measured_row, synthetic_batch, synthetic_data, with_plan

Rows = Iterator[tuple[str, str]]
_WARMUP = 2


@dataclass(frozen=True)
class Built:
    """A run at 1024 px whose weights are on the card."""

    config: Config
    model: RunModel
    data: SyntheticData
    parts: StepParts
    choice: MemoryChoice


class Bench:
    """Builds runs for the tasks, and keeps the last one, so that the next task may find its weights there."""

    def __init__(self, unet: Path, everything: Path, dry: bool) -> None:
        self.dry, self.steps = dry, 2 if dry else 6
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.comm = Comm(rank=0, world=1, local_rank=0, device=device)
        self.paths = {"UNet": unet, "UNet and text encoders": everything}
        self._kept: tuple[object, Built] | None = None

    def built(self, what: str, *overrides: str, kind: StrategyKind = "single") -> Built:
        """The run as it was built for the task before, or anew."""
        wanted = what, overrides, kind
        if self._kept is None or self._kept[0] != wanted:
            self.let_go()
            self._kept = wanted, self._build(load_config(self.paths[what], overrides), kind)
        return self._kept[1]

    def let_go(self) -> None:
        """Give the card's memory back."""
        self._kept = None
        gc.collect()
        if self.comm.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)

    def _build(self, config: Config, kind: StrategyKind) -> Built:
        set_fp32_arithmetic(config.train.precision)
        model = open_model(config.model.path, config.model.vae, config.model.tokenizer)
        data = synthetic_data(config, model, False)
        choice = choose_memory(planned_run(config, model), self.comm, self._setting(config, data))
        choice = replace(choice, kind=kind)
        return Built(config, model, data, build_parts(config, model, self.comm, data, choice), choice)

    def with_batch(self, built: Built, images: int) -> Built:
        """The same weights and optimizer, planned for another batch."""
        train = built.config.train.model_copy(update={"batch_size_per_gpu": images})
        config = built.config.model_copy(update={"train": train})
        setting = self._setting(config, built.data)
        choice = choose_memory(planned_run(config, built.model), self.comm, setting)
        network = built.parts.denoiser.model
        for block in repeated_blocks(network).values():
            vars(block).pop("forward", None)  # what the lines below have put there
        apply_recompute(network, choice.recompute)
        HostedActivations(repeated_blocks(network), choice.moved, self.comm.device)
        parts = replace(built.parts, around_forward=choice.around_forward(network))
        return replace(built, config=config, choice=choice, parts=parts)

    def row(self, built: Built) -> str:
        """Speed, split of a step, MFU, planned against measured peak; or that it did not fit."""
        run = planned_run(built.config, built.model)
        try:
            row = measured_row(built.config, built.parts, built.data, self.steps, _WARMUP)
        except RuntimeError as error:
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):
                raise
            return "ran out of the card's memory, though it was planned to fit"
        row = with_plan(run, self._setting(built.config, built.data), built.choice, row)
        return told(asdict(row) | {"mfu": row.mfu}, built.config.train.precision)

    def _setting(self, config: Config, data: SyntheticData) -> Setting:
        return worker_setting(config, self.comm, data, smallest_card(self.comm))


def agreement(bench: Bench) -> Rows:
    """Loss, gradients and three optimizer steps of the tiny model on this device against the CPU's in fp32."""
    alone = replace(bench.comm, device=torch.device("cpu"))
    expected = _steps_of_tiny(bench, alone, "fp32")
    for precision in ("fp32", "bf16"):
        found = _steps_of_tiny(bench, bench.comm, precision)
        usual = _steps_of_tiny(bench, alone, precision)
        names = ("loss", "gradients", "losses of 3 steps", "weights after them")
        pairs = [
            f"{name} {_distance(f, e):.1e} (the CPU's own {_distance(u, e):.1e})"
            for name, f, u, e in zip(names, found, usual, expected, strict=True)
        ]
        yield f"tiny model in {precision} against fp32 on the CPU, relative L2", ", ".join(pairs)
        limit = 1e-4 if precision == "fp32" else 3 * _distance(usual[1], expected[1])
        if _distance(found[1], expected[1]) > limit:
            raise ValueError(f"{precision}: gradients are further from the CPU's than {limit:.1e}")


def _steps_of_tiny(bench: Bench, comm: Comm, precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First loss, first gradients, losses of three steps, and what those changed; float64 on the CPU."""
    config = load_config(
        bench.paths["UNet"], [f"train.precision={precision}", "optimizer.lr=1e-3", "optimizer.kind=adamw"]
    )
    set_fp32_arithmetic(precision)
    model = open_model(config.model.path, None, config.model.tokenizer)
    data = synthetic_data(config, model, False)
    parts = build_parts(config, model, comm, data, MemoryChoice("single"))
    batch = synthetic_batch(data, 4, 2, seed=0, pin_memory=comm.device.type == "cuda")

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])

    weights = list(parts.strategy.parameters.values())
    before = flat(weights)
    losses, _ = batch_losses(parts, batch, 0, 2.0)
    losses.mean().backward()
    gradients = flat([weight.grad for weight in weights if weight.grad is not None])
    parts.strategy.clear_gradients()
    taken = [train_step(parts, [batch], 1, 2.0, 1.0, False).loss for _ in range(3)]
    return flat([losses]), gradients, torch.tensor(taken).double(), flat(weights) - before


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def unet(bench: Bench, images: int) -> Rows:
    """All of the UNet."""
    built = bench.with_batch(bench.built("UNet"), images)
    yield f"proof: UNet, batch {images}, within {built.config.memory.budget}", bench.row(built)


def everything(bench: Bench) -> Rows:
    """The UNet and both text encoders, 225 tokens."""
    built = bench.built("UNet and text encoders")
    yield f"proof: UNet and both text encoders, batch 1, within {built.config.memory.budget}", bench.row(built)


def steady_loop(bench: Bench) -> Rows:
    """How often a step waits for the card, what it copies, and how long the card has nothing to do."""
    built = bench.with_batch(bench.built("UNet"), 1)
    what, on_cuda = "proof: a steady step of the UNet, batch 1", bench.comm.device.type == "cuda"
    batches = [synthetic_batch(built.data, 4, 1, seed, pin_memory=on_cuda) for seed in range(4)]

    def steps() -> None:
        for batch in batches:
            train_step(built.parts, [batch], 1, 1.0, 1.0, False)

    steps()
    if not on_cuda:
        yield what, NOT_MEASURED
        return
    with _sync_warnings() as caught:
        steps()
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught)
    told_places = ", ".join(f"{place} {count / len(batches):g}" for place, count in places.most_common(5))
    yield f"{what}, waits of the host for the card", f"{places.total() / len(batches):g} a step ({told_places})"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        begin = time.perf_counter()
        steps()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - begin
    copies, kernels = [], []
    for event in profile.events() or []:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            span = event.time_range.start / 1e6, event.time_range.end / 1e6
            (copies if "HtoD" in event.name else kernels).append(span)
    idle = 1 - covered([*kernels, *copies]) / wall_s
    alone_s = covered([*kernels, *copies]) - covered(kernels)
    yield f"{what}, card idle", f"{idle:.1%} of {wall_s / len(batches):.3f} s (profiler running)"
    copied = f"{covered(copies) / len(batches) * 1e3:.3f} ms a step, of them {alone_s / len(batches) * 1e3:.3f} ms"
    yield f"{what}, copies to the card", f"{copied} beside which no kernel ran"


@contextmanager
def _sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def variant(bench: Bench, override: str) -> Rows:
    """The UNet at batch 1, built in another way."""
    what = f"proof: UNet, batch 1, {override}"
    if override == "train.compile=blocks" and bench.comm.device.type == "cpu":
        yield what, f"{NOT_MEASURED}, and minutes of a C++ compiler; tests/model/test_compiled.py does it"
    else:
        yield what, bench.row(bench.built("UNet", override))


def fsdp2(bench: Bench) -> Rows:
    """FSDP2's `zero2` over a group of one, against the plain step from the same weights."""
    losses: dict[str, list[float]] = {}
    kinds: tuple[StrategyKind, ...] = ("single", "zero2")
    for kind in kinds:
        bench.let_go()  # the weights of what was built before have moved
        with _group_of_one(bench.comm.device) if kind == "zero2" else nullcontext():
            built = bench.built("UNet", kind=kind)
            batch = synthetic_batch(built.data, 4, 1, 0, pin_memory=bench.comm.device.type == "cuda")
            losses[kind] = [train_step(built.parts, [batch], 1, 1.0, 1.0, False).loss for _ in range(3)]
            row = bench.row(built)
            del built
            bench.let_go()
        largest = max(abs(one - other) for one, other in zip(losses["single"], losses[kind], strict=True))
        yield f"proof: UNet, batch 1, {kind}", f"losses of 3 steps differ by at most {largest:.1e} from single; {row}"


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group(backend, init_method=f"file://{file.name}", rank=0, world_size=1)
        keep_group_alive()
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def save(bench: Bench) -> Rows:
    """A checkpoint of the UNet and its optimizer beside two steps, which wait for the copies alone."""
    built = bench.built("UNet")
    parts, device = built.parts, bench.comm.device
    batch = synthetic_batch(built.data, 4, 1, 0, pin_memory=device.type == "cuda")
    with tempfile.TemporaryDirectory(dir=built.config.run.dir.parent) as folder:
        target = Path(folder) / "step-00000001"
        saver = Saver(0, 1, "proof", device, staging_bytes=None)
        begin = time.perf_counter()
        saver.begin([Folder(target, checkpoint_files(parts), {"step": 1})])
        waited_s = time.perf_counter() - begin

        def before_update() -> None:
            nonlocal waited_s
            begin = time.perf_counter()
            saver.wait_copied()
            waited_s += time.perf_counter() - begin

        for _ in range(2):
            train_step(parts, [batch], 1, 1.0, 1.0, False, before_update=before_update)
        reason = saver.finish(list)
        seconds = time.perf_counter() - begin
        if reason is not None:
            raise reason
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    waits = f"training waits {waited_s:.2f} s"
    yield "proof: saving a checkpoint of the UNet", f"{seconds:.1f} s, {size / 1e9:.2f} GB, {waits}"


@dataclass(frozen=True)
class Task:
    """A part of the proof.

    Attributes:
        forecast_s: what it takes on an H100, its own weights loaded; a slower card is found out as it goes.
    """

    forecast_s: float
    rows: Callable[[Bench], Rows]


TASKS = {
    "agreement": Task(25, agreement),
    "unet-1": Task(60, lambda bench: unet(bench, 1)),
    "unet-2": Task(25, lambda bench: unet(bench, 2)),
    "unet-4": Task(30, lambda bench: unet(bench, 4)),
    "steady-loop": Task(15, steady_loop),
    "save": Task(40, save),
    "everything": Task(70, everything),
    "8bit-compiled": Task(60, lambda bench: variant(bench, "optimizer.compile=true")),
    "8bit-plain": Task(45, lambda bench: variant(bench, "optimizer.compile=false")),
    "channels-last-off": Task(45, lambda bench: variant(bench, "train.channels_last=false")),
    "compile": Task(120, lambda bench: variant(bench, "train.compile=blocks")),
    "fsdp2": Task(80, fsdp2),
}


def main() -> None:
    """Run the tasks that the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", type=Path, required=True, help="configuration of a run that trains the UNet")
    parser.add_argument("--everything", type=Path, required=True, help="... and both text encoders")
    parser.add_argument("--seconds", type=float, required=True, help="that are left")
    parser.add_argument("--dry", action="store_true", help="few steps")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    bench, pace = Bench(arguments.unet, arguments.everything, arguments.dry), Pace()
    for number, name in enumerate(arguments.only):
        forecast_s, left_s = pace.forecast_s(TASKS[name].forecast_s), end - time.monotonic()
        if forecast_s > left_s:
            emit([name, f"left out: it would take about {forecast_s:.0f} s, and {left_s:.0f} s are left"])
            continue
        emit({"begins": name, "forecast_s": forecast_s, "then": arguments.only[number + 1 :]})
        begin = time.monotonic()
        try:
            for row in TASKS[name].rows(bench):
                emit(row)
        except Exception as error:
            bench.let_go()
            emit({"failed": name, "why": failure(error)})
        pace.add(TASKS[name].forecast_s, time.monotonic() - begin)


class Pace:
    """How much longer than on the card of the forecasts things take here."""

    def __init__(self) -> None:
        self._forecast_s = self._took_s = 0.0

    def add(self, forecast_s: float, took_s: float) -> None:
        """A task has ended."""
        self._forecast_s += forecast_s
        self._took_s += took_s

    def forecast_s(self, usual_s: float) -> float:
        """For the next task; never below its forecast by more than half."""
        return usual_s * max(0.5, self._took_s / self._forecast_s if self._forecast_s else 1.0)


def emit(line: object) -> None:
    """To the parent."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
