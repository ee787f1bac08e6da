"""`sdxl-train inspect FILE|DIR [OTHER]`: what a model is, what is in it, and what differs between two."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from trainer.checkpoint.run_dir import list_checkpoints
from trainer.cli.compare_text import comparison_lines
from trainer.cli.inspect_text import inspection_lines
from trainer.errors import MOST_OF_A_LINE, UserError, json_text, printable
from trainer.evaluate.change_chart import change_chart_png
from trainer.model_files.examine.compare import as_json as comparison_json
from trainer.model_files.examine.compare import comparable_bytes, compare
from trainer.model_files.examine.inspection import as_json, inspect, look, total_bytes
from trainer.model_files.header import HeaderFault

_EXAMPLES = """\
examples:
  sdxl-train inspect sdxl.safetensors                  all of it: every weight is read once
  sdxl-train inspect sdxl.safetensors --quick          headers only, at once
  sdxl-train inspect a.safetensors b.safetensors       what changed, block by block, and a chart beside b
  sdxl-train inspect base/ runs/x/checkpoints/step-00001000 -o change.png
"""


def main(argv: Sequence[str]) -> int:
    """Says what a model is; given two, what differs. Returns 0, or raises what makes it 2: not a model."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train inspect",
        description="Say what a model file or folder is and what is in it, or compare two block by block.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, metavar="FILE|DIR", help="a model file, a diffusers folder, a checkpoint or a run"
    )
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="the model to compare with it")
    parser.add_argument("--quick", action="store_true", help="read headers only: no faults, no hashes")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="an SDXL known to be right, to judge the text projection by"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="PNG", help="the chart of a comparison (default: beside OTHER)"
    )
    arguments = parser.parse_intermixed_args(argv)
    for name in ("model", "other", "reference"):
        path = getattr(arguments, name)
        if path is not None:
            setattr(arguments, name, checked(path))
    if arguments.other is not None:
        _compare(arguments)
        return 0
    if arguments.out is not None:
        raise UserError(f"--out {arguments.out}: a chart is drawn of two models; give a second one")
    _show(arguments)
    return 0


def checked(path: Path) -> Path:
    """The path of something that has tensors to look into; of a run directory, its newest checkpoint.

    Raises:
        UserError: it is not a model; the line says what it is.
    """
    found = look(path)
    if found.layout == "run":
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise UserError(f"{path} is a run directory without a complete checkpoint")
        return checkpoints[-1]
    if not found.is_readable:
        mend = f"; {found.mend}" if found.mend else ""
        raise UserError(f"{path} is {found.description}{mend}")
    return path


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes, on a terminal."""
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update


@contextmanager
def _faults_named(place: str) -> Iterator[None]:
    """What goes wrong with a file, as one line."""
    try:
        yield
    except HeaderFault as fault:
        raise UserError(f"{place}: holds {fault.description}{f'; {fault.mend}' if fault.mend else ''}") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror or error})") from None


def _show(arguments: argparse.Namespace) -> None:
    path: Path = arguments.model
    with _faults_named(str(path)), progress(path.name, 0 if arguments.quick else total_bytes(path)) as advance:
        found = inspect(path, quick=arguments.quick, reference=arguments.reference, on_bytes=advance)
    if arguments.json:
        print(json_text(as_json(found)))
        return
    for line in inspection_lines(found):
        print(printable(line, MOST_OF_A_LINE))


def _compare(arguments: argparse.Namespace) -> None:
    a, b = arguments.model, arguments.other
    for name in ("quick", "reference"):
        if getattr(arguments, name):
            raise UserError(f"--{name}: belongs to one model; of two, all weights are compared, A being the reference")
    out: Path = arguments.out or b.absolute().parent / f"{b.absolute().name}.change.png"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    with _faults_named(f"{a} or {b}"), progress("comparing", comparable_bytes(a, b)) as advance:
        found = compare(a, b, on_bytes=advance)
    if not found.tensors:
        raise UserError(
            f"{a} ({found.identity_a.description}) and {b} ({found.identity_b.description}) "
            "have no tensor of the same name and size; give two models of one kind"
        )
    try:
        change_chart_png(found, out)
    except OSError as error:
        raise UserError(
            f"{out}: the chart could not be written ({error.strerror or error}); --out names another place"
        ) from None
    if arguments.json:
        print(json_text(comparison_json(found) | {"chart": str(out)}))
        return
    for line in comparison_lines(found):
        print(printable(line, MOST_OF_A_LINE))
    print(f"\nchart: {out}")
