"""Scores of drawn images as JSON, and as lines for people."""

from pathlib import Path
from typing import Any

from trainer.evaluate.quality.feature_model import FeatureModel
from trainer.evaluate.quality.quality_scores import ClipScores, DistanceScores
from trainer.evaluate.validating.intervals import Estimate


def clip_record(scores: ClipScores, folder: Path) -> dict[str, Any]:
    """What `quality.json` has of CLIP's scores."""
    return {
        "clip_model": str(folder),
        "clip_score": _plain(scores.clip_score),
        "clip_score_of_data": _plain(scores.clip_score_of_data),
        "cmmd": scores.cmmd,
        "kid_of_clip_features": _plain(scores.kid),
    }


def clip_lines(scores: ClipScores) -> list[str]:
    """The same in words."""
    score, of_data = _told(scores.clip_score, 2), _told(scores.clip_score_of_data, 2)
    return [
        f"  CLIP score {score}; of the data's own images {of_data}",
        f"  CMMD {scores.cmmd:.3f}, KID of CLIP features {_told(scores.kid, 5)}; 0: drawn as the data",
    ]


def distance_record(scores: DistanceScores, model: FeatureModel) -> dict[str, Any]:
    """What `quality.json` has of Fréchet's distance and KID; `fid` only of FID's own weights."""
    names = {"FID": ("fid", "kid"), "FD-DINOv2": ("fd_dinov2", "kid_of_dinov2_features")}
    frechet, kid = names.get(model.score, ("fid_of_other_inception", "kid_of_other_inception"))
    known = {"feature_model": str(model.path), "features": model.features}
    return {**known, frechet: scores.frechet, kid: _plain(scores.kid)}


def distance_lines(scores: DistanceScores, model: FeatureModel, count: int) -> list[str]:
    """The same in words, and what is to be known of them."""
    kid = {"FID": "KID", "FD-DINOv2": "KID of DINOv2 features"}.get(model.score, "KID of these weights")
    lines = [f"  {model.score} {scores.frechet:.3f} of {count:,} and {count:,} images; {kid} {_told(scores.kid, 5)}"]
    if count <= model.features:
        lines.append(
            f"  {model.score} of {count:,} images, no more than its {model.features:,} features, is far too great: "
            "compare it with that of as many images alone; KID has no such bias"
        )
    if model.kind == "inception" and not model.published:
        lines.append(
            f"  {model.path} is not the file that FID is defined by (its SHA-256 would begin with 6726825d): compare "
            "with published values by no means"
        )
    return lines


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": estimate.mean, "plus_minus": estimate.half_width}


def _told(estimate: Estimate, digits: int) -> str:
    width = estimate.half_width
    return f"{estimate.mean:.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")
