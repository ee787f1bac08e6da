"""What `eval` and `sample` are pointed at: a run directory or one of its checkpoints."""

from pathlib import Path

from trainer.cli.start import RESOLVED_CONFIG
from trainer.errors import UserError
from trainer.train.run_dir import MANIFEST, list_checkpoints


def find_target(target: Path) -> tuple[Path, Path]:
    """(resolved config, checkpoint) of a run directory's newest checkpoint, or of the checkpoint itself."""
    target = target.absolute()
    if (target / MANIFEST).is_file():
        run_dir, checkpoint = target.parent.parent, target
    else:
        if not target.is_dir():
            raise UserError(f"{target}: no such folder; give a run directory or a checkpoint in it")
        checkpoints = list_checkpoints(target)
        if not checkpoints:
            raise UserError(f"{target}: holds no complete checkpoint; give a run directory or a checkpoint in it")
        run_dir, checkpoint = target, checkpoints[-1]
    config = run_dir / RESOLVED_CONFIG
    if not config.is_file():
        raise UserError(f"{config}: missing; it is written when the run starts")
    return config, checkpoint
