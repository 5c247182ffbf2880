"""Seeds, where images begin: images of a data set, uniform noise, or fitted Gaussians.

Contrastive images and samples start from seeds. Steps that lead from one photograph to
another are too short to lead there from noise. Gaussians fitted to the training images
are near enough and need no other data set. Santurkar et al. (NeurIPS 2019, arXiv
1906.09453) draw the seeds of their samples in this way.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import jax
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import sharding, storage
from atebm_jax.errors import UserError

if TYPE_CHECKING:
    from atebm_jax import data

NOISE = "noise"
GAUSSIAN = "gaussian"
GAUSSIAN_PER_CLASS = "gaussian_per_class"

#: Values of config.data.seeds: those that are fitted to the training images, and all
#: that need no data set of their own.
FITTED = (GAUSSIAN, GAUSSIAN_PER_CLASS)
DRAWN = (NOISE, *FITTED)

#: The file of a workdir that holds the fitted Gaussians.
FILE = "seeds.npz"

#: (indices [B], classes [B]) -> seeds [B, H, W, C] float32 in [0, 1].
SeedsFn = Callable[[np.ndarray, np.ndarray], np.ndarray]

#: Training images that Gaussians are fitted to.
NUM_FITTED = 10_000

# Larger images are modelled at this resolution, and the draws are enlarged.
_LARGEST_SIDE = 32
# Directions of a covariance: of CIFAR-10's 3,072 the first 512 hold 99.0 % of the
# variance, in 6 MB instead of 38. Draws with fewer than 32 do not resemble images.
_MOST_DIRECTIONS, _FEWEST_DIRECTIONS = 512, 32
# Of the factors of all classes together: 16 MiB.
_MOST_NUMBERS = 4 * 2**20
# Images that tell a data set from another one.
_FINGERPRINT_IMAGES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Normal distributions of images: mean + sum_r z[r] * factor[r], z ~ N(0, 1)."""

    #: [G, h, w, C] float32, pixels in [0, 1]; G is 1, or the number of classes
    means: np.ndarray
    #: [G, R, h, w, C] float32, principal components times their standard deviations
    factors: np.ndarray
    #: (H, W, C) of what is drawn; (h, w) where that is not larger
    image_shape: tuple[int, int, int]

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"means": self.means, "factors": self.factors}

    def fingerprint(self) -> str:
        """SHA-256 of the arrays."""
        content = self.means.tobytes() + self.factors.tobytes()
        return hashlib.sha256(content).hexdigest()

    def draw(self, seed: int, number: int, label: int = 0) -> np.ndarray:
        """One seed image, uint8 [H, W, C], which does not depend on any other.

        Args:
          seed, number: of the whole set, and of the image in it; 0 to 2**64 - 1.
          label: its class; ignored where one Gaussian describes all.
        """
        group = label % len(self.means)
        bits = np.random.Philox(key=np.array([seed, number], np.uint64))
        factors = self.factors[group]
        z = np.random.Generator(bits).standard_normal(len(factors), np.float32)
        flat = z @ factors.reshape(len(factors), -1)
        pixels = self.means[group] + flat.reshape(factors.shape[1:])
        levels = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        return _resized(levels, self.image_shape, "bicubic")

    def batch(self, seed: int, numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Numbers [B] and labels [B] -> float32 [B, H, W, C] in [0, 1]."""
        pairs = zip(numbers.tolist(), labels.tolist(), strict=True)
        levels = np.stack([self.draw(seed, number, label) for number, label in pairs])
        return levels.astype(np.float32) / np.float32(255)


def fit(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    num_classes: int = 1,
    image_shape: tuple[int, int, int] | None = None,
) -> Gaussian:
    """Fits one Gaussian to all images, or one to each class.

    Args:
      images: uint8 [N, H, W, C].
      labels: [N] int in 0..K-1 for one Gaussian per class; None for a single one.
      num_classes: K.
      image_shape: (H, W, C) of what is drawn, where `images` are reduced already.

    Raises:
      UserError: a class has fewer than two images, or there are so many classes that
        their covariances would not fit in a file.
    """
    image_shape = image_shape or images.shape[1:]
    kind = GAUSSIAN if labels is None else GAUSSIAN_PER_CLASS
    small_shape, rank = check(kind, num_classes, image_shape)
    groups = 1 if labels is None else num_classes
    members = np.zeros(len(images), int) if labels is None else labels
    chosen = [members == k for k in range(groups)]
    _check_members([int(own.sum()) for own in chosen], labels is not None)
    small = np.stack([_resized(image, small_shape, "box") for image in images])
    fitted = [_principal(small[own], rank) for own in chosen]
    # With fewer images than directions, the remaining directions have no variance.
    rank = max(len(factors) for _, factors in fitted)
    factors = np.zeros((groups, rank, *small.shape[1:]), np.float32)
    for own, (_, found) in zip(factors, fitted):
        own[: len(found)] = found
    return Gaussian(np.stack([mean for mean, _ in fitted]), factors, image_shape)


def check(
    kind: str, num_classes: int, image_shape: Sequence[int]
) -> tuple[tuple[int, int], int]:
    """(h, w) at which images (H, W, C) are modelled, and the number of directions.

    Raises:
      UserError: Gaussians of this `FITTED` kind would be too large to store; says what
        to choose instead.
    """
    groups = num_classes if kind == GAUSSIAN_PER_CLASS else 1
    shrink = -(-max(image_shape[:2]) // _LARGEST_SIDE)
    height, width = (max(side // shrink, 1) for side in image_shape[:2])
    size = height * width * image_shape[2]
    rank = min(_MOST_DIRECTIONS, _MOST_NUMBERS // (groups * size), size)
    if rank < min(_FEWEST_DIRECTIONS, size):
        raise UserError(
            f"config.data.seeds is {GAUSSIAN_PER_CLASS!r}, and the covariances of "
            f"{groups} classes are too large to be kept: choose {GAUSSIAN!r}, one for "
            "all classes."
        )
    return (height, width), rank


def _check_members(numbers: Sequence[int], per_class: bool) -> None:
    """Refuses a Gaussian of fewer than two images."""
    if min(numbers) >= 2:
        return
    few = next(k for k, number in enumerate(numbers) if number < 2)
    number = f"{numbers[few]} image" + "s" * (numbers[few] != 1)
    if not per_class:
        raise UserError(
            f"config.data.seeds is {GAUSSIAN!r}, and it is fitted to {number}: it "
            f"needs two, or choose {NOISE!r}."
        )
    raise UserError(
        f"config.data.seeds is {GAUSSIAN_PER_CLASS!r}, and class {few} has {number} "
        f"among the {sum(numbers)} that are fitted: every class needs two, or choose "
        f"{GAUSSIAN!r}, one for all classes."
    )


def _principal(images: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [h, w, C] and scaled principal components [R, h, w, C] of uint8 images."""
    from sklearn.decomposition import PCA  # slow to import

    pixels = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
    rank = min(rank, len(images) - 1)
    found = PCA(rank, svd_solver="randomized", random_state=0).fit(pixels)
    scale = np.sqrt(np.maximum(found.explained_variance_, 0))
    factors = (found.components_ * scale[:, None]).astype(np.float32)
    shape = images.shape[1:]
    return found.mean_.astype(np.float32).reshape(shape), factors.reshape(-1, *shape)


def _resized(image: np.ndarray, shape: tuple[int, ...], method: str) -> np.ndarray:
    """As `decoding.scaled`, which is slow to import: with the whole room of data."""
    height, width = shape[:2]
    if image.shape[:2] == (height, width):
        return image
    from atebm_jax.data import decoding

    return decoding.scaled(image, height, width, method)


def fit_if_absent(
    kind: str,
    source: data.Source,
    config: ml_collections.ConfigDict,
    path: epath.Path,
    note: Callable[[str], None] = lambda text: None,
    *,
    anew: bool = False,
) -> Callable[[], Gaussian]:
    """Fits the Gaussians of a training set, unless a file holds them; writes nothing.

    Every process of a job calls this, and calls what it returns. The first one fits,
    writes and reads; the others need no common disk.

    Args:
      kind: one of `FITTED`.
      source: the training images; `NUM_FITTED` of them, evenly spread, are used.
      config: `config.data`.
      path: the file; it also holds a fingerprint of kind and images.
      note: takes a line for the user when a fit begins.
      anew: fit again where the file holds the Gaussians of other images.

    Returns:
      A function that writes the file, if it is new, and returns what it holds.

    Raises:
      UserError: as `fit`; the images cannot be read; or the file is damaged or, unless
        `anew`, holds the Gaussians of other images. From the function: the file cannot
        be written, or not be read.
    """
    wanted = _fingerprint(kind, source, config)
    new: Gaussian | None = None
    with sharding.refused_by_all():
        if jax.process_index() == 0 and not _holds(path, wanted, kind, source, anew):
            note(f"fitting the Gaussian of config.data.seeds={kind} to {source.spec}")
            new = _fitted(kind, source, config)

    def keep() -> Gaussian:
        arrays = None
        with sharding.refused_by_all():
            if new is not None:
                fingerprint = {"fingerprint": np.asarray(wanted)}
                with storage.writing(path):
                    storage.write_npz(path, new.arrays() | fingerprint)
            if jax.process_index() == 0:
                arrays = _read(path)
        arrays = sharding.from_first_process(arrays)
        assert arrays is not None
        return from_arrays(arrays, tuple(config.image_shape))

    return keep


def _holds(
    path: epath.Path, wanted: str, kind: str, source: data.Source, anew: bool
) -> bool:
    """Whether the file is there with the right Gaussians."""
    if not path.exists():
        return False
    same = str(_read(path)["fingerprint"]) == wanted
    if not same and not anew:
        raise UserError(
            f"{path} holds the seeds of another config.data.seeds than {kind!r} or of "
            f"other images than {source.spec} has now: give what it was made of, "
            "another folder, or delete the file to fit it anew."
        )
    return same


def _fitted(
    kind: str, source: data.Source, config: ml_collections.ConfigDict
) -> Gaussian:
    from atebm_jax import data  # its pipeline is slow to import

    num_classes, shape = source.num_classes or 1, tuple(config.image_shape)
    small_shape, _ = check(kind, num_classes, shape)
    images, labels = [], []
    # Batch by batch: 10,000 photographs take gigabytes, but reduced they do not.
    with data.eval_batches(
        source,
        preprocess=config.preprocess,
        batch_size=_FINGERPRINT_IMAGES,
        image_shape=shape,
        limit=NUM_FITTED,
        max_bad_images=config.max_bad_images,
    ) as batches:
        for batch in batches:
            good = batch["images"][batch["mask"]]
            images += [_resized(image, small_shape, "box") for image in good]
            labels += batch["labels"][batch["mask"]].tolist()
    per_class = np.asarray(labels) if kind == GAUSSIAN_PER_CLASS else None
    return fit(np.asarray(images), per_class, num_classes, shape)


def _fingerprint(
    kind: str, source: data.Source, config: ml_collections.ConfigDict
) -> str:
    """A digest of kind and images, made without fitting."""
    from atebm_jax import data  # its pipeline is slow to import

    images, labels = data.materialise(
        source,
        config.preprocess,
        tuple(config.image_shape),
        min(_FINGERPRINT_IMAGES, len(source)),
        config.max_bad_images,
    )
    digest = hashlib.sha256(images.tobytes() + labels.tobytes())
    settings = (kind, len(source), NUM_FITTED, _MOST_DIRECTIONS, _LARGEST_SIDE)
    digest.update(repr((settings, images.shape)).encode())
    if kind == GAUSSIAN_PER_CLASS:
        digest.update(repr(source.num_classes).encode())
    return digest.hexdigest()


def from_arrays(
    arrays: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]
) -> Gaussian:
    """Undoes `Gaussian.arrays`."""
    means, factors = (np.asarray(arrays[name]) for name in ("means", "factors"))
    return Gaussian(means, factors, image_shape)


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return storage.read_npz(path, ("means", "factors", "fingerprint"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete it, and the same command fits it "
            "anew."
        ) from error


# Seeds by the index of an image, from wherever they come.


def noise_seeds(
    key: jax.Array, indices: jax.Array, image_shape: tuple[int, int, int]
) -> jax.Array:
    """Uniform noise in [0, 1], each image by its own index: [B, H, W, C] float32.

    Args:
      key: a typed PRNG key.
      indices: [B] int32; image i is the same in every batch that contains index i.
      image_shape: (H, W, C).
    """
    return jax.vmap(
        lambda index: jax.random.uniform(jax.random.fold_in(key, index), image_shape)
    )(indices)


_noise = jax.jit(noise_seeds, static_argnums=2)


class ReadSeeds:
    """Seed i is image i of a data set, over and over: a `SeedsFn`.

    The next image that can be decoded stands in for one that cannot: never a black one.

    `stand_ins` are the indices, so far, whose seed stands in for another.
    """

    def __init__(self, source: data.Source, settings: ml_collections.ConfigDict):
        from atebm_jax import data  # its pipeline is slow to import

        self.stand_ins: set[int] = set()
        self._settings = settings
        self._images = data.Images(
            source, data.parse(settings.preprocess_seeds), tuple(settings.image_shape)
        )

    def __call__(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Seeds [B, H, W, C] float32 in [0, 1].

        Raises:
          UserError: too many images in a row cannot be decoded.
        """
        del labels
        with ThreadPoolExecutor(max(self._settings.num_threads, 1)) as pool:
            levels = np.stack(list(pool.map(self._read, indices.tolist())))
        return levels.astype(np.float32) / np.float32(255)

    def _read(self, index: int) -> np.ndarray:
        place = index % len(self._images.source)
        (image, _), bad = self._images.first_good(
            place, np.random.default_rng, self._settings.max_bad_images
        )
        if bad == place:
            self.stand_ins.add(index)
        return image


def stand_ins(seeds_of: SeedsFn) -> set[int]:
    """Indices of images that began at the seed of another one, so far."""
    return seeds_of.stand_ins if isinstance(seeds_of, ReadSeeds) else set()


def seeds_fn(
    spec: str,
    seed: int,
    settings: ml_collections.ConfigDict,
    *,
    gaussian: Gaussian | None = None,
    source: data.Source | None = None,
) -> SeedsFn:
    """Seeds as `config.data.seeds` has it.

    Args:
      spec: noise, a kind of Gaussians, or a data set.
      seed: of what is drawn; not of images that are read.
      settings: `config.data`.
      gaussian: what seeds are drawn from if `spec` is a kind of them.
      source: the images if `spec` is a data set, or those that take its place.
    """
    if source is not None:
        return ReadSeeds(source, settings)
    if spec == NOISE:
        key, shape = jax.random.key(seed), tuple(settings.image_shape)
        return lambda indices, labels: np.asarray(_noise(key, indices, shape))
    assert gaussian is not None
    return partial(gaussian.batch, seed)
