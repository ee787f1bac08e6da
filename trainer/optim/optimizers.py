"""Builds the optimizer, sets its learning rates, and gives its state as named tensors and takes it back."""

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig
from trainer.errors import UserError
from trainer.optim.adamw import BlockAdamW, Rounding
from trainer.optim.adamw_chunk import Update
from trainer.parallel.local_shard import local_part, part_of, whole_of

NamedParameters = Mapping[str, nn.Parameter]


def make_optimizer(
    parameters: NamedParameters | Mapping[str, NamedParameters],
    config: OptimizerConfig,
    *,
    peak_lrs: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    free_gradients: bool = False,
    update: Update | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) as `config.kind` says, with weight decay on every weight.

    fp32 weights with fp32 moments go to torch's fused implementation: one pass over memory per step.

    Args:
        parameters: groups by name ("unet", "text_encoder_1", ...), each a mapping of parameters by name; names must
            differ between groups too, for they are the state's. Or the parameters of one group, called "unet".
        peak_lrs: peak learning rate by group; `config.lr` where it names none.
        weight_decays: by group; `config.weight_decay` where it names none.
        rounding: how bf16 weights are rounded; None where they are fp32.
        seed: of the stochastic rounding; the run's.
        free_gradients: drop each gradient right after its use (not with the fused implementation).
        update: a chunk's arithmetic, compiled (not with the fused implementation).

    Raises:
        ValueError: bf16 weights without `rounding`, `rounding` without bf16 weights, or a name twice.
    """
    grouped = _grouped(parameters)
    _check_names(grouped)
    beta1, beta2 = config.betas
    groups = []
    for group, named in grouped.items():
        peak_lr = (peak_lrs or {}).get(group, config.lr)
        weight_decay = (weight_decays or {}).get(group, config.weight_decay)
        settings = {"betas": (beta1, beta2), "eps": config.eps, "weight_decay": weight_decay}
        groups.append({"params": list(named.items()), "name": group, "peak_lr": peak_lr, "lr": peak_lr, **settings})
    all_fp32 = all(p.dtype == torch.float32 for named in grouped.values() for p in named.values())
    if all_fp32 and is_fused(config, rounding):
        return torch.optim.AdamW(groups, fused=True)
    return BlockAdamW(
        groups,
        eight_bit=config.kind == "adamw_8bit",
        rounding=rounding,
        seed=seed,
        free_gradients=free_gradients,
        update=update,
    )


def is_fused(config: OptimizerConfig, rounding: Rounding | None) -> bool:
    """Whether PyTorch's own fused AdamW does what is asked for."""
    return rounding is None and config.kind == "adamw"


def take_optimizer_step(optimizer: torch.optim.Optimizer, gradients: Callable[[], list[Tensor]], factor: float) -> None:
    """Update the weights by the gradients times `factor`.

    Args:
        gradients: to be asked for where the optimizer does not multiply by itself.
    """
    if isinstance(optimizer, BlockAdamW):
        optimizer.step(gradient_factor=factor)
        return
    if factor != 1.0:  # a pass over all gradients, which most steps of a sound run do without
        torch._foreach_mul_(gradients(), factor)  # pyright: ignore[reportPrivateImportUsage]
    optimizer.step()


def _grouped(parameters: NamedParameters | Mapping[str, NamedParameters]) -> Mapping[str, NamedParameters]:
    if any(isinstance(value, Tensor) for value in parameters.values()):
        return {"unet": cast(NamedParameters, parameters)}
    return cast(Mapping[str, NamedParameters], parameters)


def _check_names(groups: Mapping[str, NamedParameters]) -> None:
    names = [name for named in groups.values() for name in named]
    if len(set(names)) != len(names):
        raise ValueError("two groups hold parameters of the same name")


def first_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group: the UNet's, where it trains."""
    return optimizer.param_groups[0]["lr"]


def scale_lr(optimizer: torch.optim.Optimizer, factor: float | Mapping[str, float]) -> dict[str, float]:
    """Assign `peak learning rate x factor` to each group; return the learning rates by group.

    Args:
        factor: the schedule's, for all groups, or by the name of the group or of its part, the name's first word.
    """
    for group in optimizer.param_groups:
        name = group["name"]
        own = factor if isinstance(factor, float | int) else factor.get(name, factor.get(name.partition(" ")[0]))
        if own is None:
            raise KeyError(name)
        group["lr"] = group["peak_lr"] * own
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<state name>` -> tensor, as it is (no copy).

    State of a sharded parameter is a DTensor that is sharded alike, by rows; its whole is the same for any number of
    workers, so that it can be gathered, written and given to a run with another number.
    """
    return {
        f"{name}.{key}": whole_of(value, parameter)
        for name, parameter in parameters.items()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())  # after a resume they stand otherwise
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put back what `optimizer_tensors` gave, or its wholes; each goes to its parameter's device and placement.

    Raises:
        UserError: a tensor's parameter does not train any more, or moments were kept in another number of bits.
    """
    ours = optimizer if isinstance(optimizer, BlockAdamW) else None
    for full_name, value in tensors:
        name, key = full_name.rsplit(".", 1)
        if name not in parameters:
            raise UserError(
                f"trainable: the checkpoint has trained {name}, which is to stay as it is now; within a run more may "
                "train, not less: undo that, or start a new run from what `sdxl-train export` makes of the checkpoint"
            )
        parameter = parameters[name]
        part = local_part(parameter)[0]
        if key == "step":
            # Fused AdamW keeps its step counter beside the parameter, ours on the CPU where it is read.
            optimizer.state[parameter][key] = value.to("cpu" if ours else part.device, torch.float32)
            continue
        if key == "exp_avg":
            _check_bits(name, value, ours is not None and ours.keeps_8_bits(parameter))
        rows = part_of(value, parameter).to(part.device)
        if rows.untyped_storage().nbytes() > rows.nbytes:  # a view would keep the whole in memory
            rows = rows.clone()
        optimizer.state[parameter][key] = rows if ours else whole_of(rows, parameter)


def _check_bits(name: str, stored: Tensor, wants_8_bits: bool) -> None:
    if (stored.dtype == torch.uint8) != wants_8_bits:
        kinds = ("adamw_8bit", "adamw") if stored.dtype == torch.uint8 else ("adamw", "adamw_8bit")
        raise UserError(
            f"optimizer.kind = {kinds[1]}: the checkpoint holds the moments of {name} as {kinds[0]} keeps them; "
            f"go on with optimizer.kind={kinds[0]}"
        )
