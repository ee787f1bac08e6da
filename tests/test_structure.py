"""The shape of the code: imports go one way, files and functions stay readable, the command answers at once."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "trainer").rglob("*.py"))
# Which packages of trainer/ a package may import, itself and the modules beside the packages aside.
ALLOWED = {
    "cli": {
        "checkpoint",
        "config",
        "data",
        "evaluate",
        "measure",
        "memory",
        "model",
        "model_files",
        "optim",
        "parallel",
        "publish",
        "tiny",
        "train",
    },
    "train": {
        "checkpoint",
        "config",
        "data",
        "diffusion",
        "evaluate",
        "measure",
        "memory",
        "model",
        "model_files",
        "optim",
        "parallel",
        "publish",
    },
    "evaluate": {"config", "data", "diffusion", "measure", "model", "model_files", "optim", "parallel", "train"},
    "model": {"config", "data", "diffusion", "model_files", "optim", "tiny"},
    "data": set(),
    "tiny": {"model_files"},
    "measure": {"config", "data"},
    "parallel": set(),
    "diffusion": set(),
    "config": set(),
    "model_files": set(),
    "publish": {"checkpoint", "config", "model", "model_files", "optim", "train"},
    "optim": {"config", "data", "parallel"},
    "memory": {"config", "data", "measure", "model", "model_files", "optim", "parallel", "train"},
    "checkpoint": {"model_files"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TRAIN_LINES = 120


def imported_modules(tree: ast.AST) -> set[str]:
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_one_way_and_sizes_are_kept(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    package = file.relative_to(ROOT / "trainer").parts[0]
    if package in ALLOWED:
        ours = {name.split(".")[1] for name in imported_modules(tree) if name.startswith("trainer.")}
        assert ours - {package, "errors", "keyed", "package_files"} <= ALLOWED[package]
    if package == "diffusion":
        third_party = {name.split(".")[0] for name in imported_modules(tree)} - set(sys.stdlib_module_names)
        assert third_party <= {"torch", "trainer"}
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = MAX_TRAIN_LINES if node.name == "train" else MAX_FUNCTION_LINES
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_everything_public_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert file.name == "__main__.py" or ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            documented_below_its_fields = file.parent.name == "config" and file.name in ("schema.py", "sources.py")
            assert ast.get_docstring(node) or node.name == "main" or documented_below_its_fields, node.name


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "--help"], ["no-such.yaml"]])
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    """In half a second of CPU time; importing torch alone takes two. The limit is for a machine with other work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from trainer.cli.main import main; code = main(sys.argv[1:]); "
    code += "print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (2 if "no-such.yaml" in arguments else 0), done.stderr
    assert "True" not in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
