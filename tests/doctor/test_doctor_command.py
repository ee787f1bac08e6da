"""The real command on this host, against /proc and the system's own calls, read independently."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main as cli
from trainer.doctor.exchange import SIZES

ROOT = Path(__file__).parents[2]
RIGHT = ROOT / "tests" / "config" / "right.yaml"


def doctor(arguments: Sequence[str], folder: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "trainer", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def kib(name: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = doctor(["--quick", "--json"], tmp_path_factory.mktemp("here"))
    assert done.returncode in (0, 1) and done.stderr == "", done.stderr
    record = json.loads(done.stdout)
    assert done.returncode == int(record["level"] == "fail")
    return record


def test_memory_and_swap_are_those_of_proc(told: dict[str, Any]) -> None:
    memory, limit = told["facts"]["memory"], Path("/sys/fs/cgroup/memory.max")
    if not limit.exists() or not limit.read_text().strip().isdecimal():
        assert memory["total"] == kib("MemTotal") * 1024
        assert memory["available"] == pytest.approx(kib("MemAvailable") * 1024, rel=0.5)  # others work meanwhile
    swaps = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    assert memory["swap_total"] == pytest.approx(sum(int(words[2]) for words in swaps) * 1024, rel=0.01)
    shm = os.statvfs("/dev/shm")
    assert memory["shm_total"] == shm.f_blocks * shm.f_frsize


def test_the_processor_is_that_of_proc(told: dict[str, Any]) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = told["facts"]["processor"]
    assert facts["model"] in {line.partition(":")[2].strip() for line in lines if line.startswith("model name")} | {""}
    assert facts["threads"] == len(os.sched_getaffinity(0))
    cores = {cpu for domain in facts["domains"] for core in domain["cores"] for cpu in core}
    assert cores <= os.sched_getaffinity(0)
    assert facts["is_virtual"] == any(" hypervisor " in f"{line} " for line in lines if line.startswith("flags"))


def test_limits_disk_and_software(told: dict[str, Any]) -> None:
    import torch

    facts = told["facts"]
    assert facts["limits"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert facts["software"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert facts["software"]["torch_cuda"] == torch.version.cuda
    assert os.uname().release.startswith(facts["software"]["kernel"])
    assert facts["flush"]["flushes"] >= 5 and 0 < facts["flush"]["median_s"] <= facts["flush"]["slowest_s"]
    assert facts["read"] is None and facts["memory_speed"] is None and facts["exchange"] is None
    levels = {finding["name"]: finding["level"] for finding in told["findings"]}
    assert levels["memory speed"] == levels["all-reduce"] == levels["data at random"] == "not here"
    for name in ("PyTorch", "cores", "NUMA", "RAM", "swap", "/dev/shm", "open files", "run room", "run fsync"):
        assert levels[name] != "not here", name


@pytest.mark.e2e
def test_the_whole_page_and_the_table(tmp_path: Path) -> None:
    """Within a minute on an idle machine; it ends by itself on a busy one."""
    done = doctor(["--share", "--workers", "3"], tmp_path)
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("**sdxl-train doctor: all-reduce** of 3 workers over gloo; ")
    rows = sum(line.startswith("| ") and " MiB | " in line for line in lines)
    assert 1 <= rows <= len(SIZES)  # fewer on a machine that is busy
    assert os.uname().nodename not in done.stdout and str(tmp_path) not in done.stdout
    assert [*tmp_path.iterdir()] == []


@pytest.mark.e2e
def test_the_directories_of_a_configuration(tmp_path: Path) -> None:
    prepared, run = tmp_path / "data" / "set", tmp_path / "runs" / "x"
    overrides = [f"data.prepared={prepared}", f"run.dir={run}", "launch.workers=5"]
    done = doctor([str(RIGHT), *overrides, "--quick", "--json"], tmp_path)
    assert done.returncode in (0, 1), done.stderr
    facts = json.loads(done.stdout)["facts"]
    assert facts["workers"] == 5
    assert (facts["data"]["folder"], facts["data"]["measured"]) == (str(prepared), str(tmp_path))
    assert facts["run"]["folder"] == str(run) and [*tmp_path.iterdir()] == []
    page = doctor([str(RIGHT), *overrides, "--quick"], tmp_path).stdout
    assert "\n  -     all-reduce           not here: not measured\n" in page
    assert page.splitlines()[-1].startswith(("fit to train", "not fit to train as it is: "))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--share", "--quick"], "--share: the table has to be measured; leave out --quick"),
        (["no-such.yaml"], "no-such.yaml"),
        (["--workers", "0"], "must be a whole number above 0"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["doctor", *arguments])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2 and expected in capsys.readouterr().err
