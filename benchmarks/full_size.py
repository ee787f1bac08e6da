"""All of SDXL for real, on the CPU: from one 7 GB file through training to an export that diffusers opens.

    python benchmarks/full_size.py --dir /nvme/full-size [--steps 20] [--tokenizer DIR] > table.md

The weights are random, the photographs real, at 256 px. Every stage is a command of the product in a process of its
own; the table has its wall time, CPU time and peak memory (RSS). Takes about 35 GB of disk, 20 GB of RAM and an hour
on two cores.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).parent
PHOTOS = 12  # a full VAE takes seconds for each
_OPEN_WITH_DIFFUSERS = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
file, config = sys.argv[1:]
unet = UNet2DConditionModel.from_single_file(
    file, config=config, subfolder="unet", torch_dtype=torch.bfloat16, local_files_only=True)
pooled, width = unet.config.projection_class_embeddings_input_dim - 6 * 256, unet.config.cross_attention_dim
sizes = {"text_embeds": torch.zeros(1, pooled, dtype=torch.bfloat16), "time_ids": torch.zeros(1, 6)}
text = torch.randn(1, 77, width).bfloat16()
with torch.no_grad():
    out = unet(torch.randn(1, 4, 32, 32).bfloat16(), 500, text, added_cond_kwargs=sizes)
assert out[0].isfinite().all()
print(f"diffusers opens it: UNet of {sum(p.numel() for p in unet.parameters()):,} weights, output finite")
"""


@dataclass(frozen=True)
class Stage:
    """What a command took: seconds and bytes."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    note: str = ""


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where everything is written (default: the system's temporary folder)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--tokenizer", type=Path, help="CLIP's tokenizer folder (default: of a tiny model)")
    parser.add_argument(
        "--gb", type=float, help="a narrower model of about so many GB, to see that the benchmark works"
    )
    parser.add_argument("--only-train", action="store_true", help="the file, prepare and train")
    parser.add_argument("--keep", action="store_true", help="leave the files; a model that is there is not made again")
    arguments = parser.parse_args()
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    folder = arguments.dir if arguments.keep else Path(tempfile.mkdtemp(prefix="full-size-", dir=arguments.dir))
    try:
        stages = run_stages(folder, arguments.steps, arguments.tokenizer, arguments.gb, arguments.only_train)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print("| stage | wall | CPU | peak RSS | |")
    print("|---|---|---|---|---|")
    for stage in stages:
        print(
            f"| {stage.name} | {stage.wall_s:,.0f} s | {stage.cpu_s:,.0f} s | {stage.peak_bytes / 1e9:.2f} GB "
            f"| {stage.note} |"
        )


def run_stages(folder: Path, steps: int, tokenizer: Path | None, gb: float | None, only_train: bool) -> list[Stage]:
    """Everything, in order."""
    model, tiny, run_dir = folder / "sdxl-random.safetensors", folder / "tiny", folder / "run"
    if not (tiny / "photos").is_dir() or not (tokenizer or (tiny / "model").is_dir()):
        command("make-tiny", "--out", tiny, "--vae-steps", 1)
    stages = []
    if not model.is_file():
        size = ["--gb", gb] if gb else []
        stages.append(timed("write the file", [sys.executable, HERE / "random_model.py", "--out", model, *size]))
    print(f"{model}: {model.stat().st_size:,} bytes", file=sys.stderr)
    config = write_config(folder, model, tiny, run_dir, steps, tokenizer)
    if not only_train:
        stages.append(timed("inspect it", product("inspect", model, "--quick")))
    stages.append(timed("plan", product("plan", config)))
    planned_bytes = json.loads(subprocess.check_output([str(a) for a in product("plan", config, "--json")]))[
        "host_bytes"
    ]
    note = f"{PHOTOS} of the photographs"
    stages.append(timed("prepare: VAE and text encoders", product("prepare", config, "--limit", PHOTOS), note))
    if not only_train:
        stages.append(_bench(folder, config))
    watch = Watch(run_dir)
    trained = timed(f"train {steps} steps and save", product("train", config), watch=watch)
    error = planned_bytes / trained.peak_bytes - 1
    stages.append(replace(trained, note=f"planned {planned_bytes / 1e9:.2f} GB, {error:+.1%}"))
    stages += [*watch.rows(trained), *saves(run_dir)]
    if only_train:
        return stages
    exported = folder / "exported.safetensors"
    stages.append(timed("export in fp16", product("export", run_dir, "-o", exported, "--overwrite")))
    stages.append(timed("inspect the export", product("inspect", exported, "--json")))
    configs = folder / "configs"
    write_diffusers_configs(configs, model)
    stages.append(timed("diffusers opens it", [sys.executable, "-c", _OPEN_WITH_DIFFUSERS, exported, configs]))
    return stages


def _bench(folder: Path, config: Path) -> Stage:
    report = folder / "bench.json"
    split = product("bench", config, "--batch-sizes", 1, "--steps", 5, "--warmup", 1, "--out", report)
    return replace(timed("bench 1 + 5 steps", split), note=step_parts(report))


def saves(run_dir: Path) -> list[Stage]:
    """The checkpoint that was written beside the steps: how long it took, and how long they waited for it."""
    pattern = re.compile(r"saved .*step-(\d+) in ([\d.]+) s, for which training waited ([\d.]+) s")
    found = pattern.findall((run_dir / "log.txt").read_text())
    return [Stage(f"save after step {int(s)}", float(took), 0.0, 0, f"training waited {w} s") for s, took, w in found]


def step_parts(report: Path) -> str:
    """Seconds of a step's parts on images of the run's size, as `bench` measured them."""
    (row,) = json.loads(report.read_text())["rows"]
    phases = ("forward", "backward", "optimizer")
    return "a step: " + ", ".join(f"{phase} {row['split'][phase]:.1f} s" for phase in phases)


def write_config(folder: Path, model: Path, tiny: Path, run_dir: Path, steps: int, tokenizer: Path | None) -> Path:
    """All of the UNet, bf16 weights with stochastic rounding, 8-bit AdamW, everything recomputed; one process."""
    config = {
        "run": {"dir": str(run_dir), "resume": False},
        "launch": {"workers": 1, "threads_per_worker": os.cpu_count()},
        "model": {
            "path": str(model),
            "tokenizer": str(tokenizer or tiny / "model" / "tokenizer"),
            "vae_precision": "bf16",
            "text_encoder_precision": "bf16",
        },
        "data": {
            "sources": [{"type": "folder", "path": str(tiny / "photos")}],
            "prepared": str(folder / "prepared"),
            "cache_text": True,
            "workers": 0,
            "buckets": {"resolution": 256, "min_px": 256, "max_px": 256},
        },
        "train": {"steps": steps, "precision": "bf16_stochastic"},
        "memory": {"recompute": "all"},
        "optimizer": {"kind": "adamw_8bit", "lr": 1e-5},
        "checkpoint": {"every_steps": max(1, steps // 2), "keep": 2},  # one beside the steps, one at the end
    }
    if run_dir.exists():
        shutil.rmtree(run_dir)
    path = folder / "full-size.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def product(*arguments: object) -> list[object]:
    """A command of the product."""
    return [sys.executable, "-m", "trainer", *arguments]


def command(*arguments: object) -> None:
    """Run a command of the product that is not measured."""
    subprocess.run([str(a) for a in product(*arguments)], check=True, stdout=sys.stderr)


class Watch(threading.Thread):
    """Notes the resident memory of the process that trains, twice a second."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.samples, self.pid, self.ended = run_dir, list[tuple[float, int]](), 0, threading.Event()

    def run(self) -> None:
        """Until `ended` is set."""
        while not self.ended.wait(0.5):
            try:
                processes = psutil.Process(self.pid).children(recursive=True)
                rss = max((process.memory_info().rss for process in processes), default=0)
            except psutil.NoSuchProcess:
                continue
            self.samples.append((time.time(), rss))

    def rows(self, trained: Stage) -> list[Stage]:
        """Peak memory within the steps, and how long their parts take."""
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line and "step_s" in line]
        if len(steps) < 4:
            return []
        half = len(steps) // 2
        ends = [line["time"] for line in steps] if "time" in steps[0] else []
        peaks = []
        if ends:
            for begin, end in ((ends[0], ends[half - 1]), (ends[half - 1], ends[-1])):
                peaks.append(max((rss for at, rss in self.samples if begin <= at <= end), default=0))
        note = f"first half of the steps {peaks[0] / 1e9:.2f} GB, second half {peaks[1] / 1e9:.2f} GB" if peaks else ""
        seconds = sorted(line["step_s"] for line in steps[1:])
        median = seconds[len(seconds) // 2]
        losses = f"loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}"
        return [Stage("a step (median)", median, 0.0, max(peaks, default=trained.peak_bytes), f"{note}; {losses}")]


def timed(name: str, arguments: Sequence[object], note: str = "", watch: Watch | None = None) -> Stage:
    """Run a command to its end; its output goes to standard error.

    Raises:
        SystemExit: it failed.
    """
    begin = time.perf_counter()
    print(f"\n== {name}: {' '.join(map(str, arguments))[:200]}", file=sys.stderr, flush=True)
    process = subprocess.Popen([str(a) for a in arguments], stdout=sys.stderr)
    if watch is not None:
        watch.pid = process.pid
        watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if watch is not None:
        watch.ended.set()
        watch.join()
    if process.returncode:
        sys.exit(f"{name}: exit code {process.returncode}")
    # The largest process among this one and those it waited for.
    cpu_s, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Stage(name, time.perf_counter() - begin, cpu_s, peak, note)


def write_diffusers_configs(folder: Path, model: Path) -> None:
    """The model's configurations as diffusers wants them beside a single file where there is no hub."""
    from trainer.model_files.model_source import component_config, find_source
    from trainer.model_files.presets import preset

    source = find_source(model)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        write_json(folder / name / "config.json", component_config(source, name))
    write_json(folder / "scheduler" / "scheduler_config.json", preset("scheduler"))
    write_json(folder / "model_index.json", preset("model_index"))


def write_json(path: Path, content: object) -> None:
    """Into a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
