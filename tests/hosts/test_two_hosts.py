"""A run on two hosts with two workers each, over a link of limited speed: exact, frugal, and on its feet again."""

import signal
from pathlib import Path

import pytest

from benchmarks.two_hosts import TwoHosts, environment_of_hosts, processes_of, sent_bytes
from tests.hosts.hosted_run import Job, steps_of, tensor_hashes, wait_until, weight_count, write_run
from tests.warm_processes import sdxl_train
from trainer.checkpoint.run_dir import list_checkpoints

pytestmark = pytest.mark.e2e

MBIT, STEPS = 100, 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("shared"), model_folder)


def bytes_of_steps(job: Job, first: int, last: int) -> list[float]:
    """What each host has sent in each of the steps between two, by its interface."""
    job.wait_for_step(first)
    begin, before = steps_of(job.run_dir), [sent_bytes(host) for host in job.running]
    job.wait_for_step(last)
    end, after = steps_of(job.run_dir), [sent_bytes(host) for host in job.running]
    return [(after[host] - before[host]) / (end - begin) for host in (0, 1)]


@pytest.fixture(scope="module")
def straight(hosts: TwoHosts, config: Path) -> tuple[Path, list[float]]:
    """A run that nothing happens to, with four passes in a step, and the bytes of one of its steps."""
    job = Job(hosts, config, config.parent / "straight", "train.global_batch_size=16")
    sent = bytes_of_steps(job, 2, STEPS - 2)
    assert job.exit_codes() == [0, 0], job.said()
    return job.run_dir, sent


def test_accumulation_sends_the_bytes_of_one_step(
    hosts: TwoHosts, config: Path, straight: tuple[Path, list[float]]
) -> None:
    """And those are of a ring through all workers, by which each host sends 2 (W-1)/W of all gradients."""
    run_dir, four_passes = straight
    job = Job(hosts, config, config.parent / "one-pass")
    one_pass = bytes_of_steps(job, 2, STEPS - 2)
    assert job.exit_codes() == [0, 0], job.said()
    ring = 2 * 3 / 4 * 4 * weight_count(run_dir, STEPS)
    for host in (0, 1):
        assert four_passes[host] == pytest.approx(one_pass[host], rel=0.1)
        assert ring < one_pass[host] < 1.25 * ring  # headers, acknowledgements, and the small sums of a step


def test_two_hosts_end_with_the_bits_of_one(config: Path, straight: tuple[Path, list[float]]) -> None:
    run_dir = config.parent / "one-host"
    command = [config, f"run.dir={run_dir}", "train.global_batch_size=16", "launch.workers=4"]
    sdxl_train(*command, env=environment_of_hosts())
    assert tensor_hashes(run_dir, STEPS) == tensor_hashes(straight[0], STEPS)


def test_weights_that_are_shared_within_a_host_stay_there(
    hosts: TwoHosts, config: Path, straight: tuple[Path, list[float]]
) -> None:
    """In four passes gradients cross once: a pair of replicas all-reduces half of them, so that a host sends all once.

    Over all workers 3/4 of the weights cross, and 3/2 of the gradients, for gloo scatters sums by an all-reduce. And a
    host of four with as many groups ends with the same bits.
    """
    passes, sent = "train.global_batch_size=16", dict[str, list[float]]()
    for within in ("all", "host"):
        job = Job(
            hosts, config, config.parent / within, passes, "memory.strategy=zero2", f"memory.shard_within={within}"
        )
        sent[within] = bytes_of_steps(job, 2, STEPS - 2)
        assert job.exit_codes() == [0, 0], job.said()
    assert ", zero2 sharded over 2 workers, 2 replicas" in job.said()
    gradients = 4 * weight_count(straight[0], STEPS)
    for everywhere, at_home in zip(sent["all"], sent["host"], strict=True):
        assert gradients < at_home < 1.25 * gradients
        assert at_home < 0.55 * everywhere
    run_dir = config.parent / "groups-of-one-host"
    command = [config, f"run.dir={run_dir}", passes, "launch.workers=4"]
    sdxl_train(*command, "memory.strategy=zero2", "memory.shard_within=2", env=environment_of_hosts())
    assert tensor_hashes(run_dir, STEPS) == tensor_hashes(config.parent / "host", STEPS)


def test_a_host_that_dies_and_comes_back_changes_no_bit(
    hosts: TwoHosts, config: Path, straight: tuple[Path, list[float]]
) -> None:
    """SIGKILL of all its processes, then SIGTERM of the whole run on the other host, and the same command again."""
    job = Job(hosts, config, config.parent / "killed", "train.global_batch_size=16")
    wait_until(lambda: len(list_checkpoints(job.run_dir)) >= 1, job.both_run, "a checkpoint")
    hosts.kill(job.running[1])
    wait_until(lambda: "starts again" in job.said(), lambda: job.running[0].poll() is None, "another start")
    job.running[1] = job.start(1)
    job.wait_for_step(steps_of(job.run_dir) + 1)
    first_of_host = next(iter(processes_of(job.running[1])))
    first_of_host.send_signal(signal.SIGTERM)
    assert job.exit_codes() == [0, 0], job.said()
    stopped = int(list_checkpoints(job.run_dir)[-1].name.removeprefix("step-"))
    assert 4 <= stopped < STEPS, job.said()
    job.running = [job.start(host) for host in (0, 1)]
    assert job.exit_codes() == [0, 0], job.said()
    assert tensor_hashes(job.run_dir, STEPS) == tensor_hashes(straight[0], STEPS)
    assert not [process for host in job.running for process in processes_of(host)]


def test_a_mistake_is_not_tried_again(hosts: TwoHosts, config: Path) -> None:
    job = Job(hosts, config, config.parent / "mistaken", "train.stpes=5")
    assert job.exit_codes() == [2, 2]
    assert "starts again" not in job.said() and "train.stpes" in job.said()
