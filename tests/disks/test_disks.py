"""Saves of hosts with disks of their own: each gets what one disk would have, and only what it lacks travels."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.manifest import MANIFEST, find_damage
from trainer.checkpoint.roll_back import ORDER
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.disks.run_disks import Disks, one_disk
from trainer.parallel.comm import Comm

SCRIPT = Path(__file__).parent / "disk_script.py"
HOSTS, EACH = 3, 2
FILE = "unet/weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hosts of two workers have been there."""
    made = tmp_path_factory.mktemp("hosts")
    environments = [env | {"GLOO_SOCKET_IFNAME": "lo"} for env in worker_environments(HOSTS * EACH, EACH)]
    run_group([[sys.executable, str(SCRIPT), str(made)]] * (HOSTS * EACH), environments, made)
    return made


def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(HOSTS * EACH)]


@pytest.mark.e2e
@pytest.mark.parametrize("way", ["whole", "rows", "within", "groups", "firsts", "own", "again"])
def test_every_disk_gets_the_whole(folder: Path, way: str) -> None:
    """Bit for bit the same file, with the first worker's state; `again`: after saves that failed."""
    assert [each[way] for each in found(folder)] == [""] * HOSTS * EACH
    for disk in range(HOSTS):
        step = folder / f"disk-{disk}" / way / "step"
        assert find_damage(step) is None
        assert (step / MANIFEST).read_bytes() == (folder / "disk-0" / way / "step" / MANIFEST).read_bytes()
        assert json.loads((step / "training_state" / "state.json").read_text()) == {"step": 7}
        assert [path.name for path in step.parent.iterdir()] == ["step"]
        if way == "own":
            rows = torch.arange(HOSTS * EACH * 600.0).reshape(-1, 600)
            assert torch.equal(load_file(step / FILE)["own"], rows)
        else:
            assert (step / FILE).read_bytes() == (folder / "disk-0" / "whole" / "step" / FILE).read_bytes()
    generator = torch.Generator().manual_seed(1)
    written = load_file(folder / "disk-2" / "whole" / "step" / FILE)
    assert torch.equal(written["large"], torch.randn(301, 35, generator=generator))


@pytest.mark.e2e
def test_a_file_that_is_gone_is_told_where_it_was_and_nobody_waits(folder: Path) -> None:
    lost = [each["lost"] for each in found(folder)]
    assert lost[:-1] == [""] * (HOSTS * EACH - 1) and lost[-1].endswith("lost.bin")


@pytest.mark.e2e
def test_only_what_a_disk_lacks_comes_over_the_wire(folder: Path) -> None:
    per_tensor = {"large": (301, 35 * 4), "half": (77, 3 * 2), "bytes": (1001, 1), "one row": (1, 50 * 4)}
    per_tensor["channels"] = (9, 4 * 3 * 3 * 4)

    def lacking(disk: int) -> int:
        """Bytes of the rows that FSDP2, which cuts into equal numbers of rows, puts on other hosts."""
        total = 0
        for count, row_bytes in per_tensor.values():
            each = -(-count // (HOSTS * EACH))
            here = min((disk + 1) * EACH * each, count) - min(disk * EACH * each, count)
            total += (count - here) * row_bytes
        return total

    came = found(folder)
    for disk in range(HOSTS):
        here = came[disk * EACH : (disk + 1) * EACH]
        assert sum(each["bytes of rows"] for each in here) == lacking(disk) > 0
        assert sum(each["bytes of own"] for each in here) == (HOSTS - 1) * EACH * 600 * 4
        assert all(each["bytes of whole"] == each["bytes of within"] == 0 for each in here)
        everything = sum(count * row_bytes for count, row_bytes in per_tensor.values()) + 4  # and a scalar
        assert sum(each["bytes of firsts"] for each in here) == (everything if disk else 0)


@pytest.mark.e2e
def test_one_hosts_failing_disk_gives_up_for_all_and_leaves_nothing(folder: Path) -> None:
    other = "OSError: [Errno 5] another worker could not write its share; its log says why"
    for rank, each in enumerate(found(folder)):
        assert each["gone"].startswith("NotADirectoryError" if rank // EACH == 1 else other)
    for disk in range(HOSTS):
        assert not list((folder / f"disk-{disk}").glob("failed/*"))


@pytest.mark.e2e
def test_a_nan_is_one_on_all_hosts(folder: Path) -> None:
    *others, own = (each["nan"] for each in found(folder))
    assert own == f"NotFinite: {FILE}: nan holds NaN or infinity"
    assert set(others) == {"NotFinite: a worker holds NaN or infinity; its log says where"}


@pytest.mark.e2e
def test_files_of_other_hosts_come_to_the_first(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in (folder / "disk-0" / "samples").iterdir()}
    assert files == {f"{rank}-{n}.bin": bytes([rank]) * n * 1000 for rank in range(HOSTS * EACH) for n in range(rank)}


@pytest.mark.e2e
def test_one_hosts_refusal_is_all_hosts(folder: Path) -> None:
    assert all("refusal" not in each and each["by each"] == [0, 1, 2] for each in found(folder))


@pytest.mark.e2e
def test_a_roll_back_that_another_host_has_ordered_is_obeyed_once(folder: Path) -> None:
    for rank, each in enumerate(found(folder)):
        run_dir = folder / f"disk-{rank // EACH}" / "run"
        assert each["goes back to"] == str(checkpoint_dir(run_dir, 3))
        assert [path.name for path in run_dir.glob("checkpoints/rolled-back-*/*")] == ["step-00000006"]
        assert not (run_dir / ORDER).exists()


def test_workers_of_a_disk_follow_each_other() -> None:
    disks = Disks(Comm(5, 12, 1, torch.device("cpu")), 4)
    assert (disks.count, disks.mine, disks.place, disks.is_first) == (3, 1, 1, False)
    assert [disks.of(rank) for rank in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [disks.worker(disk, 3) for disk in range(3)] == [3, 7, 11] and disks.workers_here == range(4, 8)
    alone = one_disk(Comm(2, 4, 2, torch.device("cpu")))
    assert (alone.count, alone.mine, alone.place, alone.is_first) == (1, 0, 2, False)
