"""What a run takes from its model and does not train: the same when it goes on, or refused."""

import logging
from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.run_dir import read_state
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter
from trainer.errors import UserError
from trainer.model_files.run_model import RunModel
from trainer.parallel.comm import Comm

_log = logging.getLogger(__name__)
RECORD = "frozen"  # key of a checkpoint's state
_HELD = "held_in"  # within it; absent where weights are held as the passes compute


def frozen_fingerprints(config: Config, model: RunModel, comm: Comm) -> dict[str, str]:
    """What tells the weights of each frozen component from others, as rank 0 finds it; the other ranks give none."""
    if comm.rank:
        return {}
    trains = {"unet": config.trainable.unet.train, "text_encoder": config.trainable.text_encoder_1.train}
    trains |= {"text_encoder_2": config.trainable.text_encoder_2.train, "vae": False}
    under_adapter = trains_adapter(config.adapter)  # which changes none of them, as new tokens do not
    held = {} if config.model.frozen_weights == "compute" else {_HELD: config.model.frozen_weights}
    return held | {name: model.fingerprint(name) for name, train in trains.items() if under_adapter or not train}


def require_same_base(config: Config, frozen: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse to go on beside other frozen weights, or such that are held in other bits.

    Where the checkpoint was asked for by its path, only tell.

    Raises:
        UserError: with the component that differs.
    """
    before = read_state(checkpoint).get(RECORD)
    if not isinstance(before, dict):  # of an older program
        return
    _require_same_bits(config, before, checkpoint)
    others = [name for name, print_ in frozen.items() if name != _HELD and before.get(name, print_) != print_]
    if not others:
        return
    text = f"model.path = {config.model.path}: its {', '.join(others)} {'is' if len(others) == 1 else 'are'} not what "
    text += f"{checkpoint} was trained with"
    if config.run.resume in (True, "auto"):
        raise UserError(
            f"{text}; give the model that the run began with, or a run.dir of its own and run.resume={checkpoint}"
        )
    _log.warning("%s", text)


def _require_same_bits(config: Config, before: Mapping[str, str], checkpoint: Path) -> None:
    was, now = before.get(_HELD, "compute"), config.model.frozen_weights
    if was == now:
        return
    text = f"model.frozen_weights = {now}: {checkpoint} was trained with {was}"
    if config.run.resume in (True, "auto"):
        raise UserError(f"{text}; give that, or a run.dir of its own and run.resume={checkpoint}")
    _log.warning("%s", text)
