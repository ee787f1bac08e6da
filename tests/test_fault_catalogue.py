"""Every fault of the catalogue has its tests, by name."""

import ast
import functools
from pathlib import Path

import pytest

from tests.fault_catalogue import CATALOGUE

ROOT = Path(__file__).parent.parent


@functools.cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_it_is_whole() -> None:
    assert len(CATALOGUE) == 27


@pytest.mark.parametrize("fault", CATALOGUE)
def test_each_fault_is_tried(fault: str) -> None:
    assert CATALOGUE[fault]
    for test in CATALOGUE[fault]:
        file, name = test.split("::")
        assert name in functions_of(file), f"{test} is gone"
