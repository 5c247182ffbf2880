"""Samples of a model and two scores of them that need no downloaded network.

The sample distance is the Frechet distance between real images and samples on the
principal components of the training pixels. It compares runs on one data set; it is
not FID. The agreement is the share of samples that a classifier fitted on real images
calls by the requested class.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from atebm_jax import ascent, energy, metrics, models, sampling, sharding
from atebm_jax.errors import UserError

SampleFn = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
# (numbers [B], labels [B]) -> seeds float32 [B, H, W, C] in [0, 1].
SeedsFn = Callable[[np.ndarray, np.ndarray], np.ndarray]

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


def make_sampler(
    model: nn.Module, config: ml_collections.ConfigDict, mesh: Mesh, seed: int
) -> SampleFn:
    """Compiles conditional sampling with the settings of `config.evaluate.samples`.

    Args:
      model: images to logits.
      config: `config.evaluate.samples`.
      mesh: where batches live.
      seed: of the noise of samplers that have some.

    Returns:
      (variables, seeds [B, H, W, C], labels [B], numbers [B] int32) -> images
      [B, H, W, C] in [0, 1], each by its own seed, label and number.
    """
    rule = ascent.rule(config.sampler)

    def sample(
        variables: Any, seeds: jax.Array, labels: jax.Array, numbers: jax.Array
    ) -> jax.Array:
        logits_fn = models.logits_fn(model, variables)
        return ascent.climb(
            lambda x: energy.score(logits_fn(x), labels),
            seeds,
            rule,
            keys=sampling.step_keys(jax.random.key(seed), numbers),
            step_size=config.step_size,
            num_steps=config.num_steps,
        )

    return jax.jit(sample, out_shardings=sharding.replicated(mesh))


def draw(
    sample: SampleFn,
    variables: Any,
    *,
    num: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    batch_size: int,
    seed: int,
    mesh: Mesh,
    seeds_of: SeedsFn | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws class-balanced samples in batches of one size.

    Args:
      sample: as of `make_sampler`.
      variables: the network, placed on every device.
      num: how many.
      num_classes: labels run 0..K-1 cyclically.
      image_shape: (H, W, C).
      batch_size: images at once; a multiple of the device count.
      seed: of the noise seeds; image i is the same for every `num`.
      mesh: where batches live.
      seeds_of: seeds by number and label, instead of noise.
      check_stop: called before every batch; raises where the job shall end.

    Returns:
      (images [num, H, W, C] float32 in [0, 1], labels [num] int32).
    """
    key = jax.random.key(seed)
    target = sharding.batched(mesh)
    images = []
    for start in range(0, num, batch_size):
        check_stop()
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        if seeds_of is None:
            noise = sampling.noise_seeds(key, jnp.asarray(indices), image_shape)
            start_images = np.asarray(noise)
        else:
            start_images = seeds_of(indices, indices % num_classes)
        seeds = jax.device_put(start_images, target)
        labels = jax.device_put(indices % num_classes, target)
        numbers = jax.device_put(indices, target)
        images.append(np.asarray(sample(variables, seeds, labels, numbers)))
    labels = np.asarray(sampling.cyclic_labels(num, num_classes))
    return np.concatenate(images)[:num], labels


def _flatten(images: np.ndarray) -> np.ndarray:
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return images.reshape(len(images), -1).astype(np.float64) / scale
