"""How many workers share one whole model among them, where several groups of workers each hold one; no torch.

With one group every worker has a share of its own. With several, those at the same place of their groups have the same
share: replicas. Weights are gathered and gradients added up within a group, and replicas add up the sums
(hierarchical or hybrid sharding, HSDP: Zhao et al. 2023, section 3.2.2).
"""

from trainer.errors import UserError

_KEY = "memory.shard_within"


def workers_within(wish: str | int, workers: int, workers_here: int) -> int:
    """Workers of a group.

    Args:
        wish: `all`: one group; `host`: the workers of a host; or how many.
        workers: of the whole run; `workers_here`: of this host.

    Raises:
        UserError: groups of this size do not come out even, or are of one worker.
    """
    if wish == "all" or workers == 1:
        return workers
    within = workers_here if wish == "host" else int(wish)
    if workers % within:
        whose = f"the run's {workers} workers" + (f", {within} of them on this host" if wish == "host" else "")
        mend = "start as many on each host" if wish == "host" else "give a number that divides them, or `all`"
        raise UserError(f"{_KEY} = {wish}: {whose} do not make groups of {within}; {mend}")
    if within == 1:
        raise UserError(
            f"{_KEY} = {wish}: a host has one worker, with whom nobody shares; use `all`, or strategy `ddp`"
        )
    return within
