"""Scores of drawn images beside as many of the data with the same captions, by features alone; in float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.quality.set_distances import cmmd, frechet_distance, kid, normed
from trainer.evaluate.validating.intervals import Estimate, mean_of


@dataclass(frozen=True)
class ClipScores:
    """By CLIP's features of drawn images, of the data's and of the captions.

    Attributes:
        clip_score: how well images fit their captions; more is better.
        clip_score_of_data: the same of the images of the data, as a yardstick.
        cmmd, kid: how far drawn images as a whole are from those of the data; less is better.
    """

    clip_score: Estimate
    clip_score_of_data: Estimate
    cmmd: float
    kid: Estimate


@dataclass(frozen=True)
class DistanceScores:
    """How far drawn images as a whole are from those of the data, by the features of one model; less is better."""

    frechet: float
    kid: Estimate


def scores_by_clip(drawn: NDArray, data: NDArray, texts: NDArray) -> ClipScores:
    """All of them, by features [n, d], the rows of one number of one caption; n at least 2."""
    scores, of_data = clip_scores(drawn, texts).tolist(), clip_scores(data, texts).tolist()
    even = [1.0] * len(scores)
    return ClipScores(mean_of(scores, even), mean_of(of_data, even), cmmd(drawn, data), kid(drawn, data))


def scores_by_features(drawn: NDArray, data: NDArray) -> DistanceScores:
    """Both, by features [n, d], the rows of one number of one caption; n at least 2."""
    return DistanceScores(frechet_distance(drawn, data), kid(drawn, data))


def clip_scores(images: NDArray, texts: NDArray) -> NDArray[np.float64]:
    """Of each image and its text, 100 max(cos, 0), [n].

    Hessel et al. 2021 (arXiv 2104.08718, section 3) with the factor 100 in place of 2.5, as torchmetrics has it.
    """
    return 100 * np.maximum((normed(images) * normed(texts)).sum(axis=1), 0.0)
