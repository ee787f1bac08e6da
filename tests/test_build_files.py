"""The Dockerfile, the workflows and the pinned versions fit the project: paths, Pythons, extras, scripts."""

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.guards import parse_toml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def test_the_image_is_made_of_files_that_reach_the_builder() -> None:
    """`.dockerignore` keeps back all but what it names after `!`."""
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for words in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for word in words.split()]
    assert {"pyproject.toml", "trainer", "LICENSE", "README.md", "constraints.txt"} == {*copied}
    for name in copied:
        assert (ROOT / name).exists() and any(fnmatch.fnmatch(name, pattern) for pattern in let_through), name


def test_the_image_has_a_python_extras_and_a_compiler_that_are_needed() -> None:
    (version,) = re.findall(r"^FROM python:(3\.\d+)-slim$", DOCKERFILE, re.M)
    assert version in PYTHONS
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)
    named = [extra for words in [extras, *re.findall(r"EXTRAS=(\S+) -t", DOCKERFILE)] for extra in words.split(",")]
    assert {*named} <= PROJECT["optional-dependencies"].keys()
    assert re.search(r"^RUN apt-get update && apt-get install .* g\+\+ ", DOCKERFILE, re.M)
    assert '["sdxl-train"]' in DOCKERFILE and "sdxl-train" in PROJECT["scripts"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_what_is_there(file: Path) -> None:
    told: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for job in told["jobs"].values():
        pythons = [*job.get("strategy", {}).get("matrix", {}).get("python", [])]
        for step in job["steps"]:
            pythons += [str(step.get("with", {}).get("python-version", PYTHONS[0]))]
            for script in re.findall(r"(?:^|\s)(scripts/\S+)", step.get("run", "")):
                assert (ROOT / script).stat().st_mode & 0o111, script
        assert {python for python in pythons if not python.startswith("${{")} <= {*PYTHONS}


@pytest.mark.parametrize("python", PYTHONS)
def test_pinned_versions_are_in_the_ranges_of_the_project(python: str) -> None:
    """On each Python: what is asked for has a pin that it allows, or none, so that the newest that fits is taken."""
    on = {"python_version": python, "python_full_version": f"{python}.9", "extra": ""}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(on):
                pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for line in [*PROJECT["dependencies"], *extras]:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(on):
            pinned = pins.get(canonicalize_name(wanted.name))
            assert pinned is None or wanted.specifier.contains(pinned), line
    # What diffusers takes on 3.10, its last there, needs an older hub than the one of the pins.
    assert ("diffusers" in pins) == ("huggingface-hub" in pins) == (python != "3.10")
