"""Exchanges between real workers over gloo and the launcher's store; one worker alone without any."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from trainer.errors import UserError
from trainer.parallel import worker
from trainer.parallel.comm import (
    Comm,
    barrier,
    broadcast_object,
    close,
    gather_objects,
    init_comm,
    require_kernels,
    sum_floats,
)
from trainer.parallel.launch import run_workers

HERE = Path(__file__).parent


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", worker.DEVICE: "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.mark.e2e
def test_three_workers_exchange(tmp_path: Path) -> None:
    argv = [sys.executable, str(HERE / "worker_script.py"), "collectives", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "error::UserWarning"}
    result = run_workers(argv, workers=3, log_dir=tmp_path, env=env, threads=1, gpu=False)
    assert result.failure is None, result.failure.message()
    notes = [json.loads((tmp_path / f"ready-{rank}").read_text(encoding="utf-8")) for rank in range(3)]
    for rank, note in enumerate(notes):
        assert note["comm"] == [rank, 3, rank, "cpu"]
        assert note["threads"] == 1
        assert note["sums"] == notes[0]["sums"]
        assert note["sums"] == pytest.approx([0.6, 2.0**54], rel=1e-15)
        assert note["gathered"] == [{"rank": r, "keys": "ä" * 1000 * r} for r in range(3)]
        assert note["broadcast"] == {"from": 1}


_GROUPS = """
import torch, torch.distributed as dist
from torch import nn
from trainer.parallel.comm import keep_group_alive

def once():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_group_alive()
    layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    wrapped = nn.parallel.DistributedDataParallel(layers, bucket_cap_mb=0.001)
    wrapped(torch.randn(4, 32)).square().mean().backward()
    dist.destroy_process_group()

torch.set_num_threads(1)
for _ in range(400):
    once()
"""


@pytest.mark.slow
def test_a_group_may_end_before_the_model_that_used_it() -> None:
    """Gloo's thread still lets go of the last gradients: on busy cores, 11 of 12 hung without `keep_group_alive`."""
    busy = [subprocess.Popen([sys.executable, "-c", _GROUPS], cwd=HERE.parents[1]) for _ in range(4)]
    try:
        assert [process.wait(300) for process in busy] == [0] * 4
    finally:
        for process in busy:
            process.kill()


@pytest.mark.usefixtures("alone")
def test_one_worker_opens_no_group() -> None:
    comm = init_comm()
    assert comm == Comm(0, 1, 0, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert PartialState().num_processes == 1
    assert os.environ["LOCAL_RANK"] == "0"
    barrier(comm)
    assert sum_floats(comm, [1.5, float("inf")]) == [1.5, float("inf")]
    assert gather_objects(comm, (1, "a")) == [[1, "a"]]
    assert broadcast_object(comm, {"a": None}) == {"a": None}
    close(comm)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a PyTorch that cannot use a GPU")
def test_gpu_that_pytorch_cannot_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.DEVICE, "cuda")
    with pytest.raises(UserError, match="cannot use them") as caught:
        init_comm()
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90"]),  # an RTX 3090 runs the machine code of 8.0
        ((8, 9), ["sm_75", "sm_80", "sm_86"]),
        ((7, 0), ["sm_50", "sm_60", "sm_70"]),
        ((12, 0), ["sm_90", "compute_90"]),  # PTX is compiled when it is loaded
        ((9, 0), ["sm_90a"]),
        ((10, 3), ["sm_100f"]),
        ((8, 6), []),  # not told
        ((11, 0), ["gfx1100"]),
    ],
)
def test_card_that_some_code_runs_on(capability: tuple[int, int], arch_list: list[str]) -> None:
    require_kernels("card", capability, arch_list)


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((8, 0), ["sm_75", "sm_86", "sm_90"]),
        ((12, 0), ["sm_80", "sm_90"]),
        ((8, 6), ["compute_90"]),
        ((12, 0), ["sm_90a", "compute_90a"]),
        ((9, 0), ["compute_80f"]),
    ],
)
def test_card_that_no_code_runs_on(capability: tuple[int, int], arch_list: list[str]) -> None:
    with pytest.raises(UserError, match=r"compute capability .* install a PyTorch build that has") as caught:
        require_kernels("card", capability, arch_list)
    assert len(caught.value.lines) == 1


def test_card_before_turing_is_told_of_the_build_that_has_its_kernels() -> None:
    told = r"^Tesla V100-SXM2-32GB has compute capability 7\.0, .* for sm_75, sm_80 alone: .* CUDA 12\.6 \(cu126\)$"
    with pytest.raises(UserError, match=told):
        require_kernels("Tesla V100-SXM2-32GB", (7, 0), ["sm_75", "sm_80"])


_LONG_WORK = """
import sys, time
from pathlib import Path
from trainer.parallel import comm as of
from trainer.parallel.worker import run_worker

def body(stop_requested):
    of._SAY_EVERY_S = 0.5
    comm = of.init_comm(timeout_s=4.0)
    def work():
        time.sleep(8.0 if comm.rank == 0 else 1e9)
        return {"found": "step-7"}
    (Path(sys.argv[1]) / f"found-{comm.rank}").write_text(of.done_by_first(comm, work)["found"])
    of.close(comm)

run_worker(body)
"""


@pytest.mark.e2e
def test_the_first_workers_long_work_outlasts_what_an_exchange_waits(tmp_path: Path) -> None:
    """Twice the time-out of an exchange: reading checkpoints back, or the last export."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    argv = [sys.executable, "-c", _LONG_WORK, str(tmp_path)]
    result = run_workers(argv, workers=2, log_dir=tmp_path, env=env, threads=1, gpu=False)
    assert result.failure is None, result.failure.message()
    assert [(tmp_path / f"found-{rank}").read_text() for rank in range(2)] == ["step-7", "step-7"]
