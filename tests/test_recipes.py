"""Ready configurations: each is accepted, and what its header, the table of docs/recipes.md and `plan` say is one."""

import re
from pathlib import Path

import pytest

from benchmarks.recipes import CONFIGS, RECIPES, Recipe, plan_of, write_shapes
from trainer.config.load import load_config
from trainer.memory.choice import GIB, parse_size

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
FILES = sorted(CONFIGS.glob("*.yaml"))
ON_CARDS = [file for file in FILES if file.stem != "tiny"]  # which trains on the CPU


def header(file: Path) -> str:
    """What stands in a configuration before its first key, without line ends."""
    lines = file.read_text(encoding="utf-8").partition("\nrun:")[0].split("\n")
    return " ".join(line.removeprefix("#").strip() for line in lines)


def planned(file: Path) -> tuple[str, str]:
    """The first figure of the header, (planned, budget) in GiB."""
    found = re.search(r"planned ([\d.]+) of ([\d.]+) GiB", header(file))
    assert found, f"{file.name}: no `planned N of N GiB`"
    return found[1], found[2]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_is_accepted_and_introduced(file: Path) -> None:
    config = load_config(file, check_paths=False)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=sdxl-train.schema.json\n# ")
    assert re.search(
        rf"^#   .*(?:sdxl-train|-m trainer|hosts\.sh 0 2 10\.0\.0\.1) configs/{re.escape(file.name)}\b", text, re.M
    )
    assert "# Hardware: " in text and "# Numbers:  " in text
    assert config.run.dir == Path("runs") / file.stem
    if file in ON_CARDS:
        figure, budget = planned(file)
        assert "# Status:   " in text and f"sdxl-train plan configs/{file.name}" in text
        assert float(figure) <= float(budget)
        assert parse_size(config.memory.budget) == float(budget) * GIB


def test_every_configuration_has_a_row_with_the_figures_of_its_header() -> None:
    rows = {
        name: row
        for row in PAGE.read_text(encoding="utf-8").split("\n")
        for name in re.findall(r"/([\w-]+)\.yaml\)", row)
    }
    assert rows.keys() == {file.stem for file in ON_CARDS} == {recipe.name for recipe in RECIPES}
    for file in ON_CARDS:
        assert f"| {planned(file)[0]} |" in rows[file.stem], file.name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: " ".join((recipe.name, *recipe.overrides)))
def test_the_header_says_what_is_planned(recipe: Recipe, tmp_path: Path) -> None:
    """A variant's figure stands somewhere in the header, beside the overrides that make it."""
    write_shapes(tmp_path)
    file = CONFIGS / f"{recipe.name}.yaml"
    plan = plan_of(recipe, tmp_path)
    assert plan.chosen is not None
    figure, said = f"{plan.chosen.needed / GIB:.2f}", header(file)
    if not recipe.overrides:
        assert planned(file)[0] == figure
        recomputed = (
            "all" if plan.chosen.recomputed == plan.num_blocks else f"{plan.chosen.recomputed} of {plan.num_blocks}"
        )
        if plan.chosen.recomputed:
            assert f"{recomputed} blocks recomputed" in said
    else:
        _, _, behind = said.partition(" ".join(recipe.overrides))
        assert figure in behind.partition("`")[2][:250]
