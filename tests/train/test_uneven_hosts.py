"""Whether the workers of several hosts make one group each."""

from trainer.train.saved.across_hosts import uneven_hosts

HOSTS = ["a", "a", "b", "b"]


def test_rows_of_one_length() -> None:
    assert uneven_hosts("memory.shard_within = host", [(0, 2), (1, 2), (0, 2), (1, 2)], HOSTS) is None


def test_hosts_with_other_numbers_of_workers() -> None:
    said = uneven_hosts("memory.shard_within = host", [(0, 3), (1, 3), (2, 3), (0, 1)], ["a", "a", "a", "b"])
    assert said == "memory.shard_within = host: a has 3 workers and b 1: start as many on each host"


def test_ranks_that_go_from_host_to_host() -> None:
    said = uneven_hosts("memory.shard_within = host", [(0, 2), (0, 2), (1, 2), (1, 2)], ["a", "b", "a", "b"])
    assert said == (
        "memory.shard_within = host: worker 1 is number 0 on b: give the hosts' workers neighbouring ranks, with SLURM "
        "by --distribution=block"
    )
