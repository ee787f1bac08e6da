"""The section `guard`: what a run does about numbers that cannot be right."""

from typing import Annotated

from pydantic import Field

from trainer.config.values import Count, Flag, Section


class GuardConfig(Section):
    """Steps that are skipped, data that is left out, workers whose weights differ."""

    spike_sigma: Annotated[float, Field(ge=0)] = 6.0
    """A step is skipped, on all workers, if its loss or gradient norm lies more than so many standard deviations (of
    the logarithms) above the mean of the latest `window` steps, the loss also above twice of it, the norm above four
    times. 0: only a loss or gradients that are not finite are. `skipped.jsonl` in `run.dir` has the images' keys."""
    window: Annotated[int, Field(ge=16, le=65536)] = 128
    """Steps that are looked back on; nothing is called a spike before half as many are known. After a roll-back, at
    most so many steps of data are left out."""
    rollback: Flag = True
    """When three steps in a row are skipped, training goes on from the newest checkpoint before them, without the data
    that came after it. If that does not help, it ends. `false`: it ends at once."""
    replica_check_every: Count = 100
    """Optimizer steps between comparisons of the weights that several workers hold (`ddp`: all of them;
    `memory.shard_within`: the same share): where they differ, a card has computed or stored something wrong. They are
    compared before every checkpoint, too. 0: never."""
