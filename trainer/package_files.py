"""Data files that installed packages ship, found without importing the packages."""

from importlib.util import find_spec
from pathlib import Path

from trainer.errors import UserError


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
