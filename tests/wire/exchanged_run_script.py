"""One worker of real runs whose gradients travel in several ways; each is run through, and once with a stop.

Arguments: FOLDER MODEL PREPARED, then names of `RUNS`. A run is in `FOLDER/NAME-through` and `FOLDER/NAME-stopped`.
With two workers: `FOLDER/NAME-fewer` goes on from where `NAME-stopped` was stopped.
"""

import logging
import os
import shutil
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.faults import FAULT
from trainer.model_files.run_model import open_model
from trainer.parallel.comm import Comm, barrier, close, init_comm
from trainer.parallel.worker import end_process
from trainer.train import loop

STEPS, STOP = 6, 3
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"exchange": {"method": "bf16"}},
    "int8": {"exchange": {"method": "int8"}, "train": {"precision": "bf16_stochastic"}},
    "int4": {"exchange": {"method": "int4"}, "train": {"global_batch_size": 12}, "memory": {"budget": "4GiB"}},
    "int4_random": {"exchange": {"method": "int4", "error_feedback": False}},
    "powersgd": {"exchange": {"method": "powersgd", "rank": 2, "plain_steps": 1}},
    "powersgd_narrow": {"exchange": {"method": "powersgd"}, "train": {"precision": "bf16_stochastic"}},
    "nan": {"exchange": {"method": "int4"}},  # in a step of its own
}
FAULTS = {"nan": "nan_loss@1:2"}


def config_of(
    folder: Path, model: str, prepared: str, name: str, way: str, runs: Mapping[str, dict[str, Any]] = RUNS
) -> Config:
    sections: dict[str, Any] = {
        "run": {"dir": str(folder / f"{name}-{way}"), "seed": 5},
        "model": {"path": model},
        "data": {"sources": [{"path": "."}], "prepared": prepared, "workers": 0},
        "train": {"batch_size_per_gpu": 2, "global_batch_size": 6, "precision": "fp32", "steps": STEPS},
        "optimizer": {"lr": 1e-3},
        "guard": {"replica_check_every": 2},
        "checkpoint": {"every_steps": STOP, "keep": 5},
    }
    for section, values in runs[name].items():
        sections[section] = sections.get(section, {}) | values
    return Config.model_validate(sections)


def train(config: Config, comm: Comm, stop_after: int | None = None) -> None:
    calls = count(1)
    model = open_model(config.model.path, None, None, "correct")
    loop.train(config, model, comm, lambda: next(calls) == stop_after)


def main() -> None:
    folder, model, prepared, *names = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comm = init_comm(timeout_s=600)
    for name in names:
        os.environ[FAULT] = FAULTS.get(name, "")
        print(f"run {name}", flush=True)
        if comm.world == 3:
            train(config_of(Path(folder), model, prepared, name, "through"), comm)
            stopped = config_of(Path(folder), model, prepared, name, "stopped")
            train(stopped, comm, STOP)
            if comm.rank == 0:
                shutil.copytree(stopped.run.dir, Path(folder) / f"{name}-fewer")
            barrier(comm)
            train(stopped, comm)
        else:
            train(config_of(Path(folder), model, prepared, name, "fewer"), comm)
    close(comm)
    end_process()


if __name__ == "__main__":
    main()
