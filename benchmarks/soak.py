"""A run that meets seeded random faults, and ends with the bits of a run that nothing happened to.

    python benchmarks/soak.py --faults 50 --strategy ddp

Faults come at random moments, of which some lie in the start of the workers and some within a save: SIGKILL of a
worker, of all workers, of the whole command (which is then given again, as a service manager does), SIGSTOP of one,
and a flipped bit in the newest checkpoint before the command is given again. Each is told with the seconds until the
line about it and until the next step. At the end weights, averages and optimizer are compared byte for byte.

    python benchmarks/soak.py --elastic

One hundred steps of four workers against the same with four, then three, then four of them: how far the weights part.

    python benchmarks/soak.py --memory-steps 20000

A run that nothing happens to, of a narrower UNet at 64 px, so that it ends the same day: how the memory of each of its
processes grows.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median

import psutil
from safetensors.torch import load_file

from trainer.parallel.worker import process_name

ROOT = Path(__file__).parent.parent
EVENTS = "events.txt"
KINDS = {"kill a worker": 6, "kill all workers": 2, "kill the command": 2, "stop a worker": 2, "damage": 1}
_LONG_S = 600.0


@dataclass
class Measured:
    """Seconds from each fault to what followed."""

    faults: Counter[str] = field(default_factory=Counter)
    noticed_s: dict[str, list[float]] = field(default_factory=dict)
    next_step_s: list[float] = field(default_factory=list)


def settings(arguments: argparse.Namespace, run_dir: Path, steps: int) -> list[str]:
    """The command's arguments: small steps, many checkpoints, some averages."""
    return [
        str(arguments.config),
        f"run.dir={run_dir}",
        f"train.steps={steps}",
        "lr_schedule.warmup_steps=5",
        "train.batch_size_per_gpu=1",
        f"launch.workers={arguments.workers}",
        "launch.restarts=1000",
        "launch.hang_after_s=2",
        f"launch.hang_at_start_s={arguments.hang_at_start_s}",
        f"memory.strategy={arguments.strategy}",
        "data.workers=1",
        "checkpoint.every_steps=5",
        "checkpoint.keep=3",
        "validation.every_steps=0",
        "samples.every_steps=0",
        "ema.score=[live]",
    ]


class Command:
    """`sdxl-train`, started again when it is killed as a whole."""

    def __init__(self, arguments: list[str], run_dir: Path) -> None:
        self.run_dir = run_dir
        self._command = [sys.executable, "-m", "trainer", *arguments]
        self.starts = 0
        self.begin()

    def begin(self) -> None:
        """Give the command."""
        self.starts += 1
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "screen.txt").open("a") as screen:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=screen, stderr=screen)

    def workers(self) -> list[psutil.Process]:
        """Those that run now."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if _name(child).removeprefix(process_name(0)[:-1]).isdigit()]

    def step(self) -> int:
        """By the records of the run."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, 2) - 2000, 0))
                lines = [line for line in file.read().splitlines() if line.startswith(b"{") and line.endswith(b"}")]
            return max((json.loads(line).get("step", 0) for line in lines), default=0)
        except OSError:
            return 0

    def events(self) -> int:
        """How many lines there are."""
        try:
            return (self.run_dir / EVENTS).read_text().count("starting again")
        except OSError:
            return 0


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def disturb(command: Command, kind: str, rng: random.Random, measured: Measured) -> None:
    """Do one fault, wait until it is noticed, and note when."""
    workers = command.workers()
    if not workers or command.process.poll() is not None:
        return
    before, begin = command.events(), time.monotonic()
    if kind in ("kill the command", "damage"):
        tree = [psutil.Process(command.process.pid), *psutil.Process(command.process.pid).children(recursive=True)]
        command.process.kill()
        command.process.wait()
        _, alive = psutil.wait_procs(tree[1:], timeout=30)
        assert not alive, f"left over: {alive}"
        measured.noticed_s.setdefault(kind, []).append(time.monotonic() - begin)
        if kind == "damage":
            _flip_a_bit(command.run_dir, rng)
        command.begin()
    else:
        victims = workers if kind == "kill all workers" else [rng.choice(workers)]
        for victim in victims:
            victim.send_signal(signal.SIGSTOP if kind == "stop a worker" else signal.SIGKILL)
        while command.events() == before and command.process.poll() is None:
            if time.monotonic() - begin > _LONG_S:
                raise AssertionError(f"{kind}: not noticed")
            time.sleep(0.02)
        measured.noticed_s.setdefault(kind, []).append(time.monotonic() - begin)
    measured.faults[kind] += 1
    _await_step(command, begin, measured)


def _await_step(command: Command, begin: float, measured: Measured) -> None:
    """Until a step is taken after the fault; steps since the newest checkpoint are taken anew."""
    metrics = command.run_dir / "metrics.jsonl"
    written = metrics.stat().st_size if metrics.exists() else 0
    while command.process.poll() is None:
        size = metrics.stat().st_size if metrics.exists() else 0
        if size > written:
            measured.next_step_s.append(time.monotonic() - begin)
            return
        written = min(size, written)  # a run that goes on cuts off the records of the steps to be taken anew
        if time.monotonic() - begin > _LONG_S:
            raise AssertionError("no step after a fault")
        time.sleep(0.02)


def _flip_a_bit(run_dir: Path, rng: random.Random) -> None:
    found = sorted((run_dir / "checkpoints").glob("step-????????"))
    if len(found) < 2:
        return
    file = rng.choice([path for path in sorted(found[-1].rglob("*")) if path.is_file()])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def soak(arguments: argparse.Namespace, folder: Path) -> bool:
    """Both runs and the comparison; whether they end alike."""
    rng, measured = random.Random(arguments.seed), Measured()
    steps = arguments.steps or 12 * arguments.faults
    disturbed, straight = folder / "disturbed", folder / "straight"
    command = Command(settings(arguments, disturbed, steps), disturbed)
    kinds, weights = [*KINDS], [*KINDS.values()]
    while measured.faults.total() < arguments.faults and command.process.poll() is None:
        time.sleep(rng.uniform(0, arguments.every_s))
        disturb(command, rng.choices(kinds, weights)[0], rng, measured)
        print(f"{measured.faults.total()} faults, step {command.step()}", file=sys.stderr, flush=True)
    code = command.process.wait()
    if code:
        lines = (disturbed / "screen.txt").read_text(errors="replace").splitlines()
        print("\n".join([f"exit code {code} after {measured.faults.total()} faults", *lines[-5:]]), file=sys.stderr)
        return False
    _train(settings(arguments, straight, steps))
    differing = compare(disturbed, straight, steps)
    print(json.dumps({"strategy": arguments.strategy, "steps": steps, "exit code": code, "faults": measured.faults}))
    print(json.dumps({"files that differ": differing, "commands given": command.starts}))
    for kind, seconds in measured.noticed_s.items():
        print(json.dumps({kind: f"noticed after {median(seconds):.2f} s (at most {max(seconds):.2f})"}))
    if measured.next_step_s:
        latest = max(measured.next_step_s)
        print(json.dumps({"next step": f"after {median(measured.next_step_s):.1f} s (at most {latest:.1f})"}))
    return code == 0 and not differing and not _tracebacks(disturbed)


def compare(disturbed: Path, straight: Path, steps: int) -> list[str]:
    """Files of the last checkpoint that are not the same, byte for byte."""
    places = [folder / "checkpoints" / f"step-{steps:08d}" for folder in (disturbed, straight)]
    names = {file.relative_to(place).as_posix() for place in places for file in place.rglob("*.safetensors")}
    assert names, "nothing was saved"
    return sorted(
        name
        for name in names
        if not all((place / name).is_file() for place in places)
        or (places[0] / name).read_bytes() != (places[1] / name).read_bytes()
    )


def _tracebacks(run_dir: Path) -> int:
    count = (run_dir / "screen.txt").read_text(errors="replace").count("Traceback (most recent call last)")
    if count:
        print(json.dumps({"tracebacks": count}))
    return count


def elastic(arguments: argparse.Namespace, folder: Path) -> bool:
    """4 -> 3 -> 4 workers against 4: the largest difference of a weight, and whether both are as far in the data."""
    shared = [
        "train.batch_size_per_gpu=1",
        "train.global_batch_size=16",
        "lr_schedule.kind=constant",
        "ema.score=[live]",
        # Calm enough that roundings stay what they are: with AdamW's usual eps a gradient of 1e-9 makes a whole step,
        # and at the rate of the quickstart a difference of 1e-8 in the loss is one of 1e-3 six steps later.
        "optimizer.eps=1e-2",
        "optimizer.lr=1e-3",
    ]
    shared += [
        "validation.every_steps=0",
        "samples.every_steps=0",
        "checkpoint.every=never",
        "checkpoint.every_steps=99999",
    ]
    straight, changing = folder / "straight", folder / "changing"
    for run_dir, workers, steps in ((straight, 4, 100), (changing, 4, 33), (changing, 3, 66), (changing, 4, 100)):
        command = [str(arguments.config), *shared, f"run.dir={run_dir}", f"launch.workers={workers}"]
        _train([*command, f"train.steps={steps}"])
    places = [run_dir / "checkpoints" / "step-00000100" for run_dir in (straight, changing)]
    weights = [load_file(place / "unet" / "diffusion_pytorch_model.safetensors") for place in places]
    largest = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    states = [json.loads((place / "training_state" / "state.json").read_text()) for place in places]
    same = all(states[0][key] == states[1][key] for key in ("images_seen", "snapshot"))
    print(json.dumps({"largest difference of a weight": largest, "same images seen": same}))
    return largest <= 1e-6 and same


def memory(arguments: argparse.Namespace, folder: Path) -> bool:
    """The slope of each process's memory after a tenth of the steps, by least squares, in MB per 1,000 steps."""
    run_dir, steps = folder / "run", arguments.memory_steps
    small = [f"model.path={_narrow_model(arguments.config, folder / 'model')}", f"data.prepared={folder / 'prepared'}"]
    small += [f"data.buckets.{name}=64" for name in ("resolution", "min_px", "max_px", "step_px")]
    command = Command([*settings(arguments, run_dir, steps), *small, "checkpoint.every_steps=2000"], run_dir)
    samples: dict[str, list[tuple[int, float]]] = {}
    while command.process.poll() is None:
        step = command.step()
        for number, worker in enumerate(sorted(command.workers(), key=lambda each: each.pid)):
            for name, process in ((f"worker {number}", worker), *_readers(number, worker)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    samples.setdefault(name, []).append((step, process.memory_full_info().uss / 1e6))
        time.sleep(2.0)
    slopes = {}
    for name, series in samples.items():
        later = [(step, size) for step, size in series if step > steps / 10]
        if len(later) > 10 and len({step for step, _ in later}) > 2:
            slope = linear_regression([step / 1000 for step, _ in later], [size for _, size in later]).slope
            slopes[name] = f"{slope:+.3f} MB per 1,000 steps, {later[0][1]:.0f} to {later[-1][1]:.0f} MB"
    print(json.dumps({"steps": steps, "memory of its own": slopes}))
    return command.process.returncode == 0


def _narrow_model(config: Path, folder: Path) -> Path:
    """The configuration's model with a UNet of a quarter of the channels."""
    from diffusers import UNet2DConditionModel

    from trainer.config.load import load_config

    model = Path(str(load_config(config).model.path))
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("unet"))
    wide = json.loads((model / "unet" / "config.json").read_text())
    narrow = {"block_out_channels": [8, 16, 24], "norm_num_groups": 8, "attention_head_dim": [1, 2, 3]}
    UNet2DConditionModel.from_config(wide | narrow | {"transformer_layers_per_block": 1}).save_pretrained(
        folder / "unet"
    )
    return folder


def _readers(number: int, worker: psutil.Process) -> list[tuple[str, psutil.Process]]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = sorted(worker.children(recursive=True), key=lambda each: each.pid)
        return [(f"child {index} of worker {number}", child) for index, child in enumerate(children)]
    return []


def _train(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "trainer", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Run it and print what came of it; exit code 1 if the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny.yaml")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: 12 for each fault")
    parser.add_argument("--strategy", choices=["ddp", "zero2", "zero3"], default="ddp")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every-s", type=float, default=20.0, help="faults are so many seconds apart, at most")
    parser.add_argument("--hang-at-start-s", type=float, default=120.0, help="30 is enough where nothing else runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--memory-steps", type=int)
    arguments = parser.parse_args()
    what = elastic if arguments.elastic else memory if arguments.memory_steps else soak
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    if not what(arguments, folder):
        print(f"look into {folder}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
