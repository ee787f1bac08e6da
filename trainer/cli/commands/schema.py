"""`sdxl-train schema`: what a configuration may hold, for editors and for people."""

import argparse
import json
import sys
from collections.abc import Sequence

from trainer.config.reference import field_docs, json_schema

_EXAMPLE = """\
example:
  sdxl-train schema > sdxl-train.schema.json

and as the first line of a configuration, for completion and help in the editor:
  # yaml-language-server: $schema=sdxl-train.schema.json
"""


def main(argv: Sequence[str]) -> int:
    """Prints the JSON Schema, or the reference of all keys in Markdown; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train schema",
        description="Print the JSON Schema of a configuration file.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--markdown", action="store_true", help="print the text of docs/config.md instead")
    arguments = parser.parse_intermixed_args(argv)
    sys.stdout.write(field_docs() if arguments.markdown else json.dumps(json_schema(), indent=2) + "\n")
    return 0
