"""Installed packages that are not to be imported: data files that they ship, and what others import unasked."""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from trainer.errors import UserError

UNASKED = ("bitsandbytes", "sklearn")
"""What workers import only where they need it.

diffusers and peft take bitsandbytes if they find it: 0.9 s of CPU, and it may touch CUDA. Versions of transformers for
Python 3.10 take scikit-learn, and with it pandas and pyarrow, whose allocator starts a thread: none goes over a fork.
"""
_held_back: set[str] = set()


def find_package_file(package: str, distribution: str, file: str) -> Path:
    """Where a file of an installed package lies.

    The package is not imported, so what it needs itself does not have to be installed.

    Args:
        package: the name that is imported; distribution: the name that is installed.
        file: path inside the package.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(f"package {distribution} is not installed; run: pip install --no-deps {distribution}")
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise UserError(f"{folders[0]} has no {file}; run: pip install --no-deps --upgrade {distribution}")


def hold_back(*packages: str) -> None:
    """Have libraries that look whether these are there find that they are not, until they are `let_in`."""
    for package in packages:
        if package not in sys.modules:
            sys.modules[package] = None  # pyright: ignore[reportArgumentType]
            _held_back.add(package)


def let_in(package: str) -> None:
    """Undo `hold_back`: who imports it from now on gets it."""
    if package in _held_back:
        _held_back.discard(package)
        del sys.modules[package]


def is_installed(package: str) -> bool:
    """Whether there is such a package, held back or not."""
    return PathFinder.find_spec(package) is not None
