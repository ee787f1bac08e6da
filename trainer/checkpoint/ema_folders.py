"""Where running averages lie: beside a checkpoint's components, and as snapshots of their own in the run directory.

    checkpoints/step-00001000/unet_ema/            an average called `ema`, as `unet/` is
    ema/step-00000250/unet_long/                   a snapshot of the power average `long`, written as a checkpoint is

Free of torch.
"""

import re
from pathlib import Path

from trainer.checkpoint.run_dir import checkpoint_step, delete_checkpoint, list_checkpoints

SNAPSHOTS = "ema"
_FOLDER = re.compile(r"(unet|text_encoder_2|text_encoder|adapter|new_tokens)_([a-z][a-z0-9_-]*)")


def average_folder(component: str, average: str) -> str:
    """The folder of one component's average, such as `unet_ema`."""
    return f"{component}_{average}"


def averages_in(checkpoint: Path) -> list[str]:
    """Names of the averages that a checkpoint or a snapshot holds."""
    found = (_FOLDER.fullmatch(folder.name) for folder in sorted(checkpoint.iterdir()) if folder.is_dir())
    return [*dict.fromkeys(match.group(2) for match in found if match)]


def components_of(checkpoint: Path, average: str) -> list[str]:
    """The components of which a checkpoint or a snapshot holds this average."""
    found = (_FOLDER.fullmatch(folder.name) for folder in sorted(checkpoint.iterdir()) if folder.is_dir())
    return [match.group(1) for match in found if match and match.group(2) == average]


def snapshot_dir(run_dir: Path, step: int) -> Path:
    """Where the snapshot of `step` lies."""
    return run_dir / SNAPSHOTS / f"step-{step:08d}"


def drop_snapshots_after(run_dir: Path, step: int) -> list[Path]:
    """Delete the snapshots of steps that a resumed run is going to do anew; returns which."""
    later = [path for path in list_checkpoints(run_dir, SNAPSHOTS) if checkpoint_step(path) > step]
    for path in later:
        delete_checkpoint(path)
    return later
