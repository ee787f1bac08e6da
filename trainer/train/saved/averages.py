"""A run's averages of its weights: begun, taken up again, kept up with the steps, saved, and scored in the model."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.ema_folders import SNAPSHOTS, average_folder, drop_snapshots_after, snapshot_dir
from trainer.checkpoint.run_dir import prune_checkpoints, read_state
from trainer.checkpoint.saver import Folder
from trainer.checkpoint.write import WEIGHTS_FILES, read_tensors
from trainer.config.sections.ema_config import LIVE, AverageConfig, EmaConfig
from trainer.optim.ema import (
    Averages,
    begin_average,
    kahan_corrections,
    leave_out_step,
    start_averages,
    update_averages,
    update_when_due,
)
from trainer.optim.ema_contents import load_ema_tensors, load_progress
from trainer.optim.ema_profile import PlainEma, PowerEma, Profile
from trainer.optim.ema_swap import averaged_weights
from trainer.optim.kinds.schedule_free import average_in_model, averages_weights
from trainer.optim.precision import DTYPES
from trainer.parallel.strategy import Strategy
from trainer.train.saved.checkpoint_contents import average_files, trained_components
from trainer.train.step import StepParts, StepResult

_log = logging.getLogger(__name__)
RECORD = "ema"  # key of a checkpoint's state


def averages_of(config: EmaConfig, strategy: Strategy) -> Averages | None:
    """The averages that are wanted, as the weights are at the start; None where none is."""
    if not config.averages:
        return None
    profiles = {average.name: _profile(average) for average in config.averages}
    return start_averages(strategy.ever_trained, profiles, place=config.place, update_every=config.update_every)


def _profile(average: AverageConfig) -> Profile:
    return PlainEma(average.decay, average.warm_up) if average.kind == "plain" else PowerEma(average.length)


def take_up_averages(parts: StepParts, checkpoint: Path) -> None:
    """Go on with a checkpoint's averages, to the bit; what it does not hold begins as the weights are now.

    Call it when the optimizer has its state again.

    Raises:
        UserError: an average cannot go on as another kind.
    """
    averages, state = parts.averages, read_state(checkpoint)
    step = int(str(state["step"]))
    record: Any = state.get(RECORD, {"step": step, "averages": {}})
    wanted = [*averages.profiles] if averages else []
    dropped = [name for name in record["averages"] if name not in wanted]
    if dropped:
        _log.warning("%s: given up with this start: ema.averages does not name it", _listed(dropped))
    if averages is None:
        return
    load_progress(averages, record)
    for name in wanted:
        if name in record["averages"]:
            load_ema_tensors(averages, name, parts.strategy.ever_trained, _stored_tensors(parts, checkpoint, name))
    fresh = [name for name in wanted if name not in record["averages"]]
    if not fresh:
        return
    corrections = _corrections(parts, averages)
    if averages.step < step:  # so that all count from the same step on
        update_averages(averages, parts.strategy.ever_trained, step, corrections)
    for name in fresh:
        begin_average(averages, name, parts.strategy.ever_trained, corrections)
    _log.warning("%s: begins at step %d, as the weights are now: %s holds none", _listed(fresh), step, checkpoint)


def _listed(names: list[str]) -> str:
    return f"average{'s' * (len(names) > 1)} {', '.join(names)}"


def _stored_tensors(parts: StepParts, checkpoint: Path, average: str) -> Iterator[tuple[str, Tensor]]:
    """By the names of the parameters that train; what was frozen, and still is, is no part of the average."""
    averaged = parts.strategy.ever_trained
    for each in trained_components(parts.denoiser.model):
        file = checkpoint / average_folder(each.folder, average) / WEIGHTS_FILES[each.folder]
        for stored, tensor in read_tensors(file) if file.is_file() else ():
            name = each.names.get(stored)
            if name is not None and name in averaged:
                yield name, tensor


def _corrections(parts: StepParts, averages: Averages) -> Mapping[str, Tensor]:
    """Of bf16 weights with Kahan summation; others have none."""
    return kahan_corrections(parts.optimizer, parts.strategy.parameters) if averages.in_chunks else {}


def follow(parts: StepParts, step: int, result: StepResult) -> None:
    """Take the weights after `step` steps of the run into the averages, if there are any, and if the step changed them.

    A step that was skipped, or that had no image, is no step of the averages. Of workers that take steps each by
    itself, the weights are those that all have in common, once they are new.
    """
    averages, outer = parts.averages, parts.strategy.outer
    if averages is None:
        return
    if outer:
        if not result.took_effect:
            leave_out_step(averages)
        if outer.is_renewed and averages.step < step:
            with outer.in_model():
                update_when_due(averages, parts.strategy.ever_trained, step)
    elif result.took_effect:
        update_when_due(averages, parts.strategy.ever_trained, step, _corrections(parts, averages))
    else:
        leave_out_step(averages)


def averages_record(parts: StepParts) -> dict[str, object]:
    """What a checkpoint's state says of the averages, beside the rest of it."""
    return {RECORD: parts.averages.to_json()} if parts.averages else {}


def forget_snapshots_after(run_dir: Path, step: int) -> None:
    """The run goes on from a step before them, and may take another way; rank 0 calls it."""
    for path in drop_snapshots_after(run_dir, step):
        _log.info("%s: deleted, for the run goes on from step %d", path, step)


def snapshot_is_due(config: EmaConfig, step: int) -> bool:
    """Whether `ema.snapshots` asks for one after so many steps."""
    return bool(config.snapshots.every_steps) and step % config.snapshots.every_steps == 0


def snapshot_folder(config: EmaConfig, run_dir: Path, parts: StepParts, step: int) -> Folder:
    """A snapshot of the power averages as they are."""
    settings, path = config.snapshots, snapshot_dir(run_dir, step)
    names = [average.name for average in config.averages if average.kind == "power"]
    dtype = None if settings.dtype == "fp32" else DTYPES[settings.dtype]
    published = partial(prune_checkpoints, run_dir, settings.keep, folder=SNAPSHOTS)
    return Folder(path, average_files(parts, names, dtype), averages_record(parts), published)


def scored_weights(config: EmaConfig, parts: StepParts) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What `ema.score` names, each with a context in which the model has these weights, gathered on every worker."""
    outer = parts.strategy.outer
    plain = outer.in_model if outer else parts.strategy.gathered
    live = partial(_average_of_training, parts) if averages_weights(parts.optimizer) else plain
    return {name: live if name == LIVE else partial(_in_model, parts, name) for name in config.score}


@contextmanager
def _average_of_training(parts: StepParts) -> Iterator[None]:
    """The optimizer's own average, where there is one, and not the weights that train."""
    with average_in_model(parts.optimizer, parts.strategy.parameters), parts.strategy.gathered():
        yield


@contextmanager
def _in_model(parts: StepParts, average: str) -> Iterator[None]:
    assert parts.averages is not None
    with averaged_weights(parts.averages, average, parts.strategy.ever_trained), parts.strategy.gathered():
        yield
