"""What each worker process runs, with the arguments TASK CONFIG OPTIONS. Not for people."""

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.model_files.run_model import RunModel, open_model
from trainer.package_files import UNASKED, hold_back
from trainer.parallel.worker import be_its_reader_server, run_worker

if TYPE_CHECKING:
    from trainer.parallel.comm import Comm

_log = logging.getLogger(__name__)


def main() -> None:
    """Run one task in this worker; a failure is recorded for the parent to show."""
    task, config_path, options = sys.argv[1:4]

    def body(stop_requested: Callable[[], bool]) -> None:
        run_task(task, load_config(Path(config_path), check_paths=False), json.loads(options), stop_requested)

    run_worker(body)


def run_task(task: str, config: Config, options: dict[str, Any], stop_requested: Callable[[], bool]) -> None:
    """Join the other workers and do this worker's part of `task`."""
    hold_back(*UNASKED)
    if task == "prepare":
        # Without a process group: a worker that is slow, or gone, holds up nobody. A stop signal may end it anywhere,
        # for what is finished is on the disk and the rest is done anew.
        from trainer.train.workers.prepare_worker import encode_share

        encode_share(config, _model_of(config), options.get("part"))
        return
    if config.data.workers:
        from trainer.data.reader_processes import fork_reader_server

        fork_reader_server(be_its_reader_server)  # before there are threads, or a device
    from trainer.measure.progress import open_log
    from trainer.optim.precision import set_fp32_arithmetic
    from trainer.parallel.comm import close, init_comm
    from trainer.parallel.environment import set_nccl

    settings = set_nccl(config.launch.nccl, os.environ)
    comm, model = init_comm(), _model_of(config)
    set_fp32_arithmetic(config.train.precision)
    if task == "train":
        from trainer.train.saved.across_hosts import require_agreement

        require_agreement(config, model, comm)
    with ExitStack() as stack:
        if task == "train" and config.run.on_local_disks:
            _hold_run_dir(stack, config, comm)
        stack.enter_context(open_log(config.run.dir, comm.rank))
        if settings and comm.device.type == "cuda" and comm.world > 1:
            _log.info("NCCL's settings: %s", " ".join(settings))
        if task == "train":
            from trainer.train.loop import train

            train(config, model, comm, stop_requested)
        elif task in ("bench", "bench_optimizer"):
            from trainer.train.workers.bench_worker import bench
            from trainer.train.workers.optimizer_worker import bench_optimizer

            measure, result = bench if task == "bench" else bench_optimizer, Path(options["result"])
            measure(config, model, comm, options["steps"], options["warmup"], options["prepared"], result)
        else:
            from trainer.train.workers import eval_worker as judge

            weights, out_dir, average = Path(options["weights"]), Path(options["out_dir"]), options["average"]
            if task == "evaluate":
                quality = judge.QualityWish.from_json(options.get("quality"))
                against = Path(options["against"]) if options.get("against") else None
                judge.evaluate_weights(config, model, comm, weights, out_dir, average, quality, against)
            else:
                judge.sample_weights(config, model, comm, weights, out_dir, average)
    close(comm)


def _hold_run_dir(stack: ExitStack, config: Config, comm: "Comm") -> None:
    """On another host's disk than the first, what the command does on that: one worker holds the run directory."""
    from trainer.checkpoint.run_dir import only_writer
    from trainer.cli.keep_running import write_resolved
    from trainer.disks.run_disks import disks_of, refusing_together

    disks = disks_of(comm, local=True)
    with refusing_together(disks):
        if disks.is_first and comm.rank:
            stack.enter_context(only_writer(config.run.dir))
            write_resolved(config, config.run.dir)


def _model_of(config: Config) -> RunModel:
    model = config.model
    return open_model(model.path, model.vae, model.tokenizer, model.text_projection, config.limits.plain())
