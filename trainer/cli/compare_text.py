"""What `sdxl-train inspect A B` prints of two models."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from trainer.cli.inspect_text import COMPONENT_NAMES
from trainer.evaluate.change_chart import percent, short_names
from trainer.model_files.examine.compare import Change, Comparison, largest_changes
from trainer.model_files.examine.stored_tensors import component_of

_WIDTH = 110
_BAR_WIDTH = 30
_MOST_TENSORS = 8


def comparison_lines(found: Comparison) -> Iterator[str]:
    """The report as lines of at most some 120 characters."""
    name_a, name_b = short_names(found.path_a, found.path_b)
    yield f"A  {name_a}: {found.identity_a.description}"
    yield f"B  {name_b}: {found.identity_b.description}"
    yield ""
    yield f"{'component':<34}{'weights':>16}{'changed':>11}{'||B-A||/||A||':>16}"
    for change in [*found.components, found.total]:
        yield _row(COMPONENT_NAMES.get(change.name, change.name), change)
    yield ""
    yield from _notes(found)
    changed = [change for change in found.blocks if change.changed or change.not_finite]
    if changed:
        yield f"{'block':<34}{'weights':>16}{'changed':>11}{'||B-A||/||A||':>16}"
        largest = max((change.relative for change in changed if change.squared_a), default=0.0)
        yield from (f"{_row(change.name, change)}  {_bar(change.relative, largest)}".rstrip() for change in changed)
    yield from _unchanged(found)
    tensors = largest_changes(found, _MOST_TENSORS)
    if tensors:
        yield ""
        yield f"{'share of ||B-A||^2':<20}{'||B-A||/||A||':>16}  tensors that changed most"
        total = found.total.squared_difference
        for change in tensors:
            yield f"{percent(change.squared_difference / total):<20}{percent(change.relative):>16}  {change.name}"


def _row(name: str, change: Change) -> str:
    share = percent(change.changed_share)
    return f"{name:<34}{change.weights:>16,}{share:>11}{percent(change.relative):>16}"


def _bar(relative: float, largest: float) -> str:
    return "#" * round(_BAR_WIDTH * min(relative / largest, 1.0)) if largest else ""


def _notes(found: Comparison) -> Iterator[str]:
    notes = []
    if found.dtypes[0] != found.dtypes[1]:
        a, b = (", ".join(dtypes) for dtypes in found.dtypes)
        notes.append(f"A is {a} and B {b}: both are rounded to the coarser, and what it cannot hold does not count")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            notes.append(f"only {side} has {_counted(names)}")
    if found.other_shape:
        notes.append(f"of another size, not compared: {_counted(found.other_shape)}")
    if found.total.not_finite:
        notes.append(f"{found.total.not_finite:,} weights are NaN or infinite, and left out")
    if found.text_projection.verdict == "transposed":
        notes.append(f"warning: B's text projection is transposed against A's ({found.text_projection.reason})")
    yield from notes
    if notes:
        yield ""


def _counted(names: Sequence[str]) -> str:
    """How many tensors of which components."""
    components = [component_of(name) for name in names]
    counts = {component: components.count(component) for component in COMPONENT_NAMES if component in components}
    return ", ".join(f"{count:,} tensors of {COMPONENT_NAMES[component]}" for component, count in counts.items())


def _unchanged(found: Comparison) -> Iterator[str]:
    """Blocks that are equal, those of a component as one where all are."""
    for component, blocks in groupby(found.blocks, key=lambda change: change.component):
        own = list(blocks)
        same = [change.name for change in own if not change.changed and not change.not_finite]
        if same:
            told = "all of it" if len(same) == len(own) else ", ".join(same)
            yield from textwrap.wrap(
                f"unchanged in {COMPONENT_NAMES[component]}: {told}",
                _WIDTH,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
