"""A command of kohya's sd-scripts as a configuration: every option is mapped, or told why it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.sections.optimizer_config import FINDS_LR
from trainer.errors import UserError
from trainer.guards import parse_toml
from trainer.importing.command_text import Command, read_command
from trainer.importing.draft_end import found_beside, read_text, settled
from trainer.importing.given import Draft, parse_options, passed_over, typed_options
from trainer.importing.kohya_data import check_dataset_keys, data_of
from trainer.importing.kohya_options import NOTHING_HERE
from trainer.importing.kohya_training import (
    objective_of_options,
    optimizer_of_options,
    precision_of_options,
    rates_of_adapter,
    rates_of_full_training,
    samples_of_options,
    saving_of_options,
    schedule_of_options,
)
from trainer.importing.launched_by import launched

_USUAL_STEPS = 1600  # of sd-scripts


def import_file(place: Path, accelerate: Path | None = None) -> Draft:
    """The configuration of a shell script or TOML file.

    Args:
        accelerate: accelerate's YAML file, which says how many processes there are.
    Raises:
        UserError: the file cannot be read, or holds no command that can be understood.
    """
    text = read_text(place)
    if place.suffix.lower() == ".toml":
        table = parse_toml(text, str(place))
        if "datasets" in table:
            rule = "is a dataset file; give the command or the arguments' file that names it by dataset_config"
            raise UserError(f"{place}: {rule}")
        if isinstance(table.get("prompt"), dict):
            raise UserError(
                f"{place}: is a file of prompts, for samples.prompt_file; give the arguments' file or command"
            )
        return import_options(typed_options(table, str(place)), Command(), accelerate, place.parent)
    return import_command(read_command(text, str(place)), str(place), accelerate)


def import_command(command: Command, place: str, accelerate: Path | None = None) -> Draft:
    """The configuration of a command.

    Raises:
        UserError: with the option that cannot be understood.
    """
    given = parse_options(command.words, place)
    if file := given.get("config_file"):
        path = found_beside(file if str(file).endswith(".toml") else f"{file}.toml", Path(place).parent)
        given = typed_options(parse_toml(read_text(path), str(path)), str(path)) | given
    return import_options(given, command, accelerate, Path(place).parent)


def import_options(
    given: Mapping[str, Any], command: Command, accelerate: Path | None = None, folder: Path = Path()
) -> Draft:
    """The configuration of options by name.

    Args:
        folder: where files that are named lie, if not here.
    """
    draft = Draft(given, reasons=NOTHING_HERE | passed_over(given))
    workers, stage = launched(draft, command, accelerate)
    has_adapter = command.script == "sdxl_train_network" or (not command.script and "network_module" in given)
    _run_and_model(draft, workers)
    dataset = None
    if file := given.get("dataset_config"):
        path = found_beside(file, folder)
        dataset = parse_toml(read_text(path), str(path))
        check_dataset_keys(draft, dataset, str(path))
    steps = _length(draft, has_adapter=has_adapter)
    precision_of_options(draft, has_adapter=has_adapter)
    (rates_of_adapter if has_adapter else rates_of_full_training)(draft)
    kind = optimizer_of_options(draft)
    schedule_of_options(draft, kind, steps, workers)
    objective_of_options(draft)
    data_of(draft, dataset)
    saving_of_options(draft)
    samples_of_options(draft, folder)
    _memory(draft, workers, stage, has_adapter=has_adapter)
    draft.leave("config_file", "its options are taken as if they stood in the command")
    return settled(draft)


def _run_and_model(draft: Draft, workers: int | None) -> None:
    folder, name = draft.take("output_dir", "runs"), draft.take("output_name", "last")
    run_dir = str(Path(folder) / name)
    draft.put("run.dir", run_dir, "output_dir", "output_name")
    draft.put("data.prepared", f"{run_dir}-prepared")
    if draft.take("seed") is not None:
        draft.put("run.seed", draft.take("seed"), "seed")
    if workers is not None:
        draft.put("launch.workers", workers)
    if draft.take("pretrained_model_name_or_path") is None:
        raise UserError("--pretrained_model_name_or_path: missing; it is the model to start from")
    draft.put("model.path", draft.take("pretrained_model_name_or_path"), "pretrained_model_name_or_path")
    if vae := draft.take("vae"):
        draft.put("model.vae", vae, "vae")


def _length(draft: Draft, *, has_adapter: bool) -> int | None:
    """Batch and length; the steps, where they are told."""
    draft.put("train.batch_size_per_gpu", draft.take("train_batch_size", 1), "train_batch_size")
    if (passes := draft.take("gradient_accumulation_steps", 1)) != 1:
        draft.put("train.gradient_accumulation_steps", passes, "gradient_accumulation_steps")
    draft.put("train.max_grad_norm", draft.take("max_grad_norm", 1.0), "max_grad_norm")
    if has_adapter:
        draft.leave("torch_compile", "compiled blocks have not been tried with adapters")
    elif draft.take("torch_compile"):
        draft.put("train.compile", "blocks", "torch_compile")
    if (epochs := draft.take("max_train_epochs")) is not None:
        draft.put("train.epochs", epochs, "max_train_epochs")
        draft.leave("max_train_steps", "max_train_epochs counts")
        return None
    steps = draft.take("max_train_steps", _USUAL_STEPS)
    draft.put("train.steps", steps, "max_train_steps")
    return steps


def _memory(draft: Draft, workers: int | None, stage: int | None, *, has_adapter: bool) -> None:
    wished = draft.take("zero_stage", 2) if draft.take("deepspeed") else stage
    if wished in (2, 3) and not has_adapter and workers != 1:
        draft.put("memory.strategy", f"zero{wished}", "deepspeed", "zero_stage")
    draft.leave("deepspeed", "one worker, or an adapter, has nothing to spread")
    fused = [name for name in ("fused_backward_pass", "fused_optimizer_groups") if draft.take(name)]
    alone = workers == 1 and "gradient_accumulation_steps" not in draft.sections["train"]
    alone = alone and draft.sections["optimizer"]["kind"] not in FINDS_LR
    for name in fused:
        if alone and not has_adapter and draft.sections["train"]["precision"] != "fp16":
            draft.put("memory.release_gradients", True, name)
        draft.leave(name, "needs one worker, one pass a step and given learning rates (memory.release_gradients)")
