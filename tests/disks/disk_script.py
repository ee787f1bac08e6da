"""One worker of several hosts, each with a folder FOLDER/disk-N as its disk. Argument: FOLDER.

Saves by every way in which workers may hold a tensor, then over a disk that is gone and with a NaN, then carries files.
What it found goes to FOLDER/found-RANK.json.
"""

import contextlib
import json
import sys
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.checkpoint.odd_tensors import odd_tensors
from trainer.checkpoint import pieces
from trainer.checkpoint.pieces import lay_out
from trainer.checkpoint.roll_back import order_roll_back
from trainer.checkpoint.routes import routes_of
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.checkpoint.saver import Folder, Saver
from trainer.checkpoint.share_of_save import NotFinite
from trainer.checkpoint.write import TensorFile
from trainer.disks.carry import collect_files
from trainer.disks.run_disks import Disks, disks_of, done_by_each, refusing_together
from trainer.errors import UserError
from trainer.parallel.comm import close, init_comm, sum_floats
from trainer.parallel.local_shard import Held, held
from trainer.parallel.worker import end_process
from trainer.train.saved.resume_across_disks import resume_across_disks

FILE = "unet/weights.safetensors"


def rows(tensor: Tensor, number: int, count: int) -> Held:
    """Of `count` workers' the rows of one; what has no rows is on all."""
    if not tensor.ndim:
        return held(tensor)
    each = -(-len(tensor) // count)
    first = min(number * each, len(tensor))
    return Held(tensor[first : first + each], first, tuple(tensor.shape), True, tensor.dtype)


def firsts(tensor: Tensor, rank: int) -> Held:
    """What the first worker alone has."""
    return Held(tensor if rank == 0 else tensor.new_empty(0), 0, tuple(tensor.shape), True, tensor.dtype)


def in_groups(tensor: Tensor, within: int, world: int) -> Held:
    """As of a parameter that FSDP2 has spread over each group of so many neighbours."""
    if not tensor.ndim:
        return held(tensor)
    mesh = init_device_mesh("cpu", (world // within, within))
    return held(distribute_tensor(tensor, mesh, [Replicate(), Shard(0)], src_data_rank=None))


def files_by_way(disks: Disks) -> dict[str, TensorFile]:
    """DDP; FSDP2 over all, within each host and in groups that begin within a host; one worker's; and of each's own."""
    comm, all_of = disks.comm, odd_tensors()
    ways: dict[str, dict[str, Held]] = {
        "whole": {name: held(tensor) for name, tensor in all_of.items()},
        "rows": {name: rows(tensor, comm.rank, comm.world) for name, tensor in all_of.items()},
        "within": {name: in_groups(tensor, disks.workers_each, comm.world) for name, tensor in all_of.items()},
        "groups": {name: in_groups(tensor, 3, comm.world) for name, tensor in all_of.items()},
        "firsts": {name: firsts(tensor, comm.rank) for name, tensor in all_of.items()},
        "own": {"own": rows(torch.arange(comm.world * 600.0).reshape(comm.world, 600), comm.rank, comm.world)},
    }
    return {way: TensorFile(FILE, found, {"config.json": "{}"}) for way, found in ways.items()}


def save(disks: Disks, path: Path, file: TensorFile) -> str:
    """Why it was given up, or nothing."""
    saver = Saver(disks.comm.rank, disks.comm.world, "token", disks.comm.device, 4 << 10, disks)
    saver.begin([Folder(path, [file], {"step": 7} if disks.comm.rank == 0 else {})])
    reason = saver.finish(partial(sum_floats, disks.comm))
    return "" if reason is None else f"{type(reason).__name__}: {reason}"


def go_back(disks: Disks, run_dir: Path, file: TensorFile) -> str:
    """The checkpoint to go on from where the host that had ordered a roll-back is now the second."""
    for step in (3, 6):
        save(disks, checkpoint_dir(run_dir, step), file)
    if disks.mine == 1 and disks.is_first:
        order_roll_back(run_dir, 5)
    return str(resume_across_disks(disks, (run_dir,), "auto"))


def bytes_from_others(disks: Disks, file: TensorFile) -> int:
    """What comes over the wire for this worker to write."""
    arrivals = routes_of(disks, [file], [lay_out(file, disks.comm.rank, disks.workers_here)]).arrivals
    return sum(arrival.num_bytes for each in arrivals.values() for arrival in each)


def main() -> None:
    pieces.PIECE_BYTES = 1 << 10  # so that tensors take several
    comm = init_comm(timeout_s=600)
    disks = disks_of(comm, local=True)
    folder, found = Path(sys.argv[1]), dict[str, Any]()
    disk = folder / f"disk-{disks.mine}"
    files = files_by_way(disks)
    for way, file in files.items():
        found[way] = save(disks, disk / way / "step", file)
        found[f"bytes of {way}"] = bytes_from_others(disks, file)
    gone = folder / "gone"
    if comm.rank == 0:
        gone.write_text("a file where a folder was")
    found["gone"] = save(disks, (gone if disks.mine == 1 else disk) / "failed" / "step", files["rows"])
    weights = torch.ones(disks.comm.world, 3000)
    if comm.rank == comm.world - 1:
        weights[-1, 2999] = float("nan")
    found["nan"] = save(
        disks, disk / "failed" / "step", TensorFile(FILE, {"nan": rows(weights, comm.rank, comm.world)}, {})
    )
    assert NotFinite.__name__ in found["nan"]
    found["again"] = save(disks, disk / "again" / "step", files["rows"])

    samples = disk / "samples"
    if disks.is_first:
        samples.mkdir()
    sum_floats(comm, [0.0])
    names = [f"{comm.rank}-{number}.bin" for number in range(comm.rank)]
    for number, name in enumerate(names):
        (samples / name).write_bytes(bytes([comm.rank]) * number * 1000)
    collect_files(disks, samples, names)
    try:
        collect_files(disks, disk / "lost", ["lost.bin"] if comm.rank == comm.world - 1 else [])
        found["lost"] = ""
    except OSError as error:
        found["lost"] = str(error.filename)

    def refuse() -> None:
        if disks.mine == 1:
            raise UserError("the second host refuses")

    with contextlib.suppress(UserError):
        done_by_each(disks, refuse)
        found["refusal"] = "missed"
    with contextlib.suppress(UserError):
        with refusing_together(disks):
            if disks.mine == 1 and disks.is_first:
                raise UserError("its disk is full")
        found["refusal"] = "missed"
    found["goes back to"] = go_back(disks, disk / "run", files["whole"])
    found["by each"] = done_by_each(disks, lambda: disks.mine)
    found["elements"] = sum(prod(tensor.shape) for tensor in odd_tensors().values())
    (folder / f"found-{comm.rank}.json").write_text(json.dumps(found))
    close(comm)
    end_process()


main()
