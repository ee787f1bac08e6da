"""The workers' side of `eval` and `sample`: load the weights that are to be judged, score or draw, write it down."""

import json
import logging
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.data.store.snapshot import PreparedSet
from trainer.evaluate.drawing.places import SAMPLES
from trainer.evaluate.pictures import loss_curve_png
from trainer.evaluate.quality.drawn_quality import QualityWish, score_quality
from trainer.evaluate.scoring import Scorer
from trainer.evaluate.validating.paired import (
    LOSSES_FILE,
    losses_of,
    paired,
    paired_record,
    paired_table,
    read_losses,
    write_losses,
)
from trainer.evaluate.validating.validation_chart import validation_chart_png
from trainer.evaluate.validating.validation_result import as_record, table
from trainer.measure.telemetry import read_metrics
from trainer.model_files.run_model import RunModel
from trainer.parallel.comm import Comm
from trainer.train.build import load_denoiser, make_scorer
from trainer.train.placement import require_masks

_log = logging.getLogger(__name__)


def evaluate_weights(
    config: Config,
    model: RunModel,
    comm: Comm,
    weights: Path,
    out_dir: Path,
    average: str = LIVE,
    quality: QualityWish | None = None,
    against: Path | None = None,
) -> None:
    """Validation loss, loss curve and samples of the UNet in `weights`, written into `out_dir` in place of what an
    earlier call wrote there.

    Without held-out images there is no validation loss; the log says so.

    Args:
        average: name of the one that is judged; `live`: the weights that train.
        quality: scores of images that are drawn for it; None: none are.
        against: folder of an earlier evaluation, with which losses are compared image by image.
    """
    scorer = _scorer(config, model, comm, weights, average)
    if sum(scorer.prepared.rows_per_bucket("validation")):
        _validate(scorer, weights, out_dir, average, against)
    else:
        _log.info("no held-out images (data.validation_fraction = 0): no validation loss")
    _log.info("samples: %s", scorer.draw(out_dir / SAMPLES, _name(weights, average)))
    if quality:
        for line in score_quality(scorer, quality, out_dir, _name(weights, average), config.limits.plain()):
            _log.info("%s", line)
    metrics = read_metrics(config.run.dir)
    if comm.rank == 0 and metrics:
        loss_curve_png(metrics, out_dir / "loss.png", title=config.run.dir.name)
        _log.info("loss curve: %s", out_dir / "loss.png")


def _validate(scorer: Scorer, weights: Path, out_dir: Path, average: str, against: Path | None) -> None:
    """Validation loss as a table, `validation.json`, `losses.json` and `validation.png`."""
    result = scorer.validate_fully()
    _log.info("validation loss %.5f over %d images", result.held_out.loss, result.held_out.num_images)
    for line in table(result):
        _log.info("%s", line)
    record = {"weights": str(weights), "average": None if average == LIVE else average, **as_record(result)}
    own = losses_of([(image.key, image.losses) for image in result.held_out.images], result.timesteps)
    if against:
        found = paired(own, read_losses(against))
        for line in paired_table(found, str(against)):
            _log.info("%s", line)
        record["paired"] = paired_record(found, str(against))
    if scorer.comm.rank:
        return
    write_losses(out_dir / LOSSES_FILE, own)
    (out_dir / "validation.json").write_text(json.dumps(record, indent=1) + "\n")
    if result.held_out.images:
        validation_chart_png(result, out_dir / "validation.png", f"Validation loss of {_name(weights, average)}")
        _log.info("validation: %s", out_dir / "validation.png")


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
