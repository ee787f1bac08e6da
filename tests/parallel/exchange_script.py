"""One worker of two that share a small model; one of them is late. Arguments: FOLDER KIND LATE_RANK SECONDS STEPS.

Writes the seconds that each phase of each step took to FOLDER/KIND-RANK.json, and the sizes of DDP's buckets.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from trainer.measure.step_clock import StepClock
from trainer.parallel.comm import close, init_comm
from trainer.parallel.sharding import copy_share
from trainer.parallel.strategy import Sharing, make_strategy, timed, warm_up
from trainer.parallel.worker import end_process


def main() -> None:
    folder, kind, late, seconds, steps = sys.argv[1:]
    comm = init_comm(timeout_s=600)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    source = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def fill(empty: nn.Module) -> None:
        for own, whole in zip(empty.parameters(), source.parameters(), strict=True):
            copy_share(own, whole.detach())

    sharing = Sharing(kind, bucket_mib=0.004)  # type: ignore[arg-type]
    strategy = make_strategy(model, sharing, list(model), (), comm, fill)
    clock = StepClock(comm.device)
    strategy, is_known = timed(strategy, clock, comm.device)
    images = torch.randn(8, 64)
    warm_up(strategy, lambda wrapped: wrapped(images).square().mean())
    clock.start()
    taken = []
    for _ in range(int(steps)):
        with strategy.reduction(last=True):
            clock.mark("forward")
            if comm.rank == int(late):
                time.sleep(float(seconds))
            loss = strategy.model(images).square().mean()
            clock.mark("backward")
            strategy.backward(loss)
        clock.mark("optimizer")
        strategy.clear_gradients()
        taken.append(clock.take())
    found = {"is_known": is_known, "steps": taken}
    if kind == "ddp":  # as DDP has put them together after the first pass
        found["buckets"] = strategy.model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    (Path(folder) / f"{kind}-{comm.rank}.json").write_text(json.dumps(found))
    close(comm)
    end_process()


main()
