"""The keys of `launch`: worker processes on this host, and what is done when one of them, or the host, fails."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.values import Count, CpuList, Flag, NcclSettings, PositiveInt, Section


class LaunchConfig(Section):
    workers: PositiveInt | None = None
    """Worker processes on this host. Default: one per GPU; without a GPU, one."""
    threads_per_worker: PositiveInt | None = None
    """OpenMP threads of each worker. Default: its own cores, or those of this host divided by the workers."""
    cores: Literal["auto", "none"] | list[CpuList] = "auto"
    """Which CPU cores a worker and its readers run on. `auto`: with cards, those that share a level-3 cache, near the
    worker's card, a fair share each; without cards, all. `none`: all. Or a list for each worker, such as
    `["0-3,16-19", "4-7,20-23"]`. Workers that torchrun or SLURM starts are placed by these."""
    nccl: NcclSettings = {}
    """Settings of NCCL for workers on cards, such as `{NCCL_MAX_NCHANNELS: 4}`; those of the shell go first, and the
    log of a run's start has all. `sdxl-train doctor --tune-nccl` measures which make this machine's exchange faster."""
    restarts: Count = 3
    """After a fault (a worker that is killed, crashes or hangs), training goes on from the newest checkpoint by itself;
    it ends when so many starts in a row have brought no new checkpoint. 0: every fault ends it."""
    hang_after_s: Annotated[float, Field(gt=0)] = 60.0
    """A worker hangs if a part of its work (data, a step, a checkpoint, ...) takes longer than this and than five times
    the longest that this part took before. All are then ended; `logs/rank-K.stacks.txt` has where they were."""
    hang_at_start_s: Annotated[float, Field(gt=0)] = 1800.0
    """The same, while a part of the work has been done fewer than three times: loading, first steps, compilation."""
    fewer_cards: Flag = True
    """When a card is gone from the bus, has broken memory, or its worker alone fails twice in a row, go on without it,
    with the same images in each step; the command's next start takes all cards that are there. `false`: end."""
    recycle_at_growth_gib: Annotated[float, Field(ge=0)] = 8.0
    """When a worker, with its readers, holds so many GiB more memory than after its first 200 steps, the copies for a
    checkpoint aside, all workers save, end and start again, which changes nothing of the result. 0: never."""
    recycle_at_free_gib: Annotated[float, Field(ge=0)] = 2.0
    """The same when the host has fewer GiB left than this and the workers have grown by at least a quarter of it. 0:
    never."""
    watch_every_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks at cards, memory and disk; once a minute they are written to `host.jsonl`."""
    hot_c: PositiveInt = 85
    """Temperature of a card, in degrees Celsius, from which a warning is given."""
