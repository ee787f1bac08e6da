"""What a model says that it predicts: by marker tensors, its scheduler's configuration, or modelspec."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.guards import Refused, printable
from trainer.model_files.diffusers_folder import read_object
from trainer.model_files.model_source import ModelSource
from trainer.model_files.modelspec import told_prediction_type


@dataclass(frozen=True)
class ToldPrediction:
    """What a model says.

    Attributes:
        kind: epsilon, v_prediction, flow, edm or another word.
        zero_terminal_snr: whether its schedule ends in noise alone.
        by: how it is known.
    """

    kind: str
    zero_terminal_snr: bool
    by: str


def told_prediction(source: ModelSource) -> ToldPrediction:
    """Markers go before metadata, as in the programs that draw; a model that says nothing predicts epsilon.

    Raises:
        UserError: the scheduler's configuration cannot be read.
    """
    if source.kind == "folder":
        return _of_folder(source)
    if source.kind == "pickle":
        return ToldPrediction("epsilon", False, "a pickle says nothing else")
    names, zero = source.header.tensors, "ztsnr" in source.header.tensors
    if "edm_vpred.sigma_max" in names:
        return ToldPrediction("edm_v_prediction", zero, "its marker edm_vpred.sigma_max")
    if "edm_mean" in names:
        return ToldPrediction("edm", False, "its marker edm_mean")
    if "v_pred" in names:
        return ToldPrediction("v_prediction", zero, f"its marker{'s v_pred and ztsnr' if zero else ' v_pred'}")
    told = source.header.metadata.get("modelspec.prediction_type", "")
    kind = told_prediction_type(source.header.metadata)
    if told and kind is None and told != "eps":
        return ToldPrediction(printable(told, 40), zero, "its modelspec.prediction_type")
    # Loaders ignore the marker of zero terminal SNR where it stands alone.
    return ToldPrediction(kind or "epsilon", False, "its modelspec.prediction_type" if kind else "it says nothing else")


def _of_folder(source: ModelSource) -> ToldPrediction:
    file = source.path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return ToldPrediction("epsilon", False, "it says nothing else")
    try:
        config = read_object(file, source.limits)
        kind = printable(str(config.get("prediction_type", "epsilon")), 40)
        zero = config.get("rescale_betas_zero_snr") is True
        if str(config.get("_class_name", "")).startswith("EDM"):
            kind = {"epsilon": "edm", "v_prediction": "edm_v_prediction"}.get(kind, kind)
        return ToldPrediction(kind, zero and kind == "v_prediction", f"its {file.parent.name}/{file.name}")
    except Refused as refused:
        raise UserError(f"model.path: {refused.lines[0]}") from None
