"""`sdxl-train CONFIG.yaml`: check everything that can be checked at once, prepare what is missing, train."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from trainer.checkpoint.run_dir import list_checkpoints, only_writer
from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.keep_running import write_resolved
from trainer.cli.prepare_set import await_prepared, ensure_prepared
from trainer.cli.start_workers import count_run_tags, start_workers
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.measure.trackers.tracked_run import require_packages
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import detect_gpus, interface_settings, joined_environment
from trainer.parallel.launch import allocator_settings
from trainer.train.caption_rules import check_captions


def main(argv: Sequence[str]) -> int:
    """Train from a config, or go on where its run stopped."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train",
        description=main.__doc__,
        epilog="example: sdxl-train configs/4x3090.yaml optimizer.lr=1e-6 train.epochs=2",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", metavar="HOW", help="auto (default), true, false or a checkpoint; the same as run.resume=HOW"
    )
    arguments = parser.parse_intermixed_args(argv)
    overrides = [*arguments.overrides, *([f"run.resume={arguments.resume}"] if arguments.resume else [])]
    config, model = read_run(arguments.config, overrides)
    joined = joined_environment(os.environ)
    if not (joined and config.run.on_local_disks):  # there, what one host lacks another may have
        _check_resume(config)
    require_packages(config.log.trackers)
    if joined is not None:
        return _join(config, model, joined)
    with only_writer(config.run.dir):
        code = ensure_prepared(config, model)
        if code:
            return code
        check_captions(config)
        count_run_tags(config)
        return start_workers("train", config, config.run.dir, {})


def _join(config: Config, model: RunModel, joined: dict[str, str]) -> int:
    """Be one worker of a job that torchrun or SLURM has started; its rank 0 prepares the data for all."""
    from trainer.cli.tasks import run_task
    from trainer.parallel.worker import run_worker

    with ExitStack() as stack:
        if joined["RANK"] == "0":
            stack.enter_context(only_writer(config.run.dir))
            code = ensure_prepared(config, model)
            if code:
                return code
            check_captions(config)
            count_run_tags(config)
            write_resolved(config, config.run.dir)
        else:
            await_prepared(config, model)
        os.environ.update(joined | interface_settings(joined) | allocator_settings(os.environ, bool(detect_gpus())))
        run_worker(lambda stop_requested: run_task("train", config, {}, stop_requested))
    return 0


def _check_resume(config: Config) -> None:
    """Refuse at once what `run.resume` forbids."""
    run_dir, wish = config.run.dir, config.run.resume
    if isinstance(wish, str) and wish != "auto":
        if not Path(wish).is_dir():
            raise UserError(f"run.resume = {wish}: no such checkpoint folder; give auto, true, false or its path")
        return
    existing = list_checkpoints(run_dir)
    if wish is True and not existing:
        raise UserError(f"run.resume = true: no checkpoint in {run_dir}; auto starts fresh where there is none")
    if wish is False and existing:
        raise UserError(
            f"run.resume = false: {run_dir} already holds a run ({existing[-1].name}); "
            "choose another run.dir, delete it, or go on with run.resume=auto"
        )
