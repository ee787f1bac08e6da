"""`sdxl-train import FILE`, or `import-kohya`: a command or settings of another trainer as a configuration."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError, printable
from trainer.importing.command_text import SCRIPTS, command_of_words
from trainer.importing.draft_end import as_yaml
from trainer.importing.given import Draft
from trainer.importing.recognised import import_any, import_of

_EXAMPLES = """\
examples:
  sdxl-train import train.sh -o mine.yaml
      a shell script with a command of kohya's or diffusers' scripts, as it was typed; every option is listed with what
      became of it
  sdxl-train import arguments.toml -o mine.yaml
      the file of kohya's --config_file; a --dataset_config that is named in it is read too
  sdxl-train import config.json -o mine.yaml
      OneTrainer's settings, with the concepts that they name
  sdxl-train import -o mine.yaml -- accelerate launch sdxl_train.py --learning_rate=1e-5 ...
      the command itself

then: sdxl-train plan mine.yaml
what is different here, and why: docs/from_kohya.md, docs/from_others.md
"""


def main(argv: Sequence[str]) -> int:
    """Turn a command of kohya's or diffusers' SDXL scripts, or OneTrainer's settings, into a configuration."""
    return import_settings(argv, "import-kohya")


def import_settings(argv: Sequence[str], called: str) -> int:
    """The same, under the name by which the user has called it."""
    words = [*argv]
    command = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        prog=f"sdxl-train {called}",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="a shell script, .toml or .json; or -- COMMAND"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="the .yaml to write (default: the screen)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--accelerate-config", type=Path, metavar="YAML", help="says how many processes there are")
    arguments = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if (arguments.file is None) == (not command):
        raise UserError(f"{called}: give a file, or the command behind `--`")
    if arguments.out is not None and arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.out}: exists; give another name, or --overwrite")
    if arguments.file is not None:
        draft = import_any(arguments.file, arguments.accelerate_config)
    elif (found := command_of_words(command)) is not None:
        draft = import_of(found, "the command", arguments.accelerate_config)
    else:
        raise UserError(f"{called}: the command has no {SCRIPTS} in it")
    text = as_yaml(draft, str(arguments.file or "a command"))
    told = sys.stderr if arguments.out is None else sys.stdout
    for line in _report(draft):
        print(printable(line), file=told)
    if arguments.out is None:
        print(text, end="")
        return 0
    try:
        arguments.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{arguments.out}: could not be written: {error.strerror}") from None
    print(f"wrote {arguments.out}; next: sdxl-train plan {arguments.out}")
    return 0


def _report(draft: Draft) -> list[str]:
    """A line for each option, those that became keys first; then what to know."""
    width = max((len(option) for option in draft.given), default=0) + 2
    room = max(shutil.get_terminal_size().columns, 60) - width - 2
    lines = []
    for goes in (True, False):
        for option, text in draft.became.items():
            if text.startswith("- ") != goes:
                shown = textwrap.wrap(text, room) or [""]
                lines.append(f"{draft.mark + option:<{width}}  {shown[0]}")
                lines += [f"{'':<{width}}  {more}" for more in shown[1:]]
    for note in draft.notes:
        lines += textwrap.wrap(f"note: {note}", width + 2 + room, subsequent_indent="      ")
    return lines
