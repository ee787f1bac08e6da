"""The workers' side of `eval` and `sample`: load the weights that are to be judged, score or draw, write it down."""

import json
import logging
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.data.store.snapshot import PreparedSet
from trainer.evaluate.drawing.places import SAMPLES
from trainer.evaluate.pictures import loss_curve_png
from trainer.evaluate.scoring import Scorer
from trainer.measure.telemetry import read_metrics
from trainer.model_files.run_model import RunModel
from trainer.parallel.comm import Comm
from trainer.train.build import load_denoiser, make_scorer
from trainer.train.placement import require_masks

_log = logging.getLogger(__name__)


def evaluate_weights(
    config: Config, model: RunModel, comm: Comm, weights: Path, out_dir: Path, average: str = LIVE
) -> None:
    """Validation loss, loss curve and samples of the UNet in `weights`, written into `out_dir` in place of what an
    earlier call wrote there.

    Without held-out images there is no validation loss; the log says so.

    Args:
        average: name of the one that is judged; `live`: the weights that train.
    """
    scorer = _scorer(config, model, comm, weights, average)
    if sum(scorer.prepared.rows_per_bucket("validation")):
        result = scorer.validate()
        _log.info("validation loss %.5f over %d images", result.loss, result.num_images)
        for timestep, loss in result.at_timestep.items():
            _log.info("  timestep %3d: %.5f", timestep, loss)
        if comm.rank == 0:
            record = {
                "weights": str(weights),
                "average": None if average == LIVE else average,
                "loss": result.loss,
                "loss_at_timestep": result.at_timestep,
                "images": result.num_images,
            }
            (out_dir / "validation.json").write_text(json.dumps(record, indent=1) + "\n")
    else:
        _log.info("no held-out images (data.validation_fraction = 0): no validation loss")
    _log.info("samples: %s", scorer.draw(out_dir / SAMPLES, _name(weights, average)))
    metrics = read_metrics(config.run.dir)
    if comm.rank == 0 and metrics:
        loss_curve_png(metrics, out_dir / "loss.png", title=config.run.dir.name)
        _log.info("loss curve: %s", out_dir / "loss.png")


def sample_weights(
    config: Config, model: RunModel, comm: Comm, weights: Path, out_dir: Path, average: str = LIVE
) -> None:
    """Samples of the UNet in `weights`, or of its average, in a folder of their own in `out_dir`, beside older ones."""
    scorer, name = _scorer(config, model, comm, weights, average), _name(weights, average)
    _log.info("samples: %s", scorer.draw(out_dir / name, name, keep_older=True))


def _name(weights: Path, average: str) -> str:
    return weights.name + (f"-{average}" if average != LIVE else "")


def _scorer(config: Config, model: RunModel, comm: Comm, weights: Path, average: str) -> Scorer:
    prepared = PreparedSet.open(config.data.prepared)
    require_masks(config, prepared)
    denoiser = load_denoiser(config, model, weights, average, prepared, comm.device)
    return make_scorer(config, model, comm, denoiser, prepared)
