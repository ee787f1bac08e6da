"""The shape of the code: imports go one way, files and functions stay readable, the command answers at once."""

import ast
import functools
import resource
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "trainer").rglob("*.py"))
# Which rooms of trainer/ a room may import, itself and the modules beside the rooms aside. A room stands below all that
# import it, so that there are no circles between rooms.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "diffusion": set(),
    "host": set(),
    "measure": set(),
    "parallel": set(),
    "model_files": set(),
    "data": {"config"},
    "doctor": {"host", "parallel"},
    "importing": {"config"},
    "notify": {"config"},
    "report": {"config", "data"},
    "tiny": {"model_files"},
    "disks": {"parallel"},
    "checkpoint": {"disks", "model_files", "parallel"},
    "optim": {"config", "parallel"},
    "adapters": {"config", "model_files"},
    "model": {"adapters", "config", "data", "diffusion", "model_files"},
    "wire": {"config", "optim", "parallel"},
    "memory": {"adapters", "config", "data", "measure", "model", "model_files", "optim", "parallel", "wire"},
    "evaluate": {"config", "data", "diffusion", "disks", "measure", "model", "model_files", "parallel"},
    "publish": {"adapters", "checkpoint", "config", "model", "model_files", "optim"},
}
ALLOWED["train"] = {*ALLOWED} - {"doctor", "tiny"}
ALLOWED["cli"] = {*ALLOWED} - {"diffusion"}
# Which rooms may take the whole configuration; the others get plain values, or the one section that they read.
WHOLE_CONFIG = {"cli", "config", "importing", "train", "publish"}  # a published file holds the configuration of its run
MAX_MODULES = 16  # of one folder; a drawer of its own is easier to find one's way in
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TRAIN_LINES = 120


@functools.cache
def parsed(file: Path) -> ast.Module:
    """A module's syntax, which several tests look at."""
    return ast.parse(file.read_text())


def imported_modules(tree: ast.AST) -> set[str]:
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_one_way_and_sizes_are_kept(file: Path) -> None:
    text = file.read_text()
    tree = parsed(file)
    package = file.relative_to(ROOT / "trainer").parts[0]
    if package in ALLOWED:
        ours = {name.split(".")[1] for name in imported_modules(tree) if name.startswith("trainer.")}
        beside = {"errors", "faults", "freed_memory", "guards", "keyed", "package_files", "raster", "zip_guard"}
        assert ours - {package, *beside} <= ALLOWED[package]
        if package not in WHOLE_CONFIG:
            assert "Config" not in {alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())
                                    if isinstance(node, ast.ImportFrom)}  # fmt: skip
    # One that anything else starts is not deaf to signals, and serves the readers too.
    assert "forkserver" not in text or file.name == "fork_server.py"
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
    tree = parsed(file)
    assert file.name == "__main__.py" or ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            documented_below_its_fields = file.name == "schema.py" or "sections" in file.parts
            assert ast.get_docstring(node) or node.name == "main" or documented_below_its_fields, node.name


def test_rooms_are_small_and_names_tell_modules_apart() -> None:
    """No folder has more modules than one can look over, and no two modules have one name, but for the commands.

    A command's module is called what the user types.
    """
    modules = [file for file in FILES if file.name not in ("__init__.py", "__main__.py")]
    rooms = Counter(file.parent for file in modules)
    del rooms[ROOT / "trainer" / "cli" / "commands"]  # one for each word that the user may type
    assert max(rooms.values()) <= MAX_MODULES, rooms.most_common(3)
    names = Counter(file.stem for file in modules if file.parent.name != "commands")
    assert not {name for name, count in names.items() if count > 1}
    assert {file.parent.name for file in modules if file.parent.parent == ROOT / "trainer"} == {*ALLOWED}


def test_modules_import_one_another_without_circles() -> None:
    """At import; what is imported inside a function waits until both modules are there."""
    graph = {module_name(file): set[str]() for file in FILES}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            for name in imported_modules(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                graph[module_name(file)] |= {name} & graph.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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
