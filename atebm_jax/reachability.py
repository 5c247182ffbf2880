"""Whether seeds can come near the training images, known before the first step.

Each step of the contrastive loop and of sampling has one length: T steps cover at most
T lengths. Seeds that lie farther from the training images teach the network nothing. It
tells them apart at once, T rises to its maximum, and the contrastive images stay what
they were. With longer steps noise does train, at some cost in quality (paper,
appendix).

The L2 distance to a training image does not show this: another photograph is almost as
far from it as noise is. What counts is the least distance to images of that kind
(`metrics.spectral_distance`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from atebm_jax import data, metrics, recipes, seeds

# Images compared of each set: fewer large ones, so that it takes seconds and 64 MB.
_MOST_IMAGES, _MOST_NUMBERS = 1000, 2**24
# Steps are too short if they cover less than this share of the least distance: at 0.4
# noise taught digits nothing (docs/curriculum.md). Contrastive images need not become
# training images.
_ENOUGH = 0.5


class Reachability(NamedTuple):
    """How far seeds lie and how far steps go, L2 pixels of [0, 1] images."""

    distance: float  #: mean, between a seed and a training image
    #: lower bound of the distance between seeds and images with the spectrum of the
    #: training images
    least_distance: float
    farthest_contrastive: float  #: length of T_max contrastive steps in a straight line
    #: length of the sampling steps of evaluation in a straight line; None if the
    #: sampler's steps have no given length
    farthest_sampling: float | None
    #: which steps are too short, and what would help; None if none are
    sentence: str | None


def measure(
    seeds: np.ndarray,
    images: np.ndarray,
    *,
    t_max: int,
    contrastive_step_size: float,
    num_sampling_steps: int,
    sampling_step_size: float | None,
    stage: str,
) -> Reachability:
    """Compares seeds with training images, and the distance with what steps can cover.

    Args:
      seeds, images: [N, H, W, C] and [M, H, W, C], float in [0, 1].
      t_max, num_sampling_steps: most contrastive steps, and those of evaluation.
      contrastive_step_size, sampling_step_size: L2 pixels; the latter is None where
        steps have no given length.
      stage: whose contrastive steps these are, to name its fields.
    """
    distance = _mean_distance(seeds, images)
    least = metrics.spectral_distance(seeds, images)
    fields = (f"{stage}.t_max", f"{stage}.contrastive_step_size")
    ways = [_Way("contrastive images", t_max, contrastive_step_size, *fields)]
    if sampling_step_size is not None:
        fields = ("evaluate.samples.num_steps", "evaluate.samples.step_size")
        ways.append(_Way("samples", num_sampling_steps, sampling_step_size, *fields))
    sampling = ways[1].farthest if len(ways) > 1 else None
    sentence = _sentence(distance, least, ways)
    return Reachability(distance, least, ways[0].farthest, sampling, sentence)


def of_config(
    config: ml_collections.ConfigDict,
    sources: Mapping[str, data.Source],
    stage: str,
    gaussian: seeds.Gaussian | None = None,
) -> Reachability:
    """`measure` on what a config trains on.

    Args:
      config: a complete config.
      sources: "train", and "seeds" where `config.data.seeds` names a source.
      stage: one whose method has a curriculum.
      gaussian: what seeds are drawn from; by default it is fitted, where the config
        needs one, to the images that are compared.

    Raises:
      UserError: too many images cannot be decoded.
    """
    settings, shape = config.data, tuple(config.data.image_shape)
    num = min(max(_MOST_NUMBERS // math.prod(shape), 2), _MOST_IMAGES)

    def read(role: str, preprocess: str) -> np.ndarray:
        """At most `num` images of a source, uint8 [N, H, W, C]."""
        bad = settings.max_bad_images
        return data.materialise(sources[role], preprocess, shape, num, bad)[0]

    images = read("train", settings.preprocess)
    if "seeds" in sources:
        drawn = _pixels(read("seeds", settings.preprocess_seeds))
    else:
        if settings.seeds in seeds.FITTED and gaussian is None:
            seeds.check(settings.seeds, config.model.num_classes, shape)
            # One for all classes: distances need not be exact here.
            gaussian = seeds.fit(images)
        draw = seeds.seeds_fn(settings.seeds, config.seed, settings, gaussian=gaussian)
        numbers = np.arange(num, dtype=np.int32)
        drawn = draw(numbers, numbers % config.model.num_classes)
    samples = config.evaluate.samples
    length = recipes.step_length(samples.sampler, samples.step_size)
    return measure(
        drawn,
        _pixels(images),
        t_max=config[stage].t_max,
        contrastive_step_size=config[stage].contrastive_step_size,
        num_sampling_steps=samples.num_steps,
        sampling_step_size=length if math.isfinite(length) else None,
        stage=stage,
    )


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def lines(found: Reachability) -> list[str]:
    """A line with the figures, and one with the warning if there is one."""
    farthest = found.farthest_sampling
    samples = "as their gradients take them" if farthest is None else f"{farthest:.3g}"
    figures = (
        f"reachability (L2): a seed lies {found.distance:.3g} from a training image on "
        f"average, at least {found.least_distance:.3g} from any images of that kind; "
        f"contrastive images go {found.farthest_contrastive:.3g} at most, samples "
        f"{samples}."
    )
    return [figures, *([f"warning: {found.sentence}"] if found.sentence else [])]


def _mean_distance(seeds: np.ndarray, images: np.ndarray) -> float:
    num = min(len(seeds), len(images))
    # Shifted, so that no seed that is a training image is compared with itself.
    others = np.roll(images[:num], num // 2, axis=0)
    pairs = zip(seeds[:num], others, strict=True)
    return float(np.mean([np.linalg.norm(seed - image) for seed, image in pairs]))


class _Way(NamedTuple):
    """Steps of one length, and the fields of the config that set them."""

    name: str
    num_steps: int
    step_size: float
    num_steps_field: str
    step_size_field: str

    @property
    def farthest(self) -> float:
        """Length of the steps in a straight line."""
        return self.num_steps * self.step_size

    def longer(self, distance: float) -> str:
        """Settings with which a straight line would cover a distance."""
        found = []
        if self.num_steps > 0:
            size = distance / self.num_steps
            # Rounded up to two digits.
            unit = 10.0 ** (math.floor(math.log10(size)) - 1)
            size = math.ceil(round(size / unit, 6)) * unit
            found.append(f"--config.{self.step_size_field}={size:g}")
        # A config's whole numbers have 32 bits.
        if distance < self.step_size * 2**30:
            steps = math.ceil(distance / self.step_size)
            found.append(f"--config.{self.num_steps_field}={steps}")
        return " or ".join(found)


def _sentence(distance: float, least: float, ways: Sequence[_Way]) -> str | None:
    """Which steps are too short, and which settings would be enough.

    The warning compares two bounds: the least distance, and a straight line. As the
    steps of a loop turn, the remedy covers the mean distance between a seed and an
    image; somewhat less may be enough.
    """
    short = [way for way in ways if way.farthest < _ENOUGH * least]
    if not short:
        return None
    found = " and ".join(
        f"{way.name} go no farther than {way.farthest:.3g} ({way.num_steps} steps of "
        f"{way.step_size:g})"
        for way in short
    )
    enough = max(distance, least)
    remedies = "; ".join(f"for {way.name} {way.longer(enough)}" for way in short)
    return (
        "seeds cannot come near the training images: they lie at least "
        f"{least:.3g} (L2) from any images of that kind, and {found}. What would do: "
        f"{remedies}, at a cost in quality or time; or seeds that are nearer "
        "(config.data.seeds), photographs say. See docs/curriculum.md."
    )
