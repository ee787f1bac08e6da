"""`sdxl-train import-kohya FILE`: a command of kohya's sd-scripts as a configuration."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError, printable
from trainer.importing.command_text import command_of_words
from trainer.importing.given import Draft
from trainer.importing.kohya_config import as_yaml, import_command, import_file

_EXAMPLES = """\
examples:
  sdxl-train import-kohya train.sh -o mine.yaml
      a shell script with the command, as it was typed; every option is listed with what became of it
  sdxl-train import-kohya arguments.toml -o mine.yaml
      the file of kohya's --config_file; a --dataset_config that is named in it is read too
  sdxl-train import-kohya -o mine.yaml -- accelerate launch sdxl_train.py --learning_rate=1e-5 ...
      the command itself

then: sdxl-train plan mine.yaml
what is different here, and why: docs/from_kohya.md
"""


def main(argv: Sequence[str]) -> int:
    """Turn a command of sd-scripts' sdxl_train.py or sdxl_train_network.py into a configuration."""
    words = [*argv]
    command = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        prog="sdxl-train import-kohya",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a shell script or .toml; or -- COMMAND")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="the .yaml to write (default: the screen)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--accelerate-config", type=Path, metavar="YAML", help="says how many processes there are")
    arguments = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if (arguments.file is None) == (not command):
        raise UserError("import-kohya: give a file, or the command behind `--`")
    if arguments.out is not None and arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.out}: exists; give another name, or --overwrite")
    if arguments.file is not None:
        draft = import_file(arguments.file, arguments.accelerate_config)
    elif (found := command_of_words(command)) is not None:
        draft = import_command(found, "the command", arguments.accelerate_config)
    else:
        raise UserError("import-kohya: the command has no sdxl_train.py or sdxl_train_network.py in it")
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
                lines.append(f"{'--' + option:<{width}}  {shown[0]}")
                lines += [f"{'':<{width}}  {more}" for more in shown[1:]]
    for note in draft.notes:
        lines += textwrap.wrap(f"note: {note}", width + 2 + room, subsequent_indent="      ")
    return lines
