"""What each ready configuration takes of a card: the figures in the headers of `configs/` and in docs/recipes.md.

    python benchmarks/recipes.py [NAME ...]

As `sdxl-train plan` works them out for the cards that a configuration is for, with SDXL's shapes, which come with the
program, in place of a model's file. No GPU is needed; rows are kept for the next time.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.load import load_config
from trainer.memory.choice import GIB
from trainer.memory.report import MemoryPlan
from trainer.memory.run_plan import memory_plan
from trainer.model_files.key_map import COMPONENTS
from trainer.model_files.presets import preset
from trainer.model_files.run_model import open_model
from trainer.train.memory_inputs import make_setting, planned_run

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Recipe:
    """A configuration, what it is for, and values that its header says replace those of the file.

    Attributes:
        cards: of each host.
    """

    name: str
    cards: int = 1
    overrides: tuple[str, ...] = ()
    hosts: int = 1


RECIPES = (
    Recipe("4x3090", 4),
    Recipe("2x4x3090", cards=4, hosts=2),
    Recipe("millions", 4),
    Recipe("v-prediction", 4),
    Recipe("rectified-flow", 4),
    Recipe("4xv100", 4),
    Recipe("2x24g", 2),
    Recipe("1x24g"),
    Recipe("1x16g"),
    Recipe("1x16g", overrides=("memory.budget=11GiB",)),
    Recipe("1x16g", overrides=("optimizer.kind=adafactor", "memory.budget=9.5GiB")),
    Recipe("1x16g", overrides=("memory.budget=7.5GiB",)),
    Recipe("lora-1x16g"),
    Recipe("lora-1x12g"),
    Recipe("lora-1x8g"),
)


def main(argv: Sequence[str]) -> None:
    """Print the rows of the recipes that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 1x24g (default: all)")
    names = parser.parse_args(argv).names
    print("| configuration | cards of a host | planned GiB | recomputed | way | RAM GiB | checkpoint GiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder))
        for recipe in RECIPES:
            if not names or recipe.name in names:
                print(row(recipe, plan_of(recipe, Path(folder))), flush=True)


def write_shapes(folder: Path) -> None:
    """SDXL in diffusers' layout without its weights."""
    for name in COMPONENTS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(preset(name)))


def plan_of(recipe: Recipe, shapes: Path) -> MemoryPlan:
    """The plan of a run on these cards, its data not prepared yet.

    Args:
        shapes: folder that `write_shapes` has written.
    """
    config = load_config(
        CONFIGS / f"{recipe.name}.yaml", [*recipe.overrides, f"model.path={shapes}"], check_paths=False
    )
    setting = make_setting(config, "cuda", None, recipe.hosts * recipe.cards, recipe.cards)
    return memory_plan(planned_run(config, open_model(shapes)), setting)


def row(recipe: Recipe, plan: MemoryPlan) -> str:
    """A row of the table."""
    name, chosen = " ".join((recipe.name, *recipe.overrides)), plan.chosen
    if chosen is None:
        least = min(rung.needed for rung in plan.looked_at)
        return f"| {name} | {recipe.cards} | does not fit: {least / GIB:.2f} | | | | |"
    way = chosen.label + ", offloaded" * chosen.offloads
    return (
        f"| {name} | {recipe.cards} | {chosen.needed / GIB:.2f} | {chosen.recomputed} of {plan.num_blocks} | {way} "
        f"| {plan.host_bytes / GIB:.0f} | {plan.checkpoint_bytes / GIB:.2f} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
