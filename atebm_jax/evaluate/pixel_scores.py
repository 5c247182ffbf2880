"""Two scores of samples on pixels, without a network.

The sample distance is the Frechet distance between real images and samples on the
principal components of the training pixels. It compares runs on one data set; it is
not FID. The agreement is the share of samples that a classifier fitted to real images
assigns to the requested class.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from atebm_jax import metrics
from atebm_jax.errors import UserError, check_choice

JUDGES: dict[str, Callable[[], Any]] = {"svc": lambda: SVC(gamma="scale")}


class Reference(NamedTuple):
    """What samples are compared with."""

    pca: PCA  #: fitted to real training images, pixels in [0, 1]
    mean: np.ndarray  #: of the real images' components
    covariance: np.ndarray  #: of the same
    judge: Any  #: fitted classifier of flattened pixels, or None


def check_judge(judge: str) -> None:
    """Refuses with a `UserError` a judge that is neither one of `JUDGES` nor empty."""
    if judge:
        field, of = "config.evaluate.samples.judge", " (leave it empty for none)"
        check_choice(field, judge, JUDGES, of)


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
    """Distance of images to the reference, and agreement with their requested labels.

    Args:
      reference: as of `make_reference`.
      images: [N, H, W, C] float32 in [0, 1] or uint8, N >= 2.
      labels: [N] int.

    Returns:
      {"sample_distance"} and, with a judge, {"sample_agreement"}; the distance is
      infinite if an image is not finite.
    """
    pixels, distance = _flatten(images), float("inf")
    if np.isfinite(pixels).all():
        of_samples = metrics.feature_statistics(reference.pca.transform(pixels))
        real = reference.mean, reference.covariance
        distance = metrics.frechet_distance(*of_samples, *real)
    result = {"sample_distance": distance}
    if reference.judge is not None:
        agrees = reference.judge.predict(np.nan_to_num(pixels)) == labels
        result["sample_agreement"] = float(agrees.mean())
    return result


def _flatten(images: np.ndarray) -> np.ndarray:
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return images.reshape(len(images), -1).astype(np.float64) / scale
