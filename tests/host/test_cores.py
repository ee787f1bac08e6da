"""Where workers run on hosts that people have, as the kernel describes these."""

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.host.cores import (
    CacheDomain,
    as_ranges,
    node_of_card,
    parse_ranges,
    place_workers,
    placements_of,
    read_domains,
)


def write_host(root: Path, *, cores: int, per_domain: int, nodes: int = 1, with_cache: bool = True) -> set[int]:
    """/sys of a host whose core i has the hardware threads i and cores + i; its hardware threads."""
    for cpu in range(2 * cores):
        core, own = cpu % cores, root / "devices" / "system" / "cpu" / f"cpu{cpu}"
        (own / "topology").mkdir(parents=True)
        (own / "topology" / "core_cpus_list").write_text(f"{core},{cores + core}\n")
        for index, level, size in ((0, 1, 1), (2, 2, 1), (3, 3, per_domain)):
            if level == 3 and not with_cache:
                continue
            (own / "cache" / f"index{index}").mkdir(parents=True)
            first = core // size * size
            shared = as_ranges([*range(first, first + size), *range(cores + first, cores + first + size)])
            (own / "cache" / f"index{index}" / "level").write_text(f"{level}\n")
            (own / "cache" / f"index{index}" / "shared_cpu_list").write_text(shared + "\n")
    for node in range(nodes):
        size = cores // nodes
        own = [*range(node * size, (node + 1) * size), *range(cores + node * size, cores + (node + 1) * size)]
        place = root / "devices" / "system" / "node" / f"node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(as_ranges(own) + "\n")
    return {*range(2 * cores)}


@pytest.mark.parametrize(
    ("cores", "per_domain", "expected"),
    [
        pytest.param(16, 4, ["0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"], id="EPYC 7282: a domain each"),
        pytest.param(16, 2, ["0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"], id="EPYC 7302P: two each"),
        pytest.param(16, 1, ["0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"], id="EPYC 7F52: four each"),
        pytest.param(18, 18, ["0-3,18-21", "4-8,22-26", "9-12,27-30", "13-17,31-35"], id="Xeon W-2295: one for all"),
    ],
)
def test_four_cards_on_one_socket(tmp_path: Path, cores: int, per_domain: int, expected: list[str]) -> None:
    allowed = write_host(tmp_path, cores=cores, per_domain=per_domain)
    domains = read_domains(allowed, tmp_path)
    assert len(domains) == cores // per_domain
    placed = place_workers(domains, [0, None, 0, None])
    assert [each.text for each in placed] == expected
    assert sum(each.cores for each in placed) == cores
    assert {cpu for each in placed for cpu in each.cpus} == allowed
    for each in placed:  # a core's two hardware threads stay together
        assert {cpu % cores for cpu in each.cpus} == {cpu % cores for cpu in each.cpus if cpu < cores}


def test_two_sockets_each_worker_near_its_card(tmp_path: Path) -> None:
    domains = read_domains(write_host(tmp_path, cores=32, per_domain=4, nodes=2), tmp_path)
    assert [domain.node for domain in domains] == [0] * 4 + [1] * 4
    texts = [each.text for each in place_workers(domains, [1, 0, 1, 1])]
    assert texts == ["16-19,48-51", "0-15,32-47", "20-23,52-55", "24-31,56-63"]
    # Where the slots are not known, both sockets take as many.
    sides = [min(each.cpus) // 16 for each in place_workers(domains, [None] * 4)]
    assert sorted(sides) == [0, 0, 1, 1]
    assert [min(each.cpus) // 16 for each in place_workers(domains, [0, None, 0, None])] == [0, 1, 0, 1]


def test_three_cards_take_all_cores_in_whole_domains(tmp_path: Path) -> None:
    domains = read_domains(write_host(tmp_path, cores=16, per_domain=4), tmp_path)
    assert [each.cores for each in place_workers(domains, [0, 0, 0])] == [4, 4, 8]


def test_what_may_not_be_used_is_left_out(tmp_path: Path) -> None:
    write_host(tmp_path, cores=16, per_domain=4)
    domains = read_domains({*range(4, 12)}, tmp_path)  # half of the cores, without their second threads
    assert [each.text for each in place_workers(domains, [0, 0])] == ["4-7", "8-11"]
    assert place_workers(read_domains({1}, tmp_path), [0, 0]) == []


def test_a_virtual_machine_that_tells_of_no_cache_is_cut_by_nodes(tmp_path: Path) -> None:
    domains = read_domains(write_host(tmp_path, cores=8, per_domain=4, nodes=2, with_cache=False), tmp_path)
    assert [(domain.node, len(domain.cores)) for domain in domains] == [(0, 4), (1, 4)]
    assert read_domains({0, 1}, tmp_path / "elsewhere") == [] and place_workers([], [0]) == []


def test_the_node_of_a_card(tmp_path: Path) -> None:
    driver, sysfs = tmp_path / "gpus", tmp_path / "sys"
    for bus, uuid, node in (
        ("0000:01:00.0", "GPU-aa", "0"),
        ("0000:C1:00.0", "GPU-bb", "1"),
        ("0000:41:00.0", "GPU-cc", "-1"),
    ):
        (driver / bus).mkdir(parents=True)
        (driver / bus / "information").write_text(f"Model: \t\t NVIDIA GeForce RTX 3090\nGPU UUID: \t {uuid}\n")
        (sysfs / "bus" / "pci" / "devices" / bus.lower()).mkdir(parents=True)
        (sysfs / "bus" / "pci" / "devices" / bus.lower() / "numa_node").write_text(node + "\n")
    assert [node_of_card(uuid, sysfs, driver) for uuid in ("GPU-aa", "GPU-bb", "GPU-cc", "GPU-dd")] == [
        0,
        1,
        None,
        None,
    ]


def test_what_the_user_says(tmp_path: Path) -> None:
    allowed = write_host(tmp_path, cores=16, per_domain=4)
    cards = ["GPU-a", "GPU-b"]
    assert placements_of("none", cards, allowed, tmp_path) == []
    assert [each.text for each in placements_of("auto", cards, allowed, tmp_path)] == ["0-7,16-23", "8-15,24-31"]
    own = placements_of(["0-3,16-19", "8"], cards, allowed, tmp_path)
    assert [(each.text, each.cores) for each in own] == [("0-3,16-19", 4), ("8", 1)]
    with pytest.raises(UserError, match=r"launch.cores: 1 lists for 2 workers; give one each, or `auto`"):
        placements_of(["0-3"], cards, allowed, tmp_path)
    with pytest.raises(UserError, match=r"launch.cores: 40-41: this process may not use CPU 40 of this host"):
        placements_of(["0", "40-41"], cards, allowed, tmp_path)


def test_lists_of_cpus() -> None:
    assert parse_ranges("0-3,16") == (0, 1, 2, 3, 16) and as_ranges((16, 3, 2, 1, 0)) == "0-3,16"
    for text in ("", "a", "3-1", "-1", "1--2", "0-99999999"):
        with pytest.raises(ValueError, match=r"."):
            parse_ranges(text)
    assert CacheDomain(0, ((0, 1),)).cores == ((0, 1),)
