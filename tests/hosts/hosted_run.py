"""A small run that two hosts share: its configuration, and what is seen of it from outside."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from benchmarks.two_hosts import ADDRESSES, TwoHosts, environment_of_hosts
from tests.data.small_set import write_small_set
from tests.hosts.warm_server import warm_python
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.yaml_source import dump
from trainer.data.buckets import Bucket
from trainer.measure.telemetry import read_metrics

PATIENCE_S = 600.0
SCRIPT = Path(__file__).parents[2] / "scripts" / "hosts.sh"


def write_run(folder: Path, model: Path) -> Path:
    """A configuration beside its prepared data; `run.dir` is `folder/run`."""
    prepared = write_small_set(folder / "prepared", {Bucket(64, 64): 30, Bucket(128, 64): 26})
    (folder / "images").mkdir()
    config = {
        "run": {"dir": str(folder / "run"), "seed": 5},
        "launch": {"threads_per_worker": 1},
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(folder / "images")}], "prepared": str(prepared), "workers": 0},
        "train": {"steps": 12, "batch_size_per_gpu": 1, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 3},
        "memory": {"strategy": "ddp"},
    }
    (folder / "config.yaml").write_text(dump(config))
    return folder / "config.yaml"


class Job:
    """The script on both hosts, with two workers each."""

    def __init__(
        self, hosts: TwoHosts, config: Path, run_dir: Path, *overrides: str, seconds_disk: Path | None = None
    ) -> None:
        """`seconds_disk`: a folder that the second host sees in place of `run_dir`."""
        self._hosts, self._config, self.run_dir, self._seconds_disk = hosts, config, run_dir, seconds_disk
        self._overrides = [f"run.dir={run_dir}", *overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        self._logs = [run_dir.parent / f"{run_dir.name}-host-{host}.log" for host in (0, 1)]
        self.running = [self.start(host) for host in (0, 1)]

    def start(self, host: int) -> "subprocess.Popen[bytes]":
        command = [str(SCRIPT), str(host), "2", ADDRESSES[0], str(self._config), *self._overrides]
        if host and self._seconds_disk:
            self._seconds_disk.mkdir(parents=True, exist_ok=True)
            mount = f'mount --bind {self._seconds_disk} {self.run_dir} && exec "$@"'
            command = ["sh", "-c", mount, "sh", *command]
        with self._logs[host].open("ab") as output:
            return self._hosts.start(host, command, output, environment_of_hosts() | warm_python() | {"WORKERS": "2"})

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: steps_of(self.run_dir) >= step, self.both_run, f"step {step} ({self.said()})")

    def both_run(self) -> bool:
        return all(host.poll() is None for host in self.running)

    def exit_codes(self) -> list[int]:
        return [host.wait(PATIENCE_S) for host in self.running]

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self._logs)


def wait_until(there: Callable[[], bool], still: Callable[[], bool], what: str, every_s: float = 0.05) -> None:
    """Until something is there, as long as something else still is."""
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert still() and time.monotonic() < deadline, f"{what} did not come"
        time.sleep(every_s)


def steps_of(run_dir: Path) -> int:
    """The last step that has been written down."""
    records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def tensor_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """Of weights and optimizer state, by file."""
    entries = read_manifest(checkpoint_dir(run_dir, step))
    return {name: entry["xxh3_128"] for name, entry in entries.items() if name.endswith(".safetensors")}


def weight_count(run_dir: Path, step: int) -> int:
    """Numbers in the UNet of a checkpoint, all of which train."""
    file = checkpoint_dir(run_dir, step) / "unet/diffusion_pytorch_model.safetensors"
    count = 0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            size = 1
            for length in tensors.get_slice(name).get_shape():
                size *= length
            count += size
    return count
