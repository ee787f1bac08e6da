"""The command line: `sdxl-train CONFIG.yaml` trains, `sdxl-train COMMAND ...` does one of the other jobs.

Nothing here imports torch: help, mistakes in a config and the plan answer at once.
"""

import errno
import importlib
import importlib.util
import os
import platform
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import __version__
from trainer.errors import UserError, printable
from trainer.package_files import hold_back
from trainer.parallel.worker import note_ending

COMMANDS = {
    "train": "train from a config; the word may be left out",
    "init": "write a first configuration, by a look at the images and the machine",
    "plan": "say what a config would do: what trains, how many steps, what data",
    "doctor": "is this machine fit to train: cards, links, memory, disks, exchange, each with what to do",
    "bench": "measure strategies and batch sizes, or optimizers, on this machine: speed, memory, where the time goes",
    "prepare": "encode the images of a config into its prepared data set",
    "verify": "re-read a prepared data set and compare it with its checksums",
    "data": "look at a prepared data set: `data stats`, a page (`data browse`), one image (`data show`)",
    "eval": "validation loss and a sample grid of a run or checkpoint",
    "report": "one page of a run: curves, samples, events, settings; or live while it trains",
    "sample": "draw images from a run or checkpoint",
    "ema": "a running average of another length than the run kept",
    "export": "write a checkpoint as one file or folder that A1111, ComfyUI, diffusers and others open",
    "merge": "the weighted sum of two models, with weights for blocks",
    "adapter": "LoRAs and their kin: put one into a model, make one of two models, look at one",
    "import": "settings of kohya's scripts, OneTrainer or diffusers' as a configuration, and what became of each",
    "import-kohya": "the same, as it was called first",
    "schema": "print the configuration's JSON Schema, for editors",
    "completion": "print what bash, zsh or fish needs to complete commands, options and configuration keys",
    "inspect": "say what a model is and what is in it, or what differs between two",
    "make-tiny": "make a tiny SDXL and a data set of real photographs, to try everything out",
}

# What a disk or a path is to blame for, wherever it turns up.
_OF_THE_PLACE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO,
)  # fmt: skip
USAGE = f"""\
usage: sdxl-train CONFIG.yaml [section.key=value ...] [--resume auto|true|false|CHECKPOINT]
       sdxl-train COMMAND ...

Fine-tune all of Stable Diffusion XL from one YAML file.

commands (each has its own --help):
{chr(10).join(f"  {name:<12} {text}" for name, text in COMMANDS.items())}

examples:
  sdxl-train configs/4x3090.yaml                          train, or go on where the run stopped
  sdxl-train configs/4x3090.yaml optimizer.lr=1e-6        the same with one value changed
  sdxl-train plan configs/4x3090.yaml                     look before you leap
  sdxl-train eval runs/4x3090                             score the newest checkpoint

options:
  -h, --help     this text
  --version      the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 a mistake that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a process of its own, and not a test's, which may want the package itself
        hold_back("bitsandbytes")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sdxl-train {__version__}, {_torch_told()}")
        return 0
    try:
        command = arguments.pop(0) if arguments[0] in COMMANDS else _default_command(arguments[0])
        module = importlib.import_module(f"trainer.cli.commands.{command.replace('-', '_')}")
        return module.main(arguments)
    except UserError as error:
        for line in error.lines:
            print(f"sdxl-train: {line}", file=sys.stderr)
        note_ending("refused")
        return 2
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does; Python would complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        print(f"sdxl-train: {printable(str(error.filename or 'writing'))}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _default_command(word: str) -> str:
    """`train` where the first word may be a config file; otherwise it was meant as a command."""
    import difflib

    if word.startswith("-") or word.endswith((".yaml", ".yml")) or "/" in word:
        return "train"
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"commands are {', '.join(COMMANDS)}"
    raise UserError(f"{word}: neither a command nor a .yaml file; {hint}")


def _torch_told() -> str:
    """PyTorch's version and what it was built for, by its file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "PyTorch is not installed"
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    built_for = f"CUDA {facts['cuda']}" if facts.get("cuda") else "the CPU"
    return f"PyTorch {facts['__version__'].partition('+')[0]} for {built_for}, Python {platform.python_version()}"
