"""One worker of real runs whose workers take steps each by itself; each is run through, and once with a stop.

Arguments: FOLDER MODEL PREPARED, then names of `RUNS`. With three workers: a run is in `FOLDER/NAME-through` and
`FOLDER/NAME-stopped`, and `FOLDER/NAME-at-stop` is a copy of that as it was stopped. With fewer:
`FOLDER/NAME-fewer-WORLD` goes on from there. `FOLDER/NAME-shared` goes on with three workers that share each step.
"""

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.wire.exchanged_run_script import STOP, config_of, train
from trainer.faults import FAULT
from trainer.parallel.comm import Comm, barrier, close, init_comm
from trainer.parallel.worker import end_process

PAPER = {"outer_lr": 0.7, "outer_momentum": 0.9}
EVERY_4 = {"average_every": 4, **PAPER}
LINEAR = {
    "optimizer": {"lr": 1e3, "eps": 1e4, "weight_decay": 0.0},  # AdamW's first update is then 0.1 times the gradient
    "train": {"steps": 2, "max_grad_norm": 0.0},
    "checkpoint": {"every_steps": 1},
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"exchange": EVERY_4},
    "at_the_stop": {
        "exchange": {"average_every": STOP, **PAPER},
        "ema": {"averages": [{"warm_up": False, "decay": 0.9}]},
    },
    "narrow": {
        "exchange": EVERY_4 | {"method": "int8", "outer_place": "host"},
        "train": {"precision": "bf16_stochastic", "global_batch_size": 12},
        "optimizer": {"kind": "adamw_8bit"},
    },
    "streamed": {"exchange": EVERY_4 | {"fragments": 2, "overlap_steps": 2}, "ema": {"averages": [{"kind": "plain"}]}},
    "streamed_narrow": {
        "exchange": EVERY_4 | {"fragments": 4, "overlap_steps": 1, "method": "int8"},
        "train": {"precision": "bf16_stochastic"},
        "optimizer": {"kind": "lion"},
    },
    "nan": {"exchange": EVERY_4},  # in a step of its own
    "alone": {"exchange": EVERY_4} | LINEAR,
    "together": LINEAR,
}
FAULTS = {"nan": "nan_loss@1:2"}
GOES_ON = ("plain", "streamed")


def main() -> None:
    folder, model, prepared, *names = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comm = init_comm(timeout_s=600)
    for name in names:
        os.environ[FAULT] = FAULTS.get(name, "")
        print(f"run {name}", flush=True)
        if comm.world == 3:
            run_through_and_stopped(Path(folder), model, prepared, name, comm)
        else:
            train(config_of(Path(folder), model, prepared, name, f"fewer-{comm.world}", RUNS), comm)
    close(comm)
    end_process()


def run_through_and_stopped(folder: Path, model: str, prepared: str, name: str, comm: Comm) -> None:
    train(config_of(folder, model, prepared, name, "through", RUNS), comm)
    if name in ("alone", "together"):
        return
    stopped = config_of(folder, model, prepared, name, "stopped", RUNS)
    train(stopped, comm, STOP)
    if comm.rank == 0:
        for way in ("at-stop", "shared", "fewer-2", "fewer-1"):
            if way == "at-stop" or name in GOES_ON:
                shutil.copytree(stopped.run.dir, folder / f"{name}-{way}")
    barrier(comm)
    train(stopped, comm)
    if name in GOES_ON:
        print(f"run {name} shared", flush=True)
        shared = {name: {key: value for key, value in RUNS[name].items() if key != "exchange"}}
        train(config_of(folder, model, prepared, name, "shared", shared), comm)


if __name__ == "__main__":
    main()
