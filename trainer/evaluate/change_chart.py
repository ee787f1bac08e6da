"""A picture of what differs between two models: a bar for each block, in the network's order."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import printable_lines
from trainer.model_files.examine.compare import Change, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT_INK, _PAPER, _GRID = "#1f2328", "#6e7781", "#ffffff", "#d8dee4"
_COLOURS = {"residual": "#2f6fb5", "transformer": "#d1495b", "resampling, embedding, in and out": "#8c959f"}
_TEXT_COLOUR, _VAE_COLOUR = "#2a9d8f", "#8a63d2"
_PANELS = (
    ("unet", "UNet"),
    ("text_encoder", "Text encoder 1"),
    ("text_encoder_2", "Text encoder 2"),
    ("vae", "VAE"),
    ("other", "Other blocks"),
)
_SHORT = {
    "time_embed": "time",
    "label_emb": "label",
    "out": "out",
    "embeddings": "emb",
    "final_layer_norm": "\nnorm",  # a line below its neighbours, which it would touch
    "text_projection": "proj",
    "quant_conv": "quant",
    "post_quant_conv": "post\nquant",
    "conv_in": "in",
    "conv_out": "out",
    "norm_out": "norm",
}
_UNCHANGED: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "color": _PAPER,
    "markeredgecolor": _FAINT_INK,
    "markersize": 4,
}
_LOG_FROM = 30.0  # the ratio of the largest to the smallest bar above which small ones would not be seen
_MOST_OTHER = 60
_MOST_LETTERS = 32  # of a label
_FEWEST_SLOTS = 8  # fewer bars than these would be planks


def change_chart_png(comparison: Comparison, path: Path) -> None:
    """Draws ||B - A|| / ||A|| of every block, a panel for each component that changed; the PNG appears whole.

    Args:
        path: the PNG; its folder must exist.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names of unknown origin are no formulas
        _draw_chart(comparison, path)


def _draw_chart(comparison: Comparison, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_component = {name: _slots(comparison, name) for name, _ in _PANELS}
    changed = [
        name for name, _ in _PANELS if any(c.squared_difference for c in comparison.components if c.name == name)
    ]
    rows = _rows(changed or [change.name for change in comparison.components][:1])
    figure = Figure(figsize=(15, 1.3 + 3.6 * len(rows)), dpi=120, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    head = 1.0 / (1.3 + 3.6 * len(rows))  # of the height, for the title
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, rect=(0, 0, 1, 1 - head))  # type: ignore[call-arg]
    limits = _limits([change for name in changed for slot in by_component[name].values() for change in slot.values()])
    for grid, names in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        ratios = [max(len(by_component[name]), _FEWEST_SLOTS) + 2 for name in names]
        axes = grid.subplots(1, len(names), squeeze=False, width_ratios=ratios)[0]
        for axis, name in zip(axes, names, strict=True):
            _draw(axis, by_component[name], limits)
            _title(axis, name, next(change for change in comparison.components if change.name == name))
        log = ", log scale" if limits[2] else ""
        axes[0].set_ylabel(f"‖B − A‖ / ‖A‖{log}", color=_FAINT_INK, fontsize=9)
        if names is rows[0]:
            _legend(axes[-1], [slot for name in changed for slot in by_component[name].values()])
    name_a, name_b = short_names(comparison.path_a, comparison.path_b)
    top = 1 - 0.2 * head
    figure.text(
        0.01, top, f"What changed from {name_a} to {name_b}", va="top", fontsize=14, fontweight="bold", color=_INK
    )
    figure.text(0.01, top - 0.4 * head, _subtitle(comparison, changed), va="top", fontsize=10, color=_FAINT_INK)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def short_names(a: Path, b: Path) -> tuple[str, str]:
    """The last parts of two paths, as many as make them differ."""
    parts_a, parts_b = a.absolute().parts, b.absolute().parts
    for count in range(1, max(len(parts_a), len(parts_b))):
        if parts_a[-count:] != parts_b[-count:]:
            return "/".join(parts_a[-count:]), "/".join(parts_b[-count:])
    return a.name, b.name


_Slots = dict[str, dict[tuple[str, int], Change]]


def _slots(comparison: Comparison, component: str) -> _Slots:
    """Places on the horizontal axis: label -> (role, number) -> the block's change. Those of one level share one."""
    roles = _roles(comparison.tensors)
    slots: _Slots = {}
    blocks = [block for block in comparison.blocks if block.component == component]
    if component == "other" and len(blocks) > _MOST_OTHER:
        largest = sorted(blocks, key=lambda block: -block.squared_difference)[:_MOST_OTHER]
        blocks = [block for block in blocks if block in largest]
    for block in blocks:
        slot = slots.setdefault(printable_lines(_label(block.name)[:_MOST_LETTERS]), {})
        slot[roles.get(block.name, ""), len(slot)] = block
    return slots


def _roles(tensors: Sequence[Change]) -> dict[str, str]:
    """What the UNet's blocks are, by the names of their tensors."""
    from trainer.model_files.examine.stored_tensors import block_by_name

    residual, transformer, other = _COLOURS
    found: dict[str, str] = {}
    for tensor in tensors:
        if tensor.component == "unet":
            block = block_by_name(tensor.name)
            if ".transformer_blocks." in tensor.name:
                found[block] = transformer
            elif ".in_layers." in tensor.name:
                found[block] = residual
            else:
                found.setdefault(block, other)
    return found


def _label(block: str) -> str:
    level = re.match(r"(input_blocks|output_blocks|middle_block)(?:\.(\d+))?", block)
    if level:
        side = {"input_blocks": "in", "output_blocks": "out", "middle_block": "mid"}[level[1]]
        return "mid" if side == "mid" else f"{side}\n{level[2]}"
    layer = re.fullmatch(r"text_encoder_\d\.layers\.(\d+)", block)
    if layer:
        return layer[1]
    vae = re.match(r"vae\.(encoder|decoder)\.(\w+)(?:\.(\d+))?", block)
    if vae:
        place = f"{vae[2]} {vae[3]}" if vae[3] else _SHORT.get(vae[2], vae[2])
        return f"{vae[1][:3]}\n{place}"
    last = block.rsplit(".", 1)[-1]
    return _SHORT.get(last, block if block.count(".") > 1 else last)


def _rows(names: Sequence[str]) -> list[list[str]]:
    """Panels of a figure: both text encoders share a row, the others have one each."""
    texts = [name for name in names if name.startswith("text")]
    rows = [[name] for name in names if not name.startswith("text")]
    place = 1 if "unet" in names else 0
    return [*rows[:place], texts, *rows[place:]] if texts else rows


def _limits(changes: Sequence[Change]) -> tuple[float, float, bool]:
    """Ends of the vertical axis in percent, one for all panels, and whether it is logarithmic."""
    percent = [100 * c.relative for c in changes if c.squared_difference and math.isfinite(c.relative)]
    if not percent:
        return 0.0, 1.0, False
    low, high = min(percent), max(percent)
    if high / low < _LOG_FROM:
        return 0.0, 1.12 * high, False
    return low / 1.8, 1.5 * high, True


def _draw(
    axis: "Axes", slots: Mapping[str, Mapping[tuple[str, int], Change]], limits: tuple[float, float, bool]
) -> None:
    low, high, is_log = limits
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT_INK)
    axis.tick_params(colors=_FAINT_INK, labelsize=9, length=0)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    if is_log:
        axis.set_yscale("log")
        axis.set_yticks(_log_ticks(low, high))
        axis.minorticks_off()
    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g} %")
    unchanged = []
    width = 0.84 / max((len(slot) for slot in slots.values()), default=1)
    for place, slot in enumerate(slots.values()):
        for n, ((role, _), change) in enumerate(slot.items()):
            x = place + (n - (len(slot) - 1) / 2) * width
            if not change.squared_difference:
                unchanged.append(x)
                continue
            colour = _COLOURS.get(role) or (_VAE_COLOUR if change.component == "vae" else _TEXT_COLOUR)
            height = min(100 * change.relative, high)
            axis.bar(x, height - low if is_log else height, 0.92 * width, low if is_log else 0, color=colour)
    if unchanged:
        bottom = [low if is_log else 0.0] * len(unchanged)
        axis.plot(unchanged, bottom, **_UNCHANGED, clip_on=False)
    is_long = max((len(line) for label in slots for line in label.split("\n")), default=0) > 6
    axis.set_xticks(range(len(slots)), list(slots), rotation=90 if is_long else 0)
    axis.set_xlim(-0.7, max(len(slots), _FEWEST_SLOTS) - 0.3)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten; of many powers, 1 alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1, 3) if len(powers) <= 5 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _title(axis: "Axes", name: str, change: Change) -> None:
    shown = axis.set_title(dict(_PANELS)[name], loc="left", fontsize=11, fontweight="bold", color=_INK)
    axis.annotate(
        f"{percent(change.relative)} as a whole, {percent(change.changed_share)} of its weights changed",
        (1, 0.15),
        xycoords=shown,
        xytext=(10, 0),
        textcoords="offset points",
        va="baseline",
        fontsize=9,
        color=_FAINT_INK,
        annotation_clip=False,
    )


def _legend(axis: "Axes", slots: Sequence[Mapping[tuple[str, int], Change]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    there = {role for slot in slots for role, _ in slot}
    handles: list[Patch | Line2D] = [Patch(color=c, label=role) for role, c in _COLOURS.items() if role in there]
    if any(not change.squared_difference for slot in slots for change in slot.values()):
        handles.append(Line2D([], [], **_UNCHANGED, label="unchanged"))
    if handles:
        axis.legend(
            handles=handles,
            frameon=False,
            fontsize=9,
            labelcolor=_INK,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            borderaxespad=0.2,
        )


def _subtitle(comparison: Comparison, changed: Sequence[str]) -> str:
    names = dict(_PANELS)
    same = [names[change.name] for change in comparison.components if change.name not in changed]
    told = f"   Unchanged: {', '.join(same)}." if same else ""
    return f"Relative change of each block's weights, in the order of the network.{told}"


def percent(share: float) -> str:
    """A share in percent, with enough digits to tell it from none and from all."""
    if not math.isfinite(share):
        return "from zero"
    if not share or share == 1:
        return f"{100 * share:.0f} %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    if share < 1e-6:
        return f"{100 * share:.0e} %"
    decimals = 2 if 0.99 < share < 1 else max(2 - math.floor(math.log10(100 * share)), 0)
    return f"{100 * share:.{decimals}f} %"
