"""One example: read, decoded, augmented; broken images told from broken settings."""

from typing import Any

import numpy as np

from atebm_jax.data.augment import Augmentation
from atebm_jax.data.decoding import BadImage, decode
from atebm_jax.data.sources import Source
from atebm_jax.errors import UserError

ImageShape = tuple[int, int, int]

# In the field `bad_field(NAME)` of an example: every image of it could be decoded.
NOT_BAD = -1


def train_example(
    index: int,
    rng: np.random.Generator,
    *,
    name: str,
    source: Source,
    augment: Augmentation,
    image_shape: ImageShape,
    labels: bool,
    max_bad_images: int,
) -> dict[str, Any]:
    """One example of a stream, or of the next image that can be decoded."""
    bad: list[int] = []
    while (made := _made(source, index, augment, rng, image_shape)) is None:
        bad.append(index)
        if len(bad) > max_bad_images or len(bad) == len(source):
            raise too_many_bad([source.describe(i) for i in bad], max_bad_images)
        index = (index + 1) % len(source)
    image, label = made
    # The first one stands for all: the order brings the others up in their turn.
    first_bad = bad[0] if bad else NOT_BAD
    example = {f"x_{name}": image, bad_field(name): np.int64(first_bad)}
    return {**example, f"y_{name}": np.int32(label)} if labels else example


def eval_example(
    local_index: int,
    *,
    source: Source,
    preprocess: Augmentation,
    image_shape: ImageShape,
    num_images: int,
    local_size: int,
    process_index: int,
    process_count: int,
) -> dict[str, Any]:
    """One example of this process's part; blank beyond the end and if undecodable."""
    batch, row = divmod(local_index, local_size)
    position = (batch * process_count + process_index) * local_size + row
    in_range = position < num_images
    index = position * len(source) // num_images
    made = read(source, index, preprocess, image_shape) if in_range else None
    bad = index if in_range and made is None else NOT_BAD
    image, label = (np.zeros(image_shape, np.uint8), 0) if made is None else made
    return {
        "images": image,
        "labels": np.int32(label),
        "mask": np.bool_(made is not None),
        bad_field("images"): np.int64(bad),
    }


def read(
    source: Source, index: int, operations: Augmentation, image_shape: ImageShape
) -> tuple[np.ndarray, int] | None:
    """Image [H, W, C] uint8 and label as an evaluation sees them.

    Returns:
      None if the image cannot be decoded.

    Raises:
      UserError: nothing of this shape can be made of it.
    """
    # Evaluation is a function of the image: nothing random may be asked for.
    rng = np.random.default_rng(index)
    return _made(source, index, operations, rng, image_shape)


def read_or_next(
    source: Source,
    index: int,
    *,
    operations: Augmentation,
    image_shape: ImageShape,
    max_bad_images: int,
) -> tuple[np.ndarray, bool]:
    """An image [H, W, C] uint8, or the next one that can be decoded, round and round.

    Returns:
      The image, and whether it is the one that was asked for.

    Raises:
      UserError: as `read`, or more than `max_bad_images` in a row cannot be decoded.
    """
    bad: list[int] = []
    while (made := read(source, index, operations, image_shape)) is None:
        bad.append(index)
        if len(bad) > max_bad_images or len(bad) == len(source):
            raise too_many_bad([source.describe(i) for i in bad], max_bad_images)
        index = (index + 1) % len(source)
    return made[0], not bad


def _decode(source: Source, index: int, channels: int) -> tuple[np.ndarray, int] | None:
    """Image and label, or None if the file is gone or cannot be decoded."""
    try:
        example = source[index]
        return decode(example["image"], channels), example["label"]
    except UserError:
        raise
    except (ValueError, OSError):
        return None
    except Exception as error:
        raise _told_plainly(source, index, error) from error


def _made(
    source: Source,
    index: int,
    augment: Augmentation,
    rng: np.random.Generator,
    image_shape: ImageShape,
) -> tuple[np.ndarray, int] | None:
    """Augmented image and label, or None if nothing can be made of its file."""
    decoded = _decode(source, index, image_shape[2])
    if decoded is None:
        return None
    try:
        image = augment(decoded[0], rng)
    except BadImage:
        return None
    except Exception as error:
        raise _told_plainly(source, index, error) from error
    _check_shape(source, index, image, image_shape)
    return image, decoded[1]


def _check_shape(
    source: Source, index: int, image: np.ndarray, image_shape: ImageShape
) -> None:
    if image.shape != tuple(image_shape):
        height, width = image_shape[:2]
        remedy = (
            f'"resize({height})|center_crop({height})"'
            if height == width
            else "resizing and cropping"
        )
        raise UserError(
            f"the image {source.describe(index)} has the shape {list(image.shape)} "
            f"after preprocessing, wanted {list(image_shape)} ([height, width, "
            f"channels]): add an augmentation such as {remedy}, or change "
            "image_shape"
        )


def _told_plainly(source: Source, index: int, error: Exception) -> UserError:
    # A worker's exception reaches the main process only if it can be pickled, which
    # holds for one made of a single string.
    what = str(error) if isinstance(error, UserError) else repr(error)
    return UserError(f"cannot prepare the image {source.describe(index)}: {what}")


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
