"""A run on two hosts with a disk each: both have all of it, and neither a dead host nor a lost disk changes a bit."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.two_hosts import TwoHosts, environment_of_hosts, processes_of
from tests.hosts.hosted_run import Job, tensor_hashes, wait_until, write_run
from tests.warm_processes import sdxl_train
from trainer.checkpoint.manifest import MANIFEST, find_damage
from trainer.checkpoint.roll_back import order_roll_back
from trainer.checkpoint.run_dir import RESOLVED_CONFIG, checkpoint_dir, fallback_run_dir, list_checkpoints
from trainer.faults import FAULT

pytestmark = pytest.mark.e2e

MBIT, STEPS = 100, 12
RUN = [
    "memory.strategy=zero2",
    "ema.averages=[{kind: plain}]",
    "samples={every_steps: 6, count: 5, steps: 1, width_px: 64, height_px: 64, guidance_scale: 1}",
]
LOCAL = [*RUN, "run.on_local_disks=true"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("local"), model_folder)


def on_one_host(config: Path, run_dir: Path, *overrides: str) -> None:
    sdxl_train(config, f"run.dir={run_dir}", "launch.workers=4", *overrides, env=environment_of_hosts())


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The run on one host, to which nothing happens."""
    on_one_host(config, config.parent / "straight", *RUN)
    return config.parent / "straight"


class Disks:
    """The first host's run directory, and the second's disk, which that sees in its place."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = folder / "run", folder / "disk-of-b"
        self.both = self.first, self.second

    def job(self, hosts: TwoHosts, config: Path, *overrides: str) -> Job:
        return Job(hosts, config, self.first, *LOCAL, *overrides, seconds_disk=self.second)

    def copy_to(self, folder: Path) -> "Disks":
        copy = Disks(folder)
        for old, new in zip(self.both, copy.both, strict=True):
            shutil.copytree(old, new)
        return copy

    def require_alike(self) -> None:
        """The same whole checkpoints on both, and nothing half done."""
        listed = [[path.name for path in list_checkpoints(disk)] for disk in self.both]
        assert listed[0] == listed[1] and listed[0]
        for name in listed[0]:
            paths = [disk / "checkpoints" / name for disk in self.both]
            assert [find_damage(path) for path in paths] == [None, None]
            assert (paths[0] / MANIFEST).read_bytes() == (paths[1] / MANIFEST).read_bytes()
        for disk in self.both:
            assert not [*disk.glob("checkpoints/*.tmp"), *disk.glob(".seen-*")]


@pytest.fixture(scope="module")
def done(hosts: TwoHosts, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Disks:
    """The run on two hosts, of which one is killed while it writes its second checkpoint."""
    disks = Disks(tmp_path_factory.mktemp("disks"))
    job = disks.job(hosts, config)
    half = lambda: list(disks.second.glob("checkpoints/step-00000006.*.tmp"))  # noqa: E731 - for one line
    wait_until(lambda: bool(half()), job.both_run, "a half checkpoint", every_s=0.002)
    hosts.kill(job.running[1])
    assert half() and len(list_checkpoints(disks.second)) == 1
    wait_until(lambda: "starts again" in job.said(), lambda: job.running[0].poll() is None, "another start")
    job.running[1] = job.start(1)
    assert job.exit_codes() == [0, 0], job.said()
    assert not [process for host in job.running for process in processes_of(host)]
    return disks


def test_a_host_killed_in_a_save_changes_no_bit_on_either_disk(straight: Path, done: Disks) -> None:
    done.require_alike()
    for disk in done.both:
        assert [path.name for path in list_checkpoints(disk)][-1] == f"step-{STEPS:08d}"
        assert tensor_hashes(disk, STEPS) == tensor_hashes(straight, STEPS)


def test_all_that_is_looked_at_is_on_the_first(straight: Path, done: Disks) -> None:
    """Samples of all workers too; the second has its checkpoints, and what it takes to go on alone."""
    drawn = sorted(path.name for path in (done.first / "samples" / "step-00000012").iterdir())
    assert drawn == [f"{number:02d}.png" for number in range(5)]
    for name in drawn:
        at = Path("samples") / "step-00000012" / name
        with Image.open(done.first / at) as one, Image.open(straight / at) as other:
            assert one.tobytes() == other.tobytes()
    assert (done.first / "metrics.jsonl").is_file() and (done.first / "samples" / "step-00000012.png").is_file()
    assert not (done.second / "metrics.jsonl").exists() and not list((done.second / "samples").glob("*"))
    assert not list((done.second / "samples").glob(".*"))
    assert (done.second / RESOLVED_CONFIG).is_file() and (done.second / "log.txt").is_file()


def test_a_checkpoint_that_one_disk_lost_comes_over_the_wire(
    hosts: TwoHosts, config: Path, done: Disks, tmp_path: Path
) -> None:
    disks = done.copy_to(tmp_path)
    shutil.rmtree(checkpoint_dir(disks.second, STEPS))
    job = disks.job(hosts, config)
    assert job.exit_codes() == [0, 0], job.said()
    assert f"{checkpoint_dir(disks.first, STEPS)}: host-b had it not; copied from host-a, " in job.said()
    disks.require_alike()


@pytest.mark.slow
def test_an_empty_disk_and_a_damaged_checkpoint_on_the_other(
    hosts: TwoHosts, config: Path, straight: Path, done: Disks, tmp_path: Path
) -> None:
    """The newest that is whole anywhere is taken by both, and its steps are done anew."""
    disks = done.copy_to(tmp_path)
    shutil.rmtree(disks.second)
    weights = checkpoint_dir(disks.first, STEPS) / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x00\x01\x02")
    job = disks.job(hosts, config)
    assert job.exit_codes() == [0, 0], job.said()
    damaged = checkpoint_dir(disks.first, STEPS)
    assert f"{damaged}: unet/diffusion_pytorch_model.safetensors has changed (checksum); set aside" in job.said()
    assert f"{checkpoint_dir(disks.first, 9)}: host-b had it not; copied from host-a, " in job.said()
    assert [path.name for path in list_checkpoints(disks.second)] == ["step-00000009", "step-00000012"]
    for disk in disks.both:
        assert tensor_hashes(disk, STEPS) == tensor_hashes(straight, STEPS)


@pytest.mark.slow
def test_the_first_host_lost_its_disk(
    hosts: TwoHosts, config: Path, straight: Path, done: Disks, tmp_path: Path
) -> None:
    disks = done.copy_to(tmp_path)
    shutil.rmtree(disks.first)
    shutil.rmtree(checkpoint_dir(disks.second, STEPS))
    job = disks.job(hosts, config)
    assert job.exit_codes() == [0, 0], job.said()
    assert f"{checkpoint_dir(disks.first, 9)}: host-a had it not; copied from host-b, " in job.said()
    for disk in disks.both:
        assert tensor_hashes(disk, STEPS) == tensor_hashes(straight, STEPS)


@pytest.mark.slow
def test_a_roll_back_is_one_on_both(hosts: TwoHosts, config: Path, straight: Path, done: Disks, tmp_path: Path) -> None:
    disks = done.copy_to(tmp_path)
    order_roll_back(disks.first, 10)
    job = disks.job(hosts, config)
    assert job.exit_codes() == [0, 0], job.said()
    for disk in disks.both:
        assert [path.name for path in disk.glob("checkpoints/rolled-back-*/*")] == [f"step-{STEPS:08d}"]
        assert tensor_hashes(disk, STEPS) == tensor_hashes(straight, STEPS)
    disks.require_alike()


@pytest.mark.slow
def test_a_full_disk_of_one_sends_both_elsewhere(
    hosts: TwoHosts, config: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of the second host finds it full after step 6; both write the next one elsewhere, then as before."""
    monkeypatch.setenv(FAULT, "disk_full@2:6")
    disks = Disks(tmp_path)
    elsewhere = disks.first / "elsewhere"
    job = disks.job(hosts, config, f"checkpoint.fallback_dir={elsewhere}")
    assert job.exit_codes() == [0, 0], job.said()
    stand_in = fallback_run_dir(elsewhere, disks.first)
    assert f"trying again in {elsewhere}" in job.said() and f"saved {stand_in}/checkpoints/step-" in job.said()
    disks.require_alike()
    assert [path.name for path in list_checkpoints(disks.second)][-1] == f"step-{STEPS:08d}"
    second = disks.second / "elsewhere" / stand_in.name
    assert (second / RESOLVED_CONFIG).is_file() and not list_checkpoints(second) and not list_checkpoints(stand_in)
    assert tensor_hashes(disks.second, STEPS) == tensor_hashes(straight, STEPS)


def test_hosts_that_each_hold_the_whole_model(hosts: TwoHosts, config: Path, tmp_path: Path) -> None:
    """Each writes all of it to its own disk; and goes on from it, one of them from what comes over the wire."""
    plain = "samples.every_steps=0"
    on_one_host(config, tmp_path / "straight", *RUN, plain, "memory.shard_within=2")
    disks = Disks(tmp_path)
    for lost in ([], [checkpoint_dir(disk, STEPS) for disk in disks.both] + [checkpoint_dir(disks.second, 9)]):
        for path in lost:
            shutil.rmtree(path)
        job = disks.job(hosts, config, plain, "memory.shard_within=host")
        assert job.exit_codes() == [0, 0], job.said()
        disks.require_alike()
        assert tensor_hashes(disks.second, STEPS) == tensor_hashes(tmp_path / "straight", STEPS)
    assert f"{checkpoint_dir(disks.first, 9)}: host-b had it not; copied from host-a, " in job.said()


@pytest.mark.slow
def test_a_host_goes_on_alone(config: Path, straight: Path, done: Disks, tmp_path: Path) -> None:
    """The second, with as many workers as both had, from the checkpoint before the last."""
    disks = done.copy_to(tmp_path)
    shutil.rmtree(checkpoint_dir(disks.second, STEPS))
    on_one_host(config, disks.second, *LOCAL)
    assert tensor_hashes(disks.second, STEPS) == tensor_hashes(straight, STEPS)
