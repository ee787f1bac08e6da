"""The wheel that users install: built from the project's files, it works away from them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` would put beside the other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside what it is built from
    shutil.copytree(ROOT / "trainer", source / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (wheel,) = folder.glob("sdxl_train-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.e2e
def test_the_wheel_has_all_files_of_the_package_and_no_others(unpacked: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "trainer").rglob("*") if path.is_file()}
    expected = {path.as_posix() for path in ours if "__pycache__" not in path.parts}
    found = {path.relative_to(unpacked).as_posix() for path in (unpacked / "trainer").rglob("*") if path.is_file()}
    assert found == expected
    assert "trainer/py.typed" in found
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"trainer", "sdxl_train"}


@pytest.mark.e2e
def test_commands_work_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def told(*words: str) -> str:
        code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from trainer.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-I", "-c", code, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=env).stdout

    version = torch.__version__.partition("+")[0]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    assert told("--version").startswith(f"sdxl-train 0.1.0, PyTorch {version} for {built_for}, Python 3.")
    assert '"$schema"' in told("schema")
    told("make-tiny", "--help")
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "from trainer.model_files.presets import preset\n"
        "print(preset('unet')['sample_size'])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "128\n"
