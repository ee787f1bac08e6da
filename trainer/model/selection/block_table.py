"""What trains, as a table by block; worked out from names and sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.sections.trainable_config import TrainableConfig
from trainer.model.selection.part_names import COMPONENT_OF, part_names
from trainer.model.selection.weight_rates import weight_rates
from trainer.model_files.run_model import RunModel


@dataclass(frozen=True)
class BlockRow:
    """A block, or several alike that follow one another.

    Attributes:
        first, last: the block's name, or the first and last one's.
        weights: of all these blocks; `trained`: of these.
        lr_scales: the least and the largest of what trains; None: nothing does.
    """

    first: str
    last: str
    weights: int
    trained: int
    lr_scales: tuple[float, float] | None
    blocks: int = 1

    def is_like(self, other: BlockRow) -> bool:
        """Whether both stand for blocks of the same kind and size, of which the same trains, as fast."""
        kinds = {row.last.rpartition(".")[0] for row in (self, other)}
        each = {(row.weights // row.blocks, row.trained // row.blocks, row.lr_scales) for row in (self, other)}
        return len(kinds) == 1 and kinds != {""} and len(each) == 1


def block_rows(part_name: str, parts: TrainableConfig, model: RunModel) -> list[BlockRow]:
    """The blocks of a part, from its input to its output.

    Args:
        part_name: such as `text_encoder_1`.
    Raises:
        UserError: as `weight_rates`.
    """
    counts = model.weight_counts(COMPONENT_OF[part_name])
    named = part_names(part_name, counts, model)
    rates, of_name = (
        weight_rates(getattr(parts, part_name), named),
        dict(zip(named.names, counts.values(), strict=True)),
    )
    rows: list[BlockRow] = []
    blocks = sorted(named.blocks.from_output.items(), key=lambda pair: -pair[1])
    for block, _ in blocks:
        names = [name for name in named.names if named.blocks.of[name] == block]
        trained = [name for name in names if name in rates]
        scales = [rates[name].lr_scale for name in trained]
        found = BlockRow(
            block,
            block,
            sum(of_name[name] for name in names),
            sum(of_name[name] for name in trained),
            (min(scales), max(scales)) if scales else None,
        )
        rows.append(found)
    return _merged(rows)


def _merged(rows: list[BlockRow]) -> list[BlockRow]:
    merged: list[BlockRow] = []
    for row in rows:
        before = merged[-1] if merged else None
        if before and before.is_like(row):
            weights, trained = before.weights + row.weights, before.trained + row.trained
            merged[-1] = BlockRow(before.first, row.last, weights, trained, row.lr_scales, before.blocks + 1)
        else:
            merged.append(row)
    return merged


def table_of_blocks(parts: TrainableConfig, model: RunModel) -> Iterator[str]:
    """The lines of the table of all parts that train, each with its sum."""
    for part_name in COMPONENT_OF:
        if not getattr(parts, part_name).train:
            continue
        rows = block_rows(part_name, parts, model)
        yield f"  {part_name:<24} {'weights':>14} {'trained':>14} {'share':>7}  lr scale"
        for row in rows:
            yield _line(_name(row), row.weights, row.trained, _scales(row.lr_scales))
        yield _line("all", sum(row.weights for row in rows), sum(row.trained for row in rows), "")


def trained_weights(part_name: str, parts: TrainableConfig, model: RunModel) -> int:
    """How many weights of a part train."""
    return sum(row.trained for row in block_rows(part_name, parts, model))


def _line(name: str, weights: int, trained: int, scales: str) -> str:
    return f"  {name:<24} {weights:>14,} {trained:>14,} {trained / max(weights, 1):>7.1%}  {scales}".rstrip()


def _name(row: BlockRow) -> str:
    return row.first if row.blocks == 1 else f"{row.first}-{row.last.rpartition('.')[2]}"


def _scales(scales: tuple[float, float] | None) -> str:
    if scales is None:
        return "-"
    least, most = scales[0], scales[1]
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
