"""Whether the hosts of a run agree before it starts: one directory, and the same settings, model and data on each.

Workers that one command has started share all that, and nothing of this is done for them. What differs is told in one
line by one worker of each host; all workers end.
"""

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from trainer import __version__
from trainer.config.schema import Config
from trainer.data.store.snapshot_file import current_snapshot
from trainer.disks.run_disks import disks_of
from trainer.errors import UserError
from trainer.model_files.key_map import COMPONENTS
from trainer.model_files.run_model import RunModel
from trainer.parallel.comm import Comm, broadcast_object, gather_objects

_SEEN_WITHIN_S = 10.0  # after which another host has to see what one has written
_OF_EACH_HOST = ("launch",)  # sections that may differ


def spans_hosts(comm: Comm, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether some of the workers are on another host; each has started as many as `LOCAL_WORLD_SIZE` says."""
    return comm.world > int(environ.get("LOCAL_WORLD_SIZE", str(comm.world)))


def require_agreement(config: Config, model: RunModel, comm: Comm) -> None:
    """Refuse a start on several hosts that would not be one run; all workers call it, before they write anything.

    Reads the whole model once on each host, from where loading it takes it then.

    Raises:
        UserError: with what differs and on which hosts; without a line on all but one worker of each host.
    """
    if not spans_hosts(comm):
        return
    hosts = [str(name) for name in gather_objects(comm, socket.gethostname())]
    _require(comm, _differing_versions(comm, hosts))
    _require(comm, _differing_settings(config, comm, hosts))
    for key, is_set in (
        ("run.on_local_disks = true", config.run.on_local_disks),
        ("memory.shard_within = host", config.memory.shard_within == "host"),
    ):
        if is_set:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            places = [tuple(place) for place in gather_objects(comm, [comm.local_rank, here])]
            _require(comm, uneven_hosts(key, places, hosts))
    misplaced = _seen_elsewhere if config.run.on_local_disks else _unseen_directory
    _require(comm, misplaced("run.dir", config.run.dir, comm, hosts))
    if config.checkpoint.fallback_dir:
        _require(comm, misplaced("checkpoint.fallback_dir", config.checkpoint.fallback_dir, comm, hosts))
    _require(comm, _differing_model(config, model, comm, hosts))
    _require(comm, _differing_data(config.data.prepared, comm, hosts))


def _require(comm: Comm, problem: str | None) -> None:
    if problem is not None:
        raise UserError(*([problem] if comm.local_rank == 0 else []))


def _differing_versions(comm: Comm, hosts: list[str]) -> str | None:
    for name, version in (("sdxl-train", __version__), ("PyTorch", torch.__version__)):
        versions = gather_objects(comm, str(version))
        if (other := _first_other(versions)) is not None:
            return f"{name} is {versions[0]} on {hosts[0]} and {versions[other]} on {hosts[other]}: install one version"
    return None


def _differing_settings(config: Config, comm: Comm, hosts: list[str]) -> str | None:
    settings = config.model_dump(mode="json", exclude=set(_OF_EACH_HOST))
    everyones = [dict(_flat(one)) for one in gather_objects(comm, settings)]
    other = _first_other(everyones)
    if other is None:
        return None
    ours, theirs = everyones[0], everyones[other]
    key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
    return (
        f"{key} = {ours.get(key)} on {hosts[0]} and {theirs.get(key)} on {hosts[other]}: start all hosts with the same "
        "configuration"
    )


def uneven_hosts(key: str, places: Sequence[tuple[int, ...]], hosts: Sequence[str]) -> str | None:
    """A sentence if the workers of the hosts are not rows of one length, one host after the other.

    Args:
        key: the setting that needs it.
        places: of each worker by rank: its number on its host, and how many there are; `hosts`: the host's name.
    """
    _, here = places[0]
    for rank, (number, count) in enumerate(places):
        if count != here:
            return f"{key}: {hosts[0]} has {here} workers and {hosts[rank]} {count}: start as many on each host"
        if number != rank % here:
            return (
                f"{key}: worker {rank} is number {number} on {hosts[rank]}: give the hosts' "
                "workers neighbouring ranks, with SLURM by --distribution=block"
            )
    return None


def _flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration by its dotted key."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in branches:
        yield from _flat(value, f"{at}.{name}" if at else str(name))
    if not branches:
        yield at, tree


def _unseen_directory(key: str, folder: Path, comm: Comm, hosts: list[str]) -> str | None:
    """A sentence if some worker does not find a file that rank 0 has just written there."""
    token = broadcast_object(comm, secrets.token_hex(8))
    # A name that nobody has looked up before: a network file system may remember for a while that there was none.
    mark = folder / f".seen-by-all-{token}"
    try:
        if comm.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        gather_objects(comm, None)
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = gather_objects(comm, mark.exists())
    finally:
        if comm.rank == 0:
            mark.unlink(missing_ok=True)
    if all(seen):
        return None
    return (
        f"{key} = {folder}: {hosts[seen.index(False)]} does not see what {hosts[0]} writes there; all hosts need one "
        "directory on a file system that they share, at one path, or each its own: run.on_local_disks=true "
        "(docs/hosts.md)"
    )


def _seen_elsewhere(key: str, folder: Path, comm: Comm, hosts: list[str]) -> str | None:
    """A sentence if a worker sees there what another host's has written: each host is to have a directory of its own.

    A host's own workers have to see it; they share a file system.
    """
    disks, token = disks_of(comm, local=True), broadcast_object(comm, secrets.token_hex(8))
    marks = [folder / f".seen-by-host-{disk}-{token}" for disk in range(disks.count)]
    try:
        if disks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            marks[disks.mine].touch()
        gather_objects(comm, None)
        seen = gather_objects(comm, [mark.exists() for mark in marks])
    finally:
        if disks.is_first:
            marks[disks.mine].unlink(missing_ok=True)
    for rank, marks_seen in enumerate(seen):
        for disk, is_seen in enumerate(marks_seen):
            if is_seen != (disk == disks.of(rank)):
                sees = "sees" if is_seen else "does not see"
                writer = hosts[disks.worker(disk)]
                return (
                    f"run.on_local_disks = true, {key} = {folder}: {hosts[rank]} {sees} what {writer} writes there; "
                    "either each host has one of its own, or all share one and it is false (docs/hosts.md)"
                )
    return None


def _differing_model(config: Config, model: RunModel, comm: Comm, hosts: list[str]) -> str | None:
    prints = gather_objects(comm, [_fingerprint(model, name) for name in COMPONENTS] if comm.local_rank == 0 else None)
    for rank, of_host in enumerate(prints):
        if of_host is not None and of_host != prints[0]:
            name = next(n for n, ours, theirs in zip(COMPONENTS, prints[0], of_host, strict=True) if ours != theirs)
            return (
                f"model.path = {config.model.path}: the {name} on {hosts[rank]} has other weights than that on "
                f"{hosts[0]}: copy the model from one host to the others"
            )
    return None


def _fingerprint(model: RunModel, component: str) -> str:
    try:
        return model.fingerprint(component)
    except UserError:  # whoever needs it says so
        return "none"


def _differing_data(prepared: Path, comm: Comm, hosts: list[str]) -> str | None:
    """The newest snapshot that all hosts have names every shard with its size and checksum: it stands for the data."""
    names = [str(name) for name in gather_objects(comm, current_snapshot(prepared))]
    name = min(names)
    try:
        own = xxhash.xxh3_128_hexdigest((prepared / "snapshots" / name).read_bytes())
    except OSError:
        own = "none"
    prints = gather_objects(comm, own)
    other = _first_other(prints)
    if other is None:
        return None
    return (
        f"data.prepared = {prepared}: snapshot {name} on {hosts[other]} is not that on {hosts[0]}: copy the folder "
        "from one host to the others, for to prepare it on each gives other bits (docs/hosts.md)"
    )


def _first_other(values: list[Any]) -> int | None:
    """The first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
