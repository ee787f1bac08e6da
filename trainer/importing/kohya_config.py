"""A command of kohya's sd-scripts as a configuration: every option is mapped, or told why it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.config.yaml_source import YamlError, dump, parse
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, read_bytes
from trainer.importing.command_text import Command, read_command, read_toml
from trainer.importing.given import Draft, parse_options, typed_options
from trainer.importing.kohya_data import data_of
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

_USUAL_STEPS = 1600  # of sd-scripts
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")
_IDLE = ("has no effect", "must be left out")
_ORDER = (
    "run", "launch", "model", "data", "captions", "trainable", "adapter", "train", "objective", "optimizer",
    "lr_schedule", "checkpoint", "validation", "samples", "memory",
)  # fmt: skip


def import_file(place: Path, accelerate: Path | None = None) -> Draft:
    """The configuration of a shell script or TOML file.

    Args:
        accelerate: accelerate's YAML file, which says how many processes there are.
    Raises:
        UserError: the file cannot be read, or holds no command that can be understood.
    """
    text = read_text(place)
    if place.suffix.lower() == ".toml":
        table = read_toml(text, str(place))
        if "datasets" in table:
            rule = "is a dataset file; give the command or the arguments' file that names it by dataset_config"
            raise UserError(f"{place}: {rule}")
        return import_options(typed_options(table, str(place)), Command(), accelerate)
    return import_command(read_command(text, str(place)), str(place), accelerate)


def import_command(command: Command, place: str, accelerate: Path | None = None) -> Draft:
    """The configuration of a command.

    Raises:
        UserError: with the option that cannot be understood.
    """
    given = parse_options(command.words, place)
    if file := given.get("config_file"):
        path = Path(file if str(file).endswith(".toml") else f"{file}.toml").expanduser()
        given = typed_options(read_toml(read_text(path), str(path)), str(path)) | given
    return import_options(given, command, accelerate)


def import_options(given: Mapping[str, Any], command: Command, accelerate: Path | None = None) -> Draft:
    """The configuration of options by name."""
    draft = Draft(given)
    workers, stage = _launched(command, accelerate)
    has_adapter = command.script == "sdxl_train_network" or (not command.script and "network_module" in given)
    _run_and_model(draft, workers)
    dataset = None
    if file := given.get("dataset_config"):
        path = Path(file).expanduser()
        dataset = read_toml(read_text(path), str(path))
    steps = _length(draft, has_adapter=has_adapter)
    precision_of_options(draft, has_adapter=has_adapter)
    (rates_of_adapter if has_adapter else rates_of_full_training)(draft)
    kind = optimizer_of_options(draft)
    schedule_of_options(draft, kind, steps, workers)
    objective_of_options(draft)
    data_of(draft, dataset)
    saving_of_options(draft)
    samples_of_options(draft)
    _memory(draft, workers, stage, has_adapter=has_adapter)
    draft.leave("config_file", "its options are taken as if they stood in the command")
    _drop_what_does_nothing(draft)
    draft.finish()
    for option, value in given.items():
        if isinstance(value, str) and (found := _VARIABLE.search(value)):
            draft.notes.insert(
                0, f"--{option} {value}: {found[0]} is set nowhere in the script; put in what it stands for"
            )
    draft.sections = {name: draft.sections[name] for name in _ORDER if name in draft.sections}
    return draft


def read_text(path: Path) -> str:
    """A small text file from outside.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return read_bytes(path, DEFAULT_LIMITS.config_bytes).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text in UTF-8") from None


def as_yaml(draft: Draft, told: str) -> str:
    """The file: how to use it, what to know, and the keys."""
    lines = [f"# Imported from {told}.", "#", "#   sdxl-train plan THIS_FILE", "#   sdxl-train THIS_FILE"]
    for note in draft.notes:
        lines += ["#", *_wrapped(f"- {note}")]
    return "\n".join(lines) + "\n\n" + dump(draft.sections)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="#   ")


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


def _launched(command: Command, accelerate: Path | None) -> tuple[int | None, int | None]:
    """(processes, DeepSpeed's ZeRO stage) of accelerate, where they are told."""
    workers: int | None = None
    stage: int | None = None
    if accelerate is not None:
        table = _yaml_table(accelerate)
        workers = _whole(table.get("num_processes"))
        deepspeed = table.get("deepspeed_config")
        stage = _whole(deepspeed.get("zero_stage")) if isinstance(deepspeed, dict) else None
    words = [*command.launch]
    for i, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if name in ("--num_processes", "--nproc_per_node", "--nproc-per-node"):
            workers = _whole(value if has_value else (words[i + 1] if i + 1 < len(words) else None))
    return workers, stage


def _yaml_table(path: Path) -> dict[str, Any]:
    try:
        value = parse(read_text(path)).value
    except YamlError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold keys and values, as accelerate writes them")
    return value


def _whole(value: object) -> int | None:
    return int(str(value)) if str(value).isdecimal() else None


def _memory(draft: Draft, workers: int | None, stage: int | None, *, has_adapter: bool) -> None:
    wished = draft.take("zero_stage", 2) if draft.take("deepspeed") else stage
    if wished in (2, 3) and not has_adapter and workers != 1:
        draft.put("memory.strategy", f"zero{wished}", "deepspeed", "zero_stage")
    draft.leave("deepspeed", "one worker, or an adapter, has nothing to spread")
    fused = [name for name in ("fused_backward_pass", "fused_optimizer_groups") if draft.take(name)]
    alone = workers == 1 and "gradient_accumulation_steps" not in draft.sections["train"]
    for name in fused:
        if alone and not has_adapter and draft.sections["train"]["precision"] != "fp16":
            draft.put("memory.release_gradients", True, name)
        draft.leave(name, "needs one worker and one pass a step (memory.release_gradients)")


def _drop_what_does_nothing(draft: Draft) -> None:
    """Options that kohya's scripts take without a word though they do nothing; here they would be refused.

    Raises:
        UserError: what came out is no configuration, with what has to be mended first.
    """
    for _ in range(40):
        try:
            config = Config.model_validate(draft.sections)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{_options_of(draft, key)}: {key}: {first['msg']}") from None
        problems = broken_rules(config)
        if not problems:
            return
        problem = problems[0]
        idle = next(
            (key for key in problem.keys if any(rule in problem.text for rule in _IDLE) and _remove(draft, key)), None
        )
        if idle is None:
            raise UserError(f"{_options_of(draft, '.'.join(map(str, problem.keys[0])))}: {problem.text}")
        name, rule = ".".join(map(str, idle)), problem.text.partition(": ")[2]
        for option, text in draft.became.items():
            if name in text:
                draft.became[option] = f"- {rule}"


def _options_of(draft: Draft, key: str) -> str:
    found = [f"--{option}" for option, text in draft.became.items() if key in text]
    return ", ".join(found) or "the command"


def _remove(draft: Draft, key: Sequence[str | int]) -> bool:
    """Whether the key was there."""
    at: Any = draft.sections
    for part in key[:-1]:
        at = at[part] if isinstance(at, list) and isinstance(part, int) else isinstance(at, dict) and at.get(part)
    if not isinstance(at, dict) or key[-1] not in at:
        return False
    at.pop(key[-1])
    return True
