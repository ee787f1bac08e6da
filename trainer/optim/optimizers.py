"""Builds the optimizer, sets its learning rates, and gives its state as named tensors and takes it back."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.schema import OptimizerConfig
from trainer.errors import UserError
from trainer.optim.adamw import BlockAdamW, Rounding
from trainer.optim.adamw_chunk import Update
from trainer.optim.kinds.rule import Rule
from trainer.optim.kinds.rule_optimizer import RuleOptimizer
from trainer.optim.kinds.rule_table import RULES
from trainer.optim.kinds.schedule_free import holds_average
from trainer.optim.kinds.stored_names import COLUMNS, TRAINED, kind_that_keeps, stored_name
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
    """The optimizer that `config.kind` says, with weight decay on every weight.

    AdamW (Loshchilov and Hutter 2019) over fp32 weights with fp32 moments is torch's fused implementation: one pass
    over memory per step. The other kinds are rules (`trainer.optim.kinds`).

    Args:
        parameters: groups by name ("unet", "text_encoder_1", ...), each a mapping of parameters by name; names must
            differ between groups too, for they are the state's. Or the parameters of one group, called "unet".
        peak_lrs: peak learning rate by group; `config.lr` where it names none.
        weight_decays: by group; `config.weight_decay` where it names none.
        rounding: how bf16 weights are rounded; None where they are fp32.
        seed: of the stochastic rounding; the run's.
        free_gradients: drop each gradient right after its use (not with the fused implementation).
        update: a chunk's arithmetic, compiled (of AdamW, where it is not fused).

    Raises:
        ValueError: bf16 weights without `rounding`, `rounding` without bf16 weights, or a name twice.
    """
    grouped = _grouped(parameters)
    _check_names(grouped)
    settings = config.settings()
    groups = []
    for group, named in grouped.items():
        peak_lr = (peak_lrs or {}).get(group, config.lr)
        groups.append({"params": list(named.items()), "name": group, "peak_lr": peak_lr, "lr": peak_lr, **settings})
        if weight_decays is not None and group in weight_decays:
            groups[-1]["weight_decay"] = weight_decays[group]
    all_fp32 = all(p.dtype == torch.float32 for named in grouped.values() for p in named.values())
    if all_fp32 and is_fused(config, rounding):
        return _FusedAdamW(groups, fused=True)
    if config.kind in RULES:
        rule = RULES[config.kind]
        return RuleOptimizer(groups, rule, rounding=rounding, seed=seed, free_gradients=free_gradients)
    return BlockAdamW(
        groups,
        eight_bit=config.kind == "adamw_8bit",
        rounding=rounding,
        seed=seed,
        free_gradients=free_gradients,
        update=update,
    )


class _FusedAdamW(torch.optim.AdamW):
    """PyTorch's, on this worker's shares of spread weights as plain tensors.

    Given the spread tensors themselves, PyTorch asks for each of some thousands of them how the result of an operation
    on all would be spread: 19 s in the first step of the tiny SDXL, and again after every restart. It is elementwise.
    """

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, group: Any, params_with_grad: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor], *rest: Any,
    ) -> bool:  # fmt: skip
        has_complex = super()._init_group(group, params_with_grad, grads, exp_avgs, exp_avg_sqs, *rest)
        if any(isinstance(tensor, DTensor) for tensor in params_with_grad):
            for tensors in (params_with_grad, grads, exp_avgs, exp_avg_sqs):
                tensors[:] = (local_part(tensor)[0] for tensor in tensors)
        return has_complex


def is_fused(config: OptimizerConfig, rounding: Rounding | None) -> bool:
    """Whether PyTorch's own fused AdamW does what is asked for."""
    return rounding is None and config.kind == "adamw"


def is_compiled(config: OptimizerConfig, rounding: Rounding | None) -> bool:
    """Whether torch.compile may fuse the optimizer's arithmetic."""
    return config.kind not in RULES and not is_fused(config, rounding)


def take_optimizer_step(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Update the weights by the gradients times `factor`.

    Args:
        optimizer: one of ours, or PyTorch's AdamW with `fused`.
    """
    if isinstance(optimizer, BlockAdamW | RuleOptimizer):
        optimizer.step(gradient_factor=factor)
        return
    device = optimizer.param_groups[0]["params"][0].device
    # The kernel divides gradients, as it reads them, by what it knows as the scale of a loss: no pass of its own.
    scale = None if factor == 1.0 else torch.full((), 1.0 / factor, dtype=torch.float32, device=device)
    optimizer.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def _grouped(parameters: NamedParameters | Mapping[str, NamedParameters]) -> Mapping[str, NamedParameters]:
    if any(isinstance(value, Tensor) for value in parameters.values()):
        return {"unet": cast(NamedParameters, parameters)}
    return cast(Mapping[str, NamedParameters], parameters)


def _check_names(groups: Mapping[str, NamedParameters]) -> None:
    names = [name for named in groups.values() for name in named]
    if len(set(names)) != len(names):
        raise ValueError("two groups hold parameters of the same name")


class Rates(NamedTuple):
    """The learning rates of an optimizer as its latest step had them.

    Attributes:
        first: of the first group: the UNet's, where it trains.
        by_part: of each part of the model, by the first word of its groups' names; of several groups, the first's.
        found: `d` of the kinds that find a learning rate and take `first` times it, as it stands after the step; None
            with other kinds, and before the first step.
    """

    first: float
    by_part: dict[str, float]
    found: float | None


def rates_of(optimizer: torch.optim.Optimizer) -> Rates:
    """What `scale_lr` has assigned, and what the optimizer has found."""
    by_part = dict[str, float]()
    for group in optimizer.param_groups:
        by_part.setdefault(group["name"].partition(" ")[0], group["lr"])
    return Rates(optimizer.param_groups[0]["lr"], by_part, _found_rate(optimizer))


def _found_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Every parameter that has begun to train keeps the same."""
    rule = _rule_of(optimizer)
    if rule is None or not rule.surveys:
        return None
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state)
    return next((float(state["d"]) for state in states if "d" in state), None)


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
    workers, so that it can be gathered, written and given to a run with another number. Of kinds but AdamW, their name
    stands before the state's: `<parameter name>.lion-exp_avg`. Where the checkpoint is to hold averaged weights in
    place of those that train, these are part of the state (`trainer.optim.kinds.schedule_free`).
    """
    rule, found = _rule_of(optimizer), dict[str, Tensor]()
    for name, parameter in parameters.items():
        # After a resume they stand otherwise.
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            shared = rule is not None and key.endswith(COLUMNS)
            found[f"{name}.{stored_name(rule, key)}"] = value if shared else whole_of(value, parameter)
        if holds_average(optimizer, parameter):
            found[f"{name}.{stored_name(rule, TRAINED)}"] = parameter.detach()
    return found


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: NamedParameters,
    tensors: Iterable[tuple[str, Tensor]],
    place: torch.device | None = None,
) -> None:
    """Put back what `optimizer_tensors` gave, or its wholes; each goes to its parameter's device and placement.

    Args:
        place: where state but for numbers goes in place of its parameter's device.
    Raises:
        UserError: a tensor's parameter does not train any more, or moments were kept in another number of bits.
    """
    ours = optimizer if isinstance(optimizer, BlockAdamW | RuleOptimizer) else None
    rule = _rule_of(optimizer)
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
        kept = kind_that_keeps(key, value, parameter)
        if kept is not None:
            _check_kind(name, kept, rule.kind if rule else _adamw_kind(ours, parameter))
        key = key.rpartition("-")[2]
        if rule is not None and value.ndim == 0:
            optimizer.state[parameter][key] = value.cpu()
            continue
        rows = value if rule is not None and key.endswith(COLUMNS) else part_of(value, parameter)
        rows = rows.to(part.device if place is None or key == TRAINED else place)
        if key == TRAINED:
            with torch.no_grad():
                part.copy_(rows)
            continue
        if rows.untyped_storage().nbytes() > rows.nbytes:  # a view would keep the whole in memory
            rows = rows.clone()
        optimizer.state[parameter][key] = rows if ours else whole_of(rows, parameter)


def _rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    return optimizer.rule if isinstance(optimizer, RuleOptimizer) else None


def _adamw_kind(ours: BlockAdamW | RuleOptimizer | None, parameter: nn.Parameter) -> str:
    return "adamw_8bit" if ours is not None and ours.keeps_8_bits(parameter) else "adamw"


def _check_kind(name: str, stored: str, wanted: str) -> None:
    if stored != wanted:
        raise UserError(
            f"optimizer.kind = {wanted}: the checkpoint holds the moments of {name} as {stored} keeps them; "
            f"go on with optimizer.kind={stored}"
        )
