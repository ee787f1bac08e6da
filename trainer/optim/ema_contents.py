"""Running averages into a checkpoint and back, as the parameters' names and whole tensors have them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.optim.ema import Averages, NamedParameters, require_home
from trainer.optim.ema_pieces import device_of
from trainer.parallel.local_shard import Held, held_like, part_of


def ema_parts(averages: Averages, average: str, parameters: NamedParameters) -> dict[str, Held]:
    """What this worker has of an average, by the parameters' names; in the memory where it is, which may be the host's.

    Raises:
        ValueError: an average is in the model, so that live weights may be in its place.
    """
    require_home(averages)
    if averages.place == "host":  # what was copied there last may still be on its way
        _wait(parameters)
    shards = averages.shards[average]
    return {name: held_like(shards[name], parameter) for name, parameter in parameters.items()}


@torch.no_grad()
def load_ema_tensors(
    averages: Averages, average: str, parameters: NamedParameters, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put back the parts that `ema_parts` gave, or wholes, of which this worker's rows are taken.

    What has no tensor stays as it is: a parameter that did not train before is its own average.

    Raises:
        UserError: a tensor's parameter does not train any more.
    """
    require_home(averages)
    _wait(parameters)
    shards = averages.shards[average]
    for name, value in tensors:
        if name not in parameters:
            raise UserError(
                f"trainable: the checkpoint has averaged {name} ({average}), which is to stay as it is now; within a "
                "run more may train, not less"
            )
        shards[name].copy_(part_of(value, parameters[name]))


def load_progress(averages: Averages, record: Mapping[str, Any]) -> None:
    """Go on from where `Averages.to_json` says; averages of which it says nothing stay as they are.

    Raises:
        UserError: an average of the checkpoint has a profile that the wanted one cannot go on from.
    """
    averages.step = record["step"]
    for name, profile in averages.profiles.items():
        stored = record["averages"].get(name)
        if stored is None:
            continue
        wanted = profile.to_json()
        if stored["kind"] != wanted["kind"] or stored.get("sigma_rel") != wanted.get("sigma_rel"):
            raise UserError(
                f"ema.averages: the checkpoint's average {name} is {_told(stored)}, and {_told(wanted)} is asked for; "
                "within a run only the decay of a plain average may change; give the other one a name of its own"
            )
        averages.began_at[name], averages.ages[name] = stored["began_at"], stored["steps"]


def _told(profile: Mapping[str, Any]) -> str:
    return profile["kind"] + (f" of length {profile['sigma_rel']:g}" if "sigma_rel" in profile else "")


def _wait(parameters: Mapping[str, Tensor]) -> None:
    """Until copies to the host's memory have arrived."""
    device = device_of(parameters)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
