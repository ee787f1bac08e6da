"""Which CPU cores each worker and its readers run on: those that share a cache, near the worker's card.

An EPYC is several chips with a level-3 cache each; a thread that moves to another one finds its data far away, and two
workers in one cache push each other's out. What the kernel tells of this is in /sys; nothing here imports torch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.errors import UserError

_SYSFS = Path("/sys")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_LEVEL = "3"


@dataclass(frozen=True)
class CacheDomain:
    """Cores that share a level-3 cache, or where the kernel does not tell of one, a NUMA node.

    Attributes:
        node: the NUMA node that it belongs to.
        cores: of each, its hardware threads by their numbers.
    """

    node: int
    cores: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placement:
    """Where a worker runs.

    Attributes:
        cpus: numbers of hardware threads.
        cores: how many cores they are of.
    """

    cpus: tuple[int, ...]
    cores: int

    @property
    def text(self) -> str:
        """As the kernel writes it, such as `0-3,16-19`."""
        return as_ranges(self.cpus)


def read_domains(allowed: Collection[int], sysfs: Path = _SYSFS) -> list[CacheDomain]:
    """The domains of this host, by their first core; [] where /sys does not tell.

    Args:
        allowed: numbers of the hardware threads that may be used; others are left out.
    """
    cpus = sysfs / "devices" / "system" / "cpu"
    nodes = _nodes(sysfs)
    domains: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for cpu in sorted(allowed):
        core = _read_list(cpus / f"cpu{cpu}" / "topology" / "core_cpus_list")
        core = core or _read_list(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        if not core:
            return []
        shared = _shared_cache(cpus / f"cpu{cpu}") or tuple(c for c, node in nodes.items() if node == nodes.get(cpu))
        domains[shared].add(tuple(each for each in core if each in allowed))
    found = [CacheDomain(nodes.get(min(cores)[0], 0), tuple(sorted(cores))) for cores in domains.values()]
    return sorted(found, key=lambda domain: domain.cores[0])


def node_of_card(uuid: str, sysfs: Path = _SYSFS, driver: Path = _DRIVER) -> int | None:
    """The NUMA node that a card's PCIe slot belongs to; None where it is not known."""
    for place in sorted(driver.glob("*/information")) if driver.is_dir() else ():
        if uuid and uuid in _read(place):
            node = _read(sysfs / "bus" / "pci" / "devices" / place.parent.name.lower() / "numa_node")
            return int(node) if node.isdecimal() else None
    return None


def place_workers(domains: Sequence[CacheDomain], nodes: Sequence[int | None]) -> list[Placement]:
    """Fair shares of the cores, in as few domains as they take; [] where a worker would have less than a core.

    Workers of one node take its domains in turn, whole ones where there are enough, else whole cores of one.

    Args:
        nodes: of each worker's card; None, or a node without cores: anywhere, where most cores are left for each.
    """
    by_node: dict[int, list[CacheDomain]] = defaultdict(list)
    for domain in domains:
        by_node[domain.node].append(domain)
    cores = {node: sum(len(domain.cores) for domain in of) for node, of in by_node.items()}
    workers: dict[int, list[int]] = {node: [] for node in by_node}
    known = [node if node in by_node else None for node in nodes]
    for rank in sorted(range(len(known)), key=lambda rank: known[rank] is None):
        most = max(by_node, key=lambda node: (cores[node] / (len(workers[node]) + 1), -node), default=None)
        node = known[rank] if known[rank] is not None else most
        if node is None:
            return []
        workers[node].append(rank)
    placed: dict[int, Placement] = {}
    for node, ranks in workers.items():
        for rank, own in zip(sorted(ranks), _shares(by_node[node], len(ranks)), strict=True):
            if not own:
                return []
            placed[rank] = Placement(tuple(sorted(cpu for core in own for cpu in core)), len(own))
    return [placed[rank] for rank in range(len(nodes))]


def _shares(domains: Sequence[CacheDomain], count: int) -> list[list[tuple[int, ...]]]:
    """For each of `count` workers, cores."""
    if len(domains) >= count:
        cuts = [len(domains) * i // count for i in range(count + 1)]
        return [[core for domain in domains[a:b] for core in domain.cores] for a, b in pairwise(cuts)]
    of_domain = [len(domains) * i // count for i in range(count)]
    shares = []
    for i, number in enumerate(of_domain):
        cores, beside = domains[number].cores, of_domain.count(number)
        place = i - of_domain.index(number)
        shares.append([*cores[len(cores) * place // beside : len(cores) * (place + 1) // beside]])
    return shares


def placements_of(
    wish: str | Sequence[str], cards: Sequence[str], allowed: Collection[int] | None = None, sysfs: Path = _SYSFS
) -> list[Placement]:
    """Where the workers of this host run; [] where they are left to the kernel.

    Args:
        wish: `launch.cores`: `auto`, `none`, or a list of CPUs for each worker.
        cards: UUIDs of the workers' cards, one a worker.
        allowed: what this process may use; None: as the kernel says.
    Raises:
        UserError: there are not as many lists as workers, or a list names what this process may not use.
    """
    if wish == "none":
        return []
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    domains = read_domains(allowed, sysfs)
    if isinstance(wish, str):
        return place_workers(domains, [node_of_card(card, sysfs) for card in cards]) if domains else []
    if len(wish) != len(cards):
        raise UserError(f"launch.cores: {len(wish)} lists for {len(cards)} workers; give one each, or `auto`")
    core_of: Mapping[int, tuple[int, ...]] = {cpu: core for d in domains for core in d.cores for cpu in core}
    placed = []
    for text in wish:
        try:
            cpus = parse_ranges(text)
        except ValueError:
            raise UserError(f"launch.cores: {text}: must be CPU numbers and ranges, such as `0-3,16-19`") from None
        if missing := sorted({*cpus} - {*allowed}):
            raise UserError(f"launch.cores: {text}: this process may not use CPU {missing[0]} of this host")
        placed.append(Placement(cpus, len({core_of.get(cpu, (cpu,)) for cpu in cpus})))
    return placed


def parse_ranges(text: str) -> tuple[int, ...]:
    """`0-3,16` as (0, 1, 2, 3, 16).

    Raises:
        ValueError: it is no such list.
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        begin, end = int(first), int(last or first)
        if not 0 <= begin <= end < 1 << 16:
            raise ValueError(text)
        cpus |= {*range(begin, end + 1)}
    return tuple(sorted(cpus))


def as_ranges(cpus: Sequence[int]) -> str:
    """(0, 1, 2, 3, 16) as `0-3,16`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _nodes(sysfs: Path) -> dict[int, int]:
    """The NUMA node of each hardware thread."""
    found = {}
    for place in sorted((sysfs / "devices" / "system" / "node").glob("node[0-9]*")):
        for cpu in _read_list(place / "cpulist"):
            found[cpu] = int(place.name.removeprefix("node"))
    return found


def _shared_cache(cpu: Path) -> tuple[int, ...]:
    for index in sorted((cpu / "cache").glob("index[0-9]*")):
        if _read(index / "level") == _LEVEL:
            return _read_list(index / "shared_cpu_list")
    return ()


def _read_list(path: Path) -> tuple[int, ...]:
    try:
        return parse_ranges(_read(path))
    except ValueError:
        return ()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
