"""What the workers' template imports: a name that is wrong would only make starts slow, and nobody would notice."""

import json
import os
import subprocess
import sys

import pytest

from trainer.cli.keep_running import _IMPORTS

LARGE = {"diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip"}
OF_TRAINING = {"diffusers.models.unets.unet_2d_condition", "torch.distributed.fsdp"}
# What begins all lists is imported once, and the rest of each list in a fork.
SCRIPT = """
import importlib, json, os, sys
from trainer.package_files import UNASKED, hold_back

def threads():
    return len(os.listdir("/proc/self/task"))

hold_back(*UNASKED)  # as the template does
lists = json.loads(sys.argv[1])
shared = os.path.commonprefix([*lists.values()])
for module in shared:
    importlib.import_module(module)
before = threads()
for task, modules in lists.items():
    if os.fork() == 0:
        for module in modules[len(shared):]:
            importlib.import_module(module)
        print(json.dumps([task, max(before, threads()), sorted(sys.modules)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, task
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, tuple[int, set[str]]]:
    """By the modules that are to be imported: threads, and the modules that are there."""
    lists = {"+".join(modules): modules for modules in _IMPORTS.values()}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # OpenBLAS starts its own otherwise, and looks after them in forks
    command = [sys.executable, "-c", SCRIPT, json.dumps(lists)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return {name: (threads, {*modules}) for name, threads, modules in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("task", sorted(_IMPORTS))
def test_large_packages_are_in_before_the_first_fork_and_none_of_them_starts_threads(
    imported: dict[str, tuple[int, set[str]]], task: str
) -> None:
    """A thread does not go over into a fork, and what it holds stays locked there for ever."""
    threads, modules = imported["+".join(_IMPORTS[task])]
    assert threads == 1
    assert LARGE | (set() if task == "prepare" else OF_TRAINING) <= modules
