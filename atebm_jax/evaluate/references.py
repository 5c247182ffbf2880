"""Statistics of real images that generated ones are compared with, computed once."""

import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from atebm_jax import storage
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import Context, check_finite
from atebm_jax.evaluate.extractors import Extractor
from atebm_jax.evaluate.store import Arrays, Store
from atebm_jax.metrics import Moments

# Batches between two savings.
_SAVE_EVERY = 50
# Real images that statistics need.
_FEWEST = 20


class Reference(NamedTuple):
    """What real images look like to an extractor."""

    mean: np.ndarray  #: [D] float64
    covariance: np.ndarray  #: [D, D] float64
    #: [M, D] of images spread over the data set; None if only statistics were given
    features: np.ndarray | None
    description: dict[str, Any]  #: for the report


def load(context: Context, extractor: Extractor) -> Reference:
    """Statistics from a file, from the cache, or computed from `data.train`.

    Raises:
      UserError: the file cannot be used, or the data set is too small.
    """
    if given := context.options.reference_statistics:
        return read(given, extractor.sizes(context.image_shape)[0])
    described, cache = _cache_of(context, extractor)
    stored = cache.load("statistics")
    if stored is None:
        stored = _compute(context, extractor, described["num_images"], cache)
        cache.save("statistics", stored)
    described["num_decoded"] = int(stored["number"])
    return Reference(stored["mu"], stored["sigma"], stored["features"], described)


def check(context: Context, extractor: Extractor) -> None:
    """Refuses with a `UserError` statistics that cannot be had or kept."""
    options, train = context.options, context.sources["train"]
    if options.reference_statistics:
        load(context, extractor)
        return
    if 0 < options.num_reference < _FEWEST:
        raise UserError(
            f"--num_reference is {options.num_reference}: statistics of real images "
            f"need {_FEWEST} or more; 0 takes all {len(train)} of config.data.train."
        )
    if len(train) < _FEWEST:
        raise UserError(
            f"config.data.train={train.spec} has {len(train)} images: statistics of "
            f"real images need {_FEWEST} or more, or give --reference_statistics."
        )
    cache = _cache_of(context, extractor)[1]
    if cache.load("statistics") is None:
        cache.check_writable()


def read(path: str, num_features: int) -> Reference:
    """Mean and covariance from an `.npz` of the usual tools (`mu`, `sigma`).

    Raises:
      UserError: it is not there, damaged, or of other features.
    """
    try:
        stored = storage.read_npz(storage.reached(path), ("mu", "sigma"))
        mean, covariance = (np.asarray(stored[k], float) for k in ("mu", "sigma"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--reference_statistics={path} cannot be read ({error}): expected an .npz "
            "with the arrays mu [D] and sigma [D, D]."
        ) from error
    problem = ""
    if mean.shape != (num_features,) or covariance.shape != (num_features,) * 2:
        problem = (
            f" has shapes {mean.shape} and {covariance.shape} and the features have "
            f"{num_features} dimensions: give statistics of the same network."
        )
    elif not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        problem = " holds NaN or Inf: make it anew."
    elif not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
        problem = ": sigma is not symmetric, so that it is no covariance; make it anew."
    if problem:
        raise UserError(f"--reference_statistics={path}{problem}")
    sha256 = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
    described = {"file": str(path), "sha256": sha256}
    return Reference(mean, covariance, None, described)


def _cache_of(context: Context, extractor: Extractor) -> tuple[dict[str, Any], Store]:
    """Which images statistics are of, and where they are kept.

    Every evaluation of this user shares them: other models, the same data.
    """
    options, source = context.options, context.sources["train"]
    described = {
        "source": source.spec,
        "num_images": min(options.num_reference or len(source), len(source)),
        "images_sha256": context.fingerprints["train"],
        "preprocess": context.preprocess("train"),
        "image_shape": list(context.image_shape),
    }
    settings = described | {
        "extractor": extractor.name,
        "weights": extractor.fingerprint,
        "kept": options.num_pairs,
    }
    folder = storage.reached(options.cache_dir or _users_cache())
    return described, Store(folder, settings, "--cache_dir")


def _users_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(epath.Path("~/.cache").expanduser())
    if home.startswith("~"):
        raise UserError(
            "this user has no home to keep the statistics of real images in: give "
            "--cache_dir, a folder for them."
        )
    return f"{home}/atebm_jax/statistics"


def _compute(
    context: Context, extractor: Extractor, limit: int, cache: Store
) -> Arrays:
    """Mean, covariance and some features, one pass in constant memory, resumable."""
    if saved := cache.load("unfinished"):
        moments = Moments(int(saved["number"]), saved["mean"], saved["scatter"])
        kept, done = [saved["kept"]], int(saved["done"])
    else:
        moments = Moments.empty(extractor.sizes(context.image_shape)[0])
        kept, done = [], 0
    compiled = context.compiled(extractor.features)
    size = context.config.evaluate.batch_size
    for index, batch in enumerate(context.batches("train", limit, done), start=done):
        features = context.rows(compiled, batch, extractor.variables)["features"]
        context.show("statistics of real images", index + 1, -(-limit // size))
        check_finite("features of real images", features)
        moments = moments.merge(Moments.of(features))
        # Keep rows evenly spread over the set: those at which the rounded share grows.
        rows = index * size + np.arange(len(features) + 1)
        share = rows * min(context.options.num_pairs, limit) // limit
        kept.append(features[np.diff(share) > 0])
        if index % _SAVE_EVERY == _SAVE_EVERY - 1:
            progress = moments._asdict() | {"kept": np.concatenate(kept)}
            cache.save("unfinished", progress | {"done": np.asarray(index + 1)})
    if moments.number < _FEWEST:
        raise UserError(
            f"of {limit} images of config.data.train {moments.number} can be decoded: "
            f"statistics of real images need {_FEWEST} or more."
        )
    mean, covariance = moments.statistics()
    return {
        "mu": mean,
        "sigma": covariance,
        "features": np.concatenate(kept),
        "number": np.asarray(moments.number),
    }
