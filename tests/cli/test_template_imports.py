"""What the workers' template imports: a name that is wrong would only make starts slow, and nobody would notice."""

import os
import subprocess
import sys

import pytest

from trainer.cli.keep_running import _IMPORTS

LARGE = {"diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip"}
OF_TRAINING = {"diffusers.models.unets.unet_2d_condition", "torch.distributed.fsdp"}


@pytest.mark.parametrize("task", sorted(_IMPORTS))
def test_large_packages_are_in_before_the_first_fork_and_none_of_them_starts_threads(task: str) -> None:
    """A thread does not go over into a fork, and what it holds stays locked there for ever."""
    code = (
        "import importlib, sys, os\n"
        "from trainer.package_files import UNASKED, hold_back\n"
        "hold_back(*UNASKED)\n"  # as the template does
        f"for module in {_IMPORTS[task]!r}: importlib.import_module(module)\n"
        "print(len(os.listdir('/proc/self/task')), *sorted(sys.modules))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # OpenBLAS starts its own otherwise, and looks after them in forks
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    threads, *modules = done.stdout.split()
    assert threads == "1"
    assert LARGE | (set() if task == "prepare" else OF_TRAINING) <= set(modules)
