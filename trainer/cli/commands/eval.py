"""`sdxl-train eval RUN_DIR|CHECKPOINT`: how good are these weights?"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.cli.arguments import read_run
from trainer.cli.publish_arguments import add_weights_name
from trainer.cli.run_target import find_target
from trainer.cli.start_workers import start_workers
from trainer.config.sections.ema_config import LIVE
from trainer.errors import UserError
from trainer.evaluate.quality.clip_folder import read_clip_folder
from trainer.evaluate.quality.feature_model import read_feature_model
from trainer.evaluate.validating.paired import read_losses
from trainer.guards import Limits
from trainer.publish.export_source import require_average

_MOST_DRAWN = 50_000


def main(argv: Sequence[str]) -> int:
    """Validation loss with fixed noise, by timestep, bucket and source; a fixed-seed sample grid and the loss curve of
    a run or checkpoint; with --quality or --fid, scores of drawn images."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train eval", description=main.__doc__, epilog="example: sdxl-train eval runs/4x3090"
    )
    parser.add_argument(
        "target", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the run's")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/eval/CHECKPOINT[-NAME])")
    add_weights_name(parser)
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="CLIP_FOLDER",
        help="draw images for held-out captions and score them (CLIP score, CMMD, KID) by this local CLIP model, such "
        "as a copy of openai/clip-vit-large-patch14-336; nothing is downloaded",
    )
    parser.add_argument(
        "--fid",
        type=Path,
        metavar="FILE|FOLDER",
        help="draw them, and give FID and KID by Inception's weights in a local file "
        "(pt_inception-2015-12-05-6726825d.pth), or FD-DINOv2 by a DINOv2 model's folder; with --quality or without",
    )
    parser.add_argument(
        "--quality-images", type=int, metavar="N", help=f"so many of them, 2 to {_MOST_DRAWN:,} (default: 64)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="EVAL_FOLDER",
        help="compare with an earlier evaluation, image by image: RUN_DIR/eval/CHECKPOINT",
    )
    arguments = parser.parse_intermixed_args(argv)
    config_path, checkpoint = find_target(arguments.target)
    require_average(checkpoint, arguments.weights)
    named = checkpoint.name + (f"-{arguments.weights}" if arguments.weights != LIVE else "")
    out_dir = (arguments.out or config_path.parent / "eval" / named).absolute()
    config, _ = read_run(config_path, arguments.overrides)
    options: dict[str, Any] = {"weights": str(checkpoint), "average": arguments.weights, "out_dir": str(out_dir)}
    limits = config.limits.plain()
    options["quality"] = _quality(arguments.quality, arguments.fid, arguments.quality_images, limits)
    if arguments.against:
        read_losses(arguments.against, limits)
        options["against"] = str(arguments.against.absolute())
    return start_workers("evaluate", config, out_dir, options)


def _quality(folder: Path | None, model: Path | None, images: int | None, limits: Limits) -> dict[str, Any] | None:
    """What the workers are told of the scores of drawn images; a model that is none is refused before they start."""
    if folder is None and model is None:
        if images is not None:
            raise UserError(
                f"--quality-images {images}: has no effect without --quality CLIP_FOLDER or --fid FILE|FOLDER"
            )
        return None
    options: dict[str, Any] = {"num_images": images or 64}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(
                f"--quality {folder}: no such folder; give a CLIP model's, with config.json and its weights"
            )
        read_clip_folder(folder, limits)
        options["clip_folder"] = str(folder.absolute())
    if model is not None:
        read_feature_model(model, limits)
        options["feature_model"] = str(model.absolute())
    if images is not None and not 2 <= images <= _MOST_DRAWN:
        raise UserError(f"--quality-images {images}: must be 2 to {_MOST_DRAWN:,}")
    return options
