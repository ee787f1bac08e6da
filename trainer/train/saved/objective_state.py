"""What a checkpoint's record says of the objective: what was trained, and what it has learnt from the losses."""

import logging
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_dir import read_state
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.diffusion.objective import Objective
from trainer.diffusion.prediction import Prediction
from trainer.errors import UserError

_log = logging.getLogger(__name__)
RECORD = "objective"  # key of a checkpoint's state


def objective_record(config: ObjectiveConfig, objective: Objective) -> dict[str, object]:
    """What a checkpoint's state says of it, beside the rest; to the bit."""
    learner = objective.learner
    lessons = {learner.name: learner.record()} if learner else {}
    return {RECORD: {"trains": _told(objective.prediction), "options": _options(config), "lessons": lessons}}


def take_up_objective(config: ObjectiveConfig, objective: Objective, checkpoint: Path) -> None:
    """Go on with what was learnt up to a checkpoint; what is not as it was is told.

    Raises:
        UserError: the run has trained another prediction, or its lessons are of another kind.
    """
    record: Any = read_state(checkpoint).get(RECORD)
    if record is None:  # of an older program
        return
    trained, trains = record["trains"], _told(objective.prediction)
    if trained != trains:
        raise UserError(
            f"objective.prediction: the run has trained {trained} up to {checkpoint}, and this start would train "
            f"{trains} with its optimizer's state; give it a run.dir of its own, with the checkpoint as model.path"
        )
    before, now = record["options"], _options(config)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            _log.warning("objective.%s: from here on %s; before, it was %s", name, now.get(name), before.get(name))
    _take_up_lessons(objective, record["lessons"], checkpoint)


def _take_up_lessons(objective: Objective, lessons: dict[str, Any], checkpoint: Path) -> None:
    learner = objective.learner
    if learner is None:
        return
    if learner.name not in lessons:
        _log.warning("%s: begins here, for %s holds none", learner.name, checkpoint)
        return
    try:
        learner.take_up(lessons[learner.name])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint}: its {learner.name} cannot be used: {error}") from None


def _told(prediction: Prediction) -> str:
    return prediction.kind + " with zero terminal SNR" * prediction.zero_terminal_snr


def _options(config: ObjectiveConfig) -> dict[str, Any]:
    """What is not as usual, by section; `prediction` aside."""
    options = config.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in options.items() if name not in ("prediction", "zero_terminal_snr")}
