"""GPUs, threads, and jobs that torchrun or SLURM has started."""

import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.parallel.environment import (
    available_cores,
    choose_workers,
    detect_gpus,
    first_slurm_host,
    interface_settings,
    interface_towards,
    joined_environment,
    threads_per_worker,
)

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aaaa1111", "GPU-bbbb2222", "GPU-cccc3333"]),
        ("1", ["GPU-bbbb2222"]),
        ("1,0", ["GPU-bbbb2222", "GPU-aaaa1111"]),
        ("GPU-bbbb", ["GPU-bbbb2222"]),
        ("0,7,1", ["GPU-aaaa1111"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(nvidia_smi: Path, visible: str | None, uuids: list[str]) -> None:
    found = detect_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [line.partition("UUID: ")[2].rstrip(")") for line in found] == uuids


def test_no_driver_or_a_broken_one_is_no_gpu(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n", encoding="utf-8")
    assert detect_gpus({}) == []
    nvidia_smi.unlink()
    assert detect_gpus({}) == []


def test_a_card_that_is_gone_does_not_hide_the_others(nvidia_smi: Path) -> None:
    others = detect_gpus({})[1:]
    gone = "Unable to determine the device handle for GPU0: 0000:01:00.0: GPU is lost"
    listed = "\n".join(f"echo '{line}'" for line in (gone, *others))
    nvidia_smi.write_text(f"#!/bin/sh\n{listed}\nexit 15\n", encoding="utf-8")
    assert detect_gpus({}) == others


def test_workers_follow_the_gpus() -> None:
    assert choose_workers(None, ["a", "b"]) == (2, True)
    assert choose_workers(1, ["a", "b"]) == (1, True)
    assert choose_workers(None, []) == (1, False)
    assert choose_workers(4, []) == (4, False)
    with pytest.raises(UserError, match=r"launch\.workers: 3 is more than this host's GPUs \(2\)"):
        choose_workers(3, ["a", "b"])


def test_threads_are_configured_or_exported_or_shared_out() -> None:
    assert threads_per_worker(4, 3, {"OMP_NUM_THREADS": "8"}) == 3
    assert threads_per_worker(4, None, {"OMP_NUM_THREADS": "8"}) == 8
    assert threads_per_worker(1, None, {}) == available_cores()
    assert threads_per_worker(10_000, None, {"OMP_NUM_THREADS": "many"}) == 1


def test_torchrun_is_joined() -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
    }
    assert joined_environment({**torchrun, **SLURM, "HOME": "/root"}) == torchrun
    assert joined_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}) is None
    assert joined_environment({}) is None


def test_slurm_step_is_joined() -> None:
    assert joined_environment(SLURM) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "19711",
    }
    own = joined_environment({**SLURM, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert own is not None
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.1.1.1", "4000")


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_ID": ""},  # the batch script itself
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},  # a shell inside an allocation of several tasks
    ],
)
def test_slurm_without_several_tasks_launches_itself(changed: dict[str, str]) -> None:
    assert joined_environment({**SLURM, **changed}) is None


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5-6]-ib", "gpu3-ib"),
        ("rack[1-2]node[04-05]", "rack1node04"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_slurm_host(nodelist) == host


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked of Linux")
def test_the_interface_that_leads_to_a_host() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("joined", "environ"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}, {}),  # one host
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, {}),  # another host's own name
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"},
            {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "eth9"},
        ),
    ],
)
def test_the_interface_is_left_alone(joined: dict[str, str], environ: dict[str, str]) -> None:
    assert interface_settings(joined, environ) == {}
