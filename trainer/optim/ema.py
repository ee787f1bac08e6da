"""Running averages of the weights that train: kept in fp32 beside them, updated in place, put into the model and back.

Each worker averages the rows that it holds, without a word to the others, so that averages are spread as the weights
are. An element's average depends on that element alone: it is the same, to the bit, for any number of workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.optim.ema_memory import chunk_elements, host_tensors, kept_in_chunks
from trainer.optim.ema_pieces import batches, copy_all, device_of, scratch_buffers, views
from trainer.optim.ema_profile import Profile
from trainer.parallel.sharding import local_tensor

Place = Literal["device", "host"]
NamedParameters = Mapping[str, nn.Parameter]


@dataclass
class Averages:
    """The averages of a run; changed by `update_averages` and by what loads a checkpoint.

    Attributes:
        profiles: by name of the average, such as "ema".
        shards: name of the average -> name of the parameter -> fp32, in the shape of this worker's rows of it.
        place: on the device of the weights, or in the host's memory (pinned where the device is a CUDA one).
        began_at: by name of the average, the run's steps that were done when it began.
        ages: by name of the average, how many steps it holds: its profile's own clock.
        step: of the run, up to which weights have been averaged; see `leave_out_step`.
        in_chunks: updates take copies of some weights at a time (`kept_in_chunks`).
        update_every: steps between two updates; weights count for the steps up to theirs, so profiles stay.
        lent: name of the average that is in the model at the moment.
    """

    profiles: Mapping[str, Profile]
    shards: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    place: Place
    in_chunks: bool
    began_at: dict[str, int]
    ages: dict[str, int]
    step: int
    update_every: int = 1
    lent: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the tensors; `load_progress` takes it."""
        averages = {
            name: {**profile.to_json(), "began_at": self.began_at[name], "steps": self.ages[name]}
            for name, profile in self.profiles.items()
        }
        return {"step": self.step, "averages": averages}


@torch.no_grad()
def start_averages(
    parameters: NamedParameters,
    profiles: Mapping[str, Profile],
    *,
    step: int = 0,
    place: Place = "device",
    update_every: int = 1,
    corrections: Mapping[str, Tensor] | None = None,
) -> Averages:
    """Averages that begin as the weights are after `step` steps of the run.

    Args:
        parameters: what trains, by name; sharded (FSDP2) or whole.
        corrections: see `update_averages`.
    """
    weights = {name: local_tensor(parameter).detach() for name, parameter in parameters.items()}
    shards: dict[str, dict[str, Tensor]] = {}
    for average in profiles:
        if place == "host":
            shards[average] = host_tensors({name: weight.shape for name, weight in weights.items()}, device_of(weights))
        else:  # in the weights' own order of memory
            shards[average] = {name: torch.empty_like(w, dtype=torch.float32) for name, w in weights.items()}
    in_chunks = any(kept_in_chunks(place, weight.dtype) for weight in weights.values())
    averages = Averages(profiles, shards, place, in_chunks, {}, {}, step, update_every)
    for average in profiles:
        begin_average(averages, average, parameters, corrections)
    return averages


@torch.no_grad()
def begin_average(
    averages: Averages, average: str, parameters: NamedParameters, corrections: Mapping[str, Tensor] | None = None
) -> None:
    """Let one of the averages begin anew, as the weights are after step `averages.step`."""
    require_home(averages)
    shards = averages.shards[average]
    for name, parameter in parameters.items():
        shards[name].copy_(local_tensor(parameter))
        if corrections and name in corrections:
            shards[name].add_(corrections[name].to(shards[name].device))
    averages.began_at[average], averages.ages[average] = averages.step, 0


def leave_out_step(averages: Averages) -> None:
    """A step of the run changed no weight: it is no step of the averages, or the weights before it would count twice.

    Steps since the last update are told by the difference to `Averages.step`, which therefore moves by one.
    """
    averages.step += 1


def update_when_due(
    averages: Averages, parameters: NamedParameters, step: int, corrections: Mapping[str, Tensor] | None = None
) -> bool:
    """`update_averages` where `step` is a multiple of `update_every`; whether it was."""
    due = step % averages.update_every == 0
    if due:
        update_averages(averages, parameters, step, corrections)
    return due


@torch.no_grad()
def update_averages(
    averages: Averages, parameters: NamedParameters, step: int, corrections: Mapping[str, Tensor] | None = None
) -> None:
    """Take the weights into all averages, in fp32: average += (1 - decay) * (weight - average).

    The decay is that of all steps since the last update. Nothing waits for the device.

    Args:
        step: steps that the run has done.
        corrections: by parameter, what this worker's rows of it lack to the true weight (`kahan_corrections`).

    Raises:
        ValueError: `step` has been averaged already, or an average is in the model.
    """
    require_home(averages)
    if step <= averages.step:
        raise ValueError(f"step {step} has been averaged already, up to {averages.step}")
    ages = {name: age + step - averages.step for name, age in averages.ages.items()}
    shares = {
        name: 1 - profile.decay_over(averages.ages[name], ages[name]) for name, profile in averages.profiles.items()
    }
    if averages.in_chunks:
        _update_in_chunks(averages, parameters, shares, corrections or {})
    else:
        _update_directly(averages, parameters, shares)
    averages.step, averages.ages = step, ages


def _update_directly(averages: Averages, parameters: NamedParameters, shares: Mapping[str, float]) -> None:
    """No copies, and little else: at 1,680 tensors, each further microsecond per tensor is a tenth of the update."""
    weights = [local_tensor(parameter) for parameter in parameters.values()]
    for average, share in shares.items():
        shards = averages.shards[average]
        torch._foreach_lerp_([shards[name] for name in parameters], weights, share)  # pyright: ignore[reportPrivateImportUsage]


def _update_in_chunks(
    averages: Averages, parameters: NamedParameters, shares: Mapping[str, float], corrections: Mapping[str, Tensor]
) -> None:
    """A group of pieces at a time: the exact weights in fp32, and averages fetched from the host and sent back."""
    weights = {name: local_tensor(parameter) for name, parameter in parameters.items()}
    exact_buffer, average_buffer = scratch_buffers(weights, 2)
    for group in batches(weights, chunk_elements(device_of(weights).type)):
        pieces = [piece.of(weights[piece.name]) for piece in group]
        exact = views(exact_buffer, pieces)
        torch._foreach_copy_(exact, pieces)  # pyright: ignore[reportPrivateImportUsage]
        for piece, value in zip(group, exact, strict=True):
            if piece.name in corrections:
                value.add_(piece.of(corrections[piece.name]).to(value.device))
        for average, share in shares.items():
            stored = [piece.of(averages.shards[average][piece.name]) for piece in group]
            if averages.place == "device":
                torch._foreach_lerp_(stored, exact, share)  # pyright: ignore[reportPrivateImportUsage]
                continue
            fetched = views(average_buffer, stored)
            copy_all(zip(fetched, stored, strict=True))
            torch._foreach_lerp_(fetched, exact, share)  # pyright: ignore[reportPrivateImportUsage]
            copy_all(zip(stored, fetched, strict=True))


def kahan_corrections(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """What Kahan summation keeps beside bf16 weights (`BlockAdamW`): the true weight is the sum of both."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    return {name: state["compensation"] for name, state in states.items() if "compensation" in state}


def require_home(averages: Averages) -> None:
    """Raise ValueError while an average is in the model, so that live weights may be in its place."""
    if averages.lent is not None:
        raise ValueError(f"the average {averages.lent} is in the model")
