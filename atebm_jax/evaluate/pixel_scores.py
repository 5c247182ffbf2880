"""Two scores of samples, on pixels: they need no network.

The sample distance is the Frechet distance between real images and samples on the
principal components of the training pixels. It compares runs on one data set; it is
not FID. The agreement is the share of samples that a classifier fitted on real images
calls by the requested class.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from atebm_jax import metrics
from atebm_jax.errors import UserError

JUDGES: dict[str, Callable[[], Any]] = {"svc": lambda: SVC(gamma="scale")}


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      pca: fitted on real training images, pixels in [0, 1].
      mean, covariance: of the real images' components.
      judge: fitted classifier of flattened pixels, or None.
    """

    pca: PCA
    mean: np.ndarray
    covariance: np.ndarray
    judge: Any


def check_judge(judge: str) -> None:
    """Refuses a judge that is neither a key of `JUDGES` nor empty.

    Raises:
      UserError: unknown judge.
    """
    if judge and judge not in JUDGES:
        raise UserError(
            f"unknown config.evaluate.samples.judge {judge!r}: choose one of "
            f"{', '.join(JUDGES)}, or leave it empty."
        )


def make_reference(
    images: np.ndarray, labels: np.ndarray, config: ml_collections.ConfigDict
) -> Reference:
    """Fits components, statistics and judge on real training images.

    Args:
      images: [N, H, W, C] uint8.
      labels: [N] int.
      config: `config.evaluate.samples`.

    Raises:
      UserError: a judge is to learn from images of one class.
    """
    if config.judge and len(np.unique(labels)) < 2:
        raise UserError(
            f"config.evaluate.samples.num_reference is {config.num_reference}, which "
            f"takes {len(images)} training images of one class: the judge needs two; "
            "take more, or set config.evaluate.samples.judge to ''."
        )
    pixels = _flatten(images)
    components = min(config.pca_components, *pixels.shape)
    pca = PCA(components, svd_solver="full").fit(pixels)
    mean, covariance = metrics.feature_statistics(pca.transform(pixels))
    judge = JUDGES[config.judge]().fit(pixels, labels) if config.judge else None
    return Reference(pca, mean, covariance, judge)


def score(
    reference: Reference, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Distance and agreement of images with their requested labels.

    Args:
      reference: as of `make_reference`.
      images: [N, H, W, C] float32 in [0, 1] or uint8, N >= 2.
      labels: [N] int.

    Returns:
      {"sample_distance"} and, with a judge, {"sample_agreement"}; an infinite distance
      where an image is not finite.
    """
    pixels = _flatten(images)
    if not np.isfinite(pixels).all():
        pixels = np.nan_to_num(pixels)
        result = {"sample_distance": float("inf")}
    else:
        mean, covariance = metrics.feature_statistics(reference.pca.transform(pixels))
        result = {
            "sample_distance": metrics.frechet_distance(
                mean, covariance, reference.mean, reference.covariance
            )
        }
    if reference.judge is not None:
        agrees = reference.judge.predict(pixels) == labels
        result["sample_agreement"] = float(agrees.mean())
    return result


def _flatten(images: np.ndarray) -> np.ndarray:
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return images.reshape(len(images), -1).astype(np.float64) / scale
