"""One example: read, decoded, augmented. Tells broken images from broken settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from atebm_jax.data.augment import Augmentation
from atebm_jax.data.decoding import BadImage, decode
from atebm_jax.data.sources import Source
from atebm_jax.errors import UserError

ImageShape = tuple[int, int, int]

# Value of the field `bad_field(NAME)` of an example whose image could be decoded.
NOT_BAD = -1


@dataclasses.dataclass(frozen=True)
class Images:
    """The augmented images of a source, each of the shape (H, W, C)."""

    source: Source
    augment: Augmentation
    shape: ImageShape

    def make(
        self, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int] | None:
        """Image and label; None if the file is gone or cannot be decoded."""
        try:
            example = self.source[index]
            decoded = decode(example["image"], self.shape[2])
        except UserError:
            raise
        except (ValueError, OSError):
            return None
        except Exception as error:
            raise self._told_plainly(index, error) from error
        try:
            image = self.augment(decoded, rng)
        except BadImage:
            return None
        except Exception as error:
            raise self._told_plainly(index, error) from error
        self._check_shape(index, image)
        return image, example["label"]

    def first_good(
        self,
        index: int,
        make_rng: Callable[[int], np.random.Generator],
        max_bad_images: int,
    ) -> tuple[tuple[np.ndarray, int], int]:
        """The first image from `index` on, round and round, that can be decoded.

        Returns:
          ((image, label), the first bad index or NOT_BAD). The other bad ones are met
          in their own turn.
        """
        bad: list[int] = []
        while (made := self.make(index, make_rng(index))) is None:
            bad.append(index)
            if len(bad) > max_bad_images or len(bad) == len(self.source):
                names = [self.source.describe(i) for i in bad]
                raise too_many_bad(names, max_bad_images)
            index = (index + 1) % len(self.source)
        return made, bad[0] if bad else NOT_BAD

    def _check_shape(self, index: int, image: np.ndarray) -> None:
        if image.shape != tuple(self.shape):
            height, width = self.shape[:2]
            remedy = "resizing and cropping"
            if height == width:
                remedy = f'"resize({height})|center_crop({height})"'
            raise UserError(
                f"the image {self.source.describe(index)} has the shape "
                f"{list(image.shape)} after preprocessing, wanted {list(self.shape)} "
                "([height, width, channels]): add an augmentation such as "
                f"{remedy}, or change image_shape"
            )

    def _told_plainly(self, index: int, error: Exception) -> UserError:
        # An error of a single string can be pickled, and so leaves a worker process.
        what = str(error) if isinstance(error, UserError) else repr(error)
        name = self.source.describe(index)
        return UserError(f"cannot prepare the image {name}: {what}")


def train_example(
    index: int,
    rng: np.random.Generator,
    *,
    name: str,
    images: Images,
    labels: bool,
    max_bad_images: int,
) -> dict[str, Any]:
    """One example of a stream: an image, or the next one that can be decoded."""
    made, first_bad = images.first_good(index, lambda place: rng, max_bad_images)
    example = {f"x_{name}": made[0], bad_field(name): np.int64(first_bad)}
    return {**example, f"y_{name}": np.int32(made[1])} if labels else example


def eval_example(position: int, *, images: Images, num_images: int) -> dict[str, Any]:
    """One of `num_images` examples: blank beyond the end, or if undecodable."""
    index = position * len(images.source) // num_images
    # A random operation does the same to an image in every evaluation.
    in_range, rng = position < num_images, np.random.default_rng(index)
    made = images.make(index, rng) if in_range else None
    bad = index if in_range and made is None else NOT_BAD
    image, label = (np.zeros(images.shape, np.uint8), 0) if made is None else made
    return {
        "images": image,
        "labels": np.int32(label),
        "mask": np.bool_(made is not None),
        bad_field("images"): np.int64(bad),
    }


def too_many_bad(names: list[str], max_bad_images: int) -> UserError:
    """The error that ends a job on the `max_bad_images + 1`-th broken image."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return UserError(
        f"{len(names)} images cannot be decoded, {max_bad_images} are tolerated: "
        f"{', '.join(names[:5])}{more}; repair or remove them, or raise max_bad_images"
    )


def bad_field(name: str) -> str:
    """The field of stream NAME that holds the index of a broken image, or NOT_BAD."""
    return f"bad_{name}"
