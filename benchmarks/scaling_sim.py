"""How a run scales, from 4 to 1,024 GPUs: tables of images a second by the way to share the work, and a chart.

    python benchmarks/scaling_sim.py [--chart docs/images/scaling.webp]

The formulas are those of `scaling_model.py`, held against the points of `scaling_points.py` first. The last
column says how large a step has to be, by accumulation, to reach 90 %. Takes seconds, needs no GPU.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.scaling_model import Card, Links, Machine, Way, Work, efficiency, fewest_passes, step_of
from benchmarks.scaling_points import BYTES_POINTS, Fit, bytes_of_hosts, fit_a100, fit_hosts, solve_rig
from trainer.measure.card_peak import known_peak

# SDXL's UNet and both text encoders at 1024 px and 225 tokens; operations as `sdxl-train plan configs/4x3090.yaml`.
WEIGHTS, FLOPS, RECOMPUTED = 3.385e9, 22.21e12, 6.74e12
WAYS = {
    "ddp, bf16": Way("ddp", 2.0),
    "ddp, int8": Way("shares", 258 / 256),
    "zero2": Way("zero2"),
    "zero3": Way("zero3"),
    "HSDP": Way("hsdp"),
    "average / 32": Way("averaging", 2.0, 4.0, every=32),
}
OTHER_STEPS = ("average / 32",)  # `exchange.average_every: 32`, which is another algorithm and not the same steps
STATE_BYTES = {"ddp": (6.0, 0.0), "shares": (6.0, 0.0), "zero2": (2.0, 16.0), "zero3": (0.0, 16.0), "hsdp": (2.0, 18.0)}
"""Of a weight on each GPU, and of one that is shared among GPUs. Whole copies: bf16 weights rounded at random, buckets
and 8-bit moments; shares: gathered in bf16, fp32 weights, gradients and moments, and bf16 sums between hosts."""
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
_GIB = 1 << 30


def card(name: str, mfu: float, memory_bytes_s: float) -> Card:
    """NVIDIA's figure for a card, and the share of it that training is taken to reach."""
    peak = known_peak(name, torch.bfloat16)
    assert peak
    return Card(peak.flops_per_s, mfu, memory_bytes_s)


def scenarios() -> dict[str, tuple[Machine, int, float]]:
    """Machines by name, with images of a GPU in a pass and GiB that its state may take."""
    at_home, in_a_rack = Work(WEIGHTS, FLOPS, RECOMPUTED), Work(WEIGHTS, FLOPS)
    small, large = card("RTX 3090", 0.35, 936e9), card("H100", 0.35, 3350e9)
    nets = {"10 GbE": 1.1e9, "25 GbE": 2.8e9, "100 GbE": 11e9}
    made = {
        f"4 x RTX 3090 a host (6 GB/s), {net}": (Machine(at_home, small, Links(4, 6e9, rate)), 4, 19.5)
        for net, rate in nets.items()
    }
    rack = {"100 GbE": 11e9, "8 x 400 Gbit/s": 360e9}
    for net, rate in rack.items():
        made[f"8 x H100 a host (300 GB/s), {net}"] = Machine(in_a_rack, large, Links(8, 300e9, rate)), 8, 60.0
    return made


def fits(way: Way, machine: Machine, gpus: int, gib: float) -> bool:
    """Whether weights, gradients and moments leave a card the room that the rest needs."""
    if way.kind == "averaging":
        return fits(Way("ddp"), machine, gpus, gib)
    if way.kind == "hsdp" and gpus <= machine.links.host_gpus:
        return fits(Way("zero2"), machine, gpus, gib)
    whole, shared = STATE_BYTES[way.kind]
    among = machine.links.host_gpus if way.kind == "hsdp" else gpus
    return machine.work.weights * (whole + shared / among) / _GIB <= gib


def cell(machine: Machine, way: Way, gpus: int, batch: int, gib: float) -> str:
    """Images a second, and the efficiency; in brackets where it does not fit."""
    text = f"{step_of(machine, way, gpus, batch).images_s:,.1f} ({efficiency(machine, way, gpus, batch):.0%})"
    return text if fits(way, machine, gpus, gib) else f"[{text}]"


def best_way(machine: Machine, gpus: int, batch: int, gib: float, passes: int = 1) -> str:
    """The fastest of the ways that fit and take the same steps."""
    able = [name for name, way in WAYS.items() if name not in OTHER_STEPS and fits(way, machine, gpus, gib)]
    return max(able, key=lambda name: efficiency(machine, WAYS[name], gpus, batch, passes)) if able else "none"


def print_scenario(name: str, machine: Machine, batch: int, gib: float) -> None:
    """One table: a row for each number of GPUs."""
    print(f"\n**{name}**, {batch} images a GPU and step\n")
    print(f"| GPUs | {' | '.join(WAYS)} | fastest, same steps | of zero2, images of a step for 90 % |")
    print("|---" * (len(WAYS) + 3) + "|")
    for gpus in COUNTS:
        cells = [cell(machine, way, gpus, batch, gib) for way in WAYS.values()]
        passes = fewest_passes(machine, WAYS["zero2"], gpus, batch, 0.9)
        needed = f"{passes * gpus * batch:,}" if passes else "never"
        print(f"| {gpus:,} | {' | '.join(cells)} | {best_way(machine, gpus, batch, gib)} | {needed} |")


def print_links() -> None:
    """By the link of a host of four RTX 3090: passes of a step that each way needs to reach 90 %."""
    machine, batch, _ = next(iter(scenarios().values()))
    ways = [name for name in WAYS if name not in ("ddp, int8", "zero3")]
    print(
        "\n**Passes of 4 images that a step needs for 90 %, on 8 / 64 / 1,024 RTX 3090, by the link of a host of four**"
    )
    print("(88 % of its Gbit/s are taken to reach the run)\n")
    print(f"| Gbit/s | {' | '.join(ways)} |")
    print("|---" * (len(ways) + 1) + "|")
    for gbit in (1, 2.5, 10, 25, 40, 50, 100):
        joined = replace(machine, links=replace(machine.links, between_bytes_s=0.88e9 * gbit / 8))
        cells = [
            " / ".join(str(fewest_passes(joined, WAYS[name], gpus, batch, 0.9) or "never") for gpus in (8, 64, 1024))
            for name in ways
        ]
        print(f"| {gbit} | {' | '.join(cells)} |")


def print_fit(title: str, fit: Fit, unit: str) -> None:
    """What was found, and each point."""
    found = ", ".join(f"{name} {value:.3g}" for name, value in fit.unknowns.items())
    print(f"\n**{title}**: {len(fit.points)} points, {len(fit.unknowns)} unknowns: {found}.")
    print(f"Error {fit.error:.1%} (root of the mean square), at most {fit.worst:.1%}.\n")
    print(f"| point | measured, {unit} | by the formulas | off by |\n|---|---|---|---|")
    for name, was, said in fit.points:
        print(f"| {name} | {was:,.4g} | {said:,.4g} | {said / was - 1:+.1%} |")


def draw(path: Path) -> None:
    """Efficiency over GPUs, a panel for each machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = scenarios()
    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True, sharey=True, layout="constrained")
    for panel, (name, (machine, batch, _)) in zip(panels.flat, shown.items(), strict=False):
        for label, way in WAYS.items():
            style = ":" if label in OTHER_STEPS else "-"
            panel.plot(COUNTS, [100 * efficiency(machine, way, gpus, batch) for gpus in COUNTS], style, label=label)
        panel.set_title(name, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(COUNTS, [str(gpus) for gpus in COUNTS])
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    last = panels.flat[len(shown)]
    last.axis("off")
    last.legend(*panels.flat[0].get_legend_handles_labels(), loc="center", title="dotted: other steps")
    figure.supxlabel("GPUs")
    figure.supylabel("images a second of each GPU, % of one alone")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Fits, tables, chart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    print_fit("Published: Stable Diffusion 2 on 8 to 128 A100", fit_a100(), "images/s")
    each, beside, rate = solve_rig()
    print(
        f"\n**Published: four RTX 3090**: a pass takes {each:.3f} s, a step {beside:.2f} s beside its passes; if all of"
    )
    print(f"that is the exchange, it goes at {rate / 1e9:.1f} GB/s. Two points, two unknowns: no error to show.")
    print_fit(
        "Measured: exchanges between two hosts of two workers, network namespaces on one machine", fit_hosts(), "s"
    )
    print("\n**Measured: bytes that leave a host in a step of a real run there**, by its interface, headers and all\n")
    print("| exchange | passes | measured, MB | by the formulas | more by |\n|---|---|---|---|---|")
    for way, passes, was in BYTES_POINTS:
        said = bytes_of_hosts(way)
        print(f"| {way} | {passes} | {was} | {said:.1f} | {was / said - 1:.1%} |")
    for name, (machine, batch, gib) in scenarios().items():
        print_scenario(name, machine, batch, gib)
    print_links()
    if arguments.chart:
        draw(arguments.chart)


if __name__ == "__main__":
    main()
