"""What differs between two hosts of a run is refused at the start, in one line on each; what is shared is a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.two_hosts import ADDRESSES, TwoHosts, environment_of_hosts
from tests.data.small_set import write_small_set
from tests.hosts.hosted_run import PATIENCE_S, write_run
from tests.hosts.warm_server import warm_python
from trainer.checkpoint.run_dir import list_checkpoints
from trainer.data.buckets import Bucket

pytestmark = pytest.mark.e2e

MBIT = 1000


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    return write_run(tmp_path, model)


def start_both(
    hosts: TwoHosts, config: Path, second: str = "", own: tuple[Path, Path] | None = None, both: Sequence[str] = ()
) -> list[tuple[int, str]]:
    """One worker on each host, as SLURM would start them; exit codes and what is said.

    Args:
        second: an override on the second host alone.
        own: a folder of the second host's own, and where it sees that in place of what the first sees there.
        both: overrides on both.
    """
    running = []
    for host in (0, 1):
        env = (
            environment_of_hosts()
            | warm_python()
            | {
                "RANK": str(host),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
            }
        )
        env |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29512", "SDXL_TRAIN_ENDINGS": str(config.parent)}
        command = [env["PYTHON_EXEC"], "-m", "trainer", str(config), "train.steps=2", *both]
        command += [second] if host and second else []
        if host and own:
            mount = f'mount --bind {own[0]} {own[1]} && exec "$@"'
            command = ["sh", "-c", mount, "sh", *command]
        log = config.parent / f"host-{host}.log"
        with log.open("wb") as output:
            running.append((hosts.start(host, command, output, env), log))
    return [(process.wait(PATIENCE_S), log.read_text()) for process, log in running]


def refusals(results: list[tuple[int, str]]) -> list[str]:
    """The one line on each host."""
    assert [code for code, _ in results] == [2, 2], results
    # Where one of them is ended sooner, what the libraries say of lost peers may stand beside it.
    return [line for _, said in results for line in said.splitlines() if "host-b" in line and "[" not in line[:1]]


def test_hosts_that_agree_train_one_run(hosts: TwoHosts, config: Path) -> None:
    """Also with an exact copy of the data on the second, and what belongs to a host set otherwise."""
    own, seen = config.parent / "data-of-b", config.parent / "prepared"
    shutil.copytree(seen, own)
    for code, said in start_both(hosts, config, second="launch.threads_per_worker=2", own=(own, seen)):
        assert code == 0, said
    assert [path.name for path in list_checkpoints(config.parent / "run")] == ["step-00000002"]
    assert not list((config.parent / "run").glob(".seen-by-all-*"))
    assert not (config.parent / "refused").exists()


def test_a_run_directory_of_each_hosts_own_is_refused(hosts: TwoHosts, config: Path) -> None:
    own, seen = config.parent / "disk-of-b", config.parent / "run"
    own.mkdir()
    seen.mkdir()
    lines = refusals(start_both(hosts, config, own=(own, seen)))
    told = (
        f"run.dir = {seen}: host-b does not see what host-a writes there; all hosts need one directory on a file "
        "system that they share, at one path, or each its own: run.on_local_disks=true (docs/hosts.md)"
    )
    assert lines == [told, told]
    assert (config.parent / "refused").exists() and not list_checkpoints(seen) and not list(own.iterdir())


def test_settings_that_differ_are_refused_by_key(hosts: TwoHosts, config: Path) -> None:
    lines = refusals(start_both(hosts, config, second="optimizer.lr=2e-3"))
    told = "optimizer.lr = 0.001 on host-a and 0.002 on host-b: start all hosts with the same configuration"
    assert lines == [told, told]


def test_copies_of_the_data_must_be_the_same(hosts: TwoHosts, config: Path) -> None:
    """Here the second has an image less."""
    own, seen = config.parent / "data-of-b", config.parent / "prepared"
    write_small_set(own, {Bucket(64, 64): 30, Bucket(128, 64): 25})
    lines = refusals(start_both(hosts, config, own=(own, seen)))
    told = (
        f"data.prepared = {seen}: snapshot 000001.json on host-b is not that on host-a: copy the folder from one host "
    )
    told += "to the others, for to prepare it on each gives other bits (docs/hosts.md)"
    assert lines == [told, told]


def test_copies_of_the_model_must_be_the_same(hosts: TwoHosts, config: Path) -> None:
    own, seen = config.parent / "model-of-b", config.parent / "model"
    shutil.copytree(seen, own)
    file = own / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    lines = refusals(start_both(hosts, config, own=(own, seen)))
    told = f"model.path = {seen}: the text_encoder on host-b has other weights than that on host-a: "
    assert lines == [told + "copy the model from one host to the others"] * 2


def test_a_directory_that_both_see_is_no_local_disk(hosts: TwoHosts, config: Path) -> None:
    lines = refusals(start_both(hosts, config, both=["run.on_local_disks=true"]))
    told = (
        f"run.on_local_disks = true, run.dir = {config.parent / 'run'}: host-a sees what host-b writes there; either "
        "each host has one of its own, or all share one and it is false (docs/hosts.md)"
    )
    assert lines == [told, told]
    assert not list((config.parent / "run").glob("*/*")) and not list((config.parent / "run").glob(".seen-*"))


def test_a_checkpoint_by_its_path_must_be_on_both_disks(hosts: TwoHosts, config: Path) -> None:
    """The line has the command that brings it there."""
    own, seen = config.parent / "disk-of-b", config.parent / "run"
    seen.mkdir()
    own.mkdir()
    local = ["run.on_local_disks=true"]
    assert [code for code, _ in start_both(hosts, config, own=(own, seen), both=local)] == [0, 0]
    shutil.rmtree(own / "checkpoints")
    wish = seen / "checkpoints" / "step-00000002"
    lines = refusals(start_both(hosts, config, own=(own, seen), both=[*local, f"run.resume={wish}", "train.steps=3"]))
    told = f"run.resume = {wish}: on host-b, it is not there; copy it from host-a: rsync -a --delete --mkpath {wish}/ "
    assert lines == [f"{told}host-b:{wish}/"] * 2
    shutil.copytree(wish, own / "checkpoints" / "step-00000002")
    for code, said in start_both(hosts, config, own=(own, seen), both=[*local, f"run.resume={wish}", "train.steps=3"]):
        assert code == 0, said
    assert [path.name for path in list_checkpoints(own)] == ["step-00000002", "step-00000003"]


def test_true_wants_a_checkpoint_on_one_of_the_disks(hosts: TwoHosts, config: Path) -> None:
    own, seen = config.parent / "disk-of-b", config.parent / "run"
    own.mkdir()
    seen.mkdir()
    results = start_both(hosts, config, own=(own, seen), both=["run.on_local_disks=true", "run.resume=true"])
    told = f"run.resume = true: no checkpoint in {seen}; auto starts fresh without one"
    assert [(code, said.count(told)) for code, said in results] == [(2, 1), (2, 1)], results
