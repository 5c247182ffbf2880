"""From sources to batches: shuffled and endless to train, in order to evaluate.

The order and the augmentation of training batches are functions of (seed, stream,
position) alone: a run resumes exactly by starting at its step, with any number of
workers or processes.
"""

import dataclasses
import functools
import logging
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from atebm_jax.data.augment import parse
from atebm_jax.data.examples import (
    NOT_BAD,
    Images,
    ImageShape,
    bad_field,
    eval_example,
    too_many_bad,
    train_example,
)
from atebm_jax.data.sources import Source
from atebm_jax.errors import UserError

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
# (position in the stream, label) -> uint8 [H, W, C].
DrawFn = Callable[[int, int], np.ndarray]
_MATERIALISE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Stream:
    """One way of drawing images from a source.

    Attributes:
      source: the images.
      augment: operations as `augment.parse` reads them, e.g. "pad_crop(4)|flip".
      seed: of order and augmentation, at least 0; streams of one seed but different
        names are drawn independently.
      labels: whether labels belong in the batch.
    """

    source: Source
    augment: str = ""
    seed: int = 0
    labels: bool = True


class Batches(Iterator[Batch]):
    """An iterator over batches that keeps count of undecodable images.

    Close it, or use it as a context manager, to stop its threads and processes.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        sources: dict[str, Source],
        max_bad_images: int,
    ):
        self._batches: Any = batches
        self._sources = sources
        self._max_bad_images = max_bad_images
        self._bad: dict[str, dict[int, str]] = {name: {} for name in sources}
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            batch = next(self._batches)
            for name in self._sources:
                self._note_bad(name, batch.pop(bad_field(name)))
        except (StopIteration, UserError):
            self.close()
            raise
        except Exception as error:
            self.close()
            raise UserError(_failure(error)) from error
        return batch

    @property
    def bad_images(self) -> dict[str, tuple[str, ...]]:
        """Names of the undecodable images met by this process, by stream."""
        return {name: tuple(bad.values()) for name, bad in self._bad.items()}

    def close(self) -> None:
        """Stops threads and processes; the iterator is exhausted from then on."""
        if not self._closed:
            self._closed = True
            self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _note_bad(self, name: str, indices: np.ndarray) -> None:
        bad = self._bad[name]
        for index in indices[indices != NOT_BAD].tolist():
            if index not in bad:
                bad[index] = self._sources[name].describe(index)
                _log.warning("skipped an undecodable image: %s", bad[index])
        if len(bad) > self._max_bad_images:
            raise too_many_bad(list(bad.values()), self._max_bad_images)


def _failure(error: Exception) -> str:
    if "terminated unexpectedly" in str(error):
        # Grain's words for a worker process that has died; they have its exit code.
        code = "".join(re.findall(r"exit code (-?\d+)", str(error))[:1])
        return (
            f"a worker process that makes batches has ended (exit code {code or '?'}), "
            "killed from outside, most often for lack of memory: give the same command "
            "again, which goes on from the last checkpoint; fewer "
            "config.data.num_workers need less memory."
        )
    return f"the data pipeline failed: {type(error).__name__}: {error}"


def train_batches(
    streams: dict[str, Stream],
    *,
    batch_size: int,
    image_shape: ImageShape,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 8,
    max_bad_images: int = 10,
    draw_seeds: DrawFn | None = None,
) -> Batches:
    """Endless batches, each epoch of each stream in a new order.

    An undecodable or vanished image is replaced by the next decodable one of its
    source, named in the log, and counted (by each process, from its start).

    Args:
      streams: by name; `gen` fills the fields `x_gen` and `y_gen`.
      batch_size: images of a step over all processes.
      image_shape: (H, W, C) after augmentation.
      start: the step to begin with; equals skipping that many batches.
      process_index: which of the `process_count` processes this is. Together they
        hold the same images at each step whatever their number.
      num_workers: worker processes; 0 for threads in this process. A source in
        memory is copied to each of them.
      num_threads: threads that make batches, in each worker. For small images use more
        workers rather than more threads: Python runs one thread at a time.
      prefetch: batches made ahead, in each worker; no more threads than that are busy.
      max_bad_images: distinct undecodable images of a stream that are passed over.
      draw_seeds: fills `x_ood` from the image's position in the whole run and from
        its label in the stream `gen`; None where seeds are a stream, or noise.

    Returns:
      An iterator over {"x_NAME": uint8 [b, H, W, C], "y_NAME": int32 [b]} with
      b = batch_size / process_count; `y_NAME` where the stream has labels.

    Raises:
      UserError: here, for settings that do not fit; from the iterator, for too many
        undecodable images or an image of another shape.
    """
    local_size = _local_size(batch_size, process_index, process_count, image_shape)
    _check_not_negative(
        start=start,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch=prefetch,
        max_bad_images=max_bad_images,
    )
    if not streams:
        raise UserError("there is no stream to draw training batches from")
    parts = [
        _endless(name, stream, image_shape, max_bad_images)
        for name, stream in streams.items()
    ]
    examples = grain.experimental.ZipMapDataset(parts).map(_merge)
    if draw_seeds is not None:
        examples = examples.map_with_index(functools.partial(_with_seed, draw_seeds))
    batches = examples[process_index::process_count].batch(local_size)[start:]
    sources = {name: stream.source for name, stream in streams.items()}
    iterator = _iterate(batches, num_threads, prefetch, num_workers)
    return Batches(iterator, sources, max_bad_images)


def eval_batches(
    source: Source,
    *,
    preprocess: str,
    batch_size: int,
    image_shape: ImageShape,
    limit: int | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 8,
    max_bad_images: int = 10,
) -> Batches:
    """All images once, in order; the last batch is filled up.

    Every process gets equally many batches. Process p holds the p-th of
    `process_count` equal, consecutive parts of each global batch. Undecodable images
    are masked out, named in the log, and counted.

    Args:
      source: the images.
      preprocess: operations without randomness, as `augment.parse` reads them.
      batch_size: images of a batch over all processes.
      image_shape: (H, W, C) after preprocessing.
      limit: number of images, evenly spread over the source (folders come class by
        class); None for all.
      start: number of the first batch; those before it are not decoded.
      process_index, process_count, num_threads, prefetch, max_bad_images: as for
        `train_batches`.

    Returns:
      An iterator over {"images": uint8 [b, H, W, C], "labels": int32 [b],
      "mask": bool [b]}. Where the mask is False, image and label are 0 and mean
      nothing. Unlabelled images have the label -1.

    Raises:
      UserError: as `train_batches`. `bad_images` of the iterator has the key "images".
    """
    local_size = _local_size(batch_size, process_index, process_count, image_shape)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 image, got {limit}")
    _check_not_negative(
        start=start,
        num_threads=num_threads,
        prefetch=prefetch,
        max_bad_images=max_bad_images,
    )
    _check_not_empty(source)
    num_images = len(source) if limit is None else min(limit, len(source))
    num_batches = -(-num_images // batch_size)
    images = Images(source, parse(preprocess), image_shape)
    example = functools.partial(eval_example, images=images, num_images=num_images)
    examples = grain.MapDataset.range(num_batches * batch_size).map(example)
    batches = examples.batch(local_size)[process_index::process_count][start:]
    iterator = _iterate(batches, num_threads, prefetch)
    return Batches(iterator, {"images": source}, max_bad_images)


def materialise(
    source: Source,
    preprocess: str,
    image_shape: ImageShape,
    limit: int | None = None,
    max_bad_images: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """`limit` images spread over a source (None for all), preprocessed, in memory.

    Returns:
      images uint8 [N, H, W, C] and labels int32 [N], without the undecodable ones.

    Raises:
      UserError: as `eval_batches`.
    """
    with eval_batches(
        source,
        preprocess=preprocess,
        batch_size=_MATERIALISE_BATCH,
        image_shape=image_shape,
        limit=limit,
        max_bad_images=max_bad_images,
    ) as batches:
        kept = [(b["images"][b["mask"]], b["labels"][b["mask"]]) for b in batches]
    images, labels = zip(*kept, strict=True)
    if not sum(map(len, images)):
        raise UserError(
            f"{source.spec}: none of {limit or 'all'} images can be decoded"
        )
    return np.concatenate(images), np.concatenate(labels)


def _endless(
    name: str, stream: Stream, image_shape: ImageShape, max_bad_images: int
) -> grain.MapDataset:
    """The examples of one stream, reshuffled each epoch, without end."""
    source = stream.source
    _check_not_empty(source)
    _check_not_negative(seed=stream.seed)
    if stream.labels and source.num_classes is None:
        raise UserError(
            f"stream {name!r} needs labels, but {source.spec} has none; give a "
            "labelled data set, such as one folder of images for each class"
        )
    # The name keeps streams of the same source and seed apart.
    seeds = np.random.SeedSequence([stream.seed, zlib.crc32(name.encode())])
    order_seed, augment_seed = seeds.generate_state(2).tolist()
    example = functools.partial(
        train_example,
        name=name,
        images=Images(source, parse(stream.augment), image_shape),
        labels=stream.labels,
        max_bad_images=max_bad_images,
    )
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed).repeat()
    return order.random_map(example, seed=augment_seed)


def _merge(examples: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {key: value for example in examples for key, value in example.items()}


def _with_seed(
    draw_seeds: DrawFn, position: int, example: dict[str, Any]
) -> dict[str, Any]:
    # Of the class to generate, where there is one.
    label = example["y_gen" if "y_gen" in example else "y_cls"]
    return {**example, "x_ood": draw_seeds(position, int(label))}


# --- Grain ----------------------------------------------------------------------------


def _iterate(
    batches: grain.MapDataset, num_threads: int, prefetch: int, num_workers: int = 0
) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        # Grain's workers read absl flags; a notebook does not parse any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_become_worker)
    return iter(dataset)


def _become_worker(worker_index: int, worker_count: int) -> None:
    """Ignores signals, which the main process handles, and ends with that process."""
    del worker_index, worker_count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_main_process()


def end_with_main_process() -> None:
    """Ends this worker process as soon as the one that started it has ended."""
    main_process = multiprocessing.parent_process()

    def wait() -> None:
        if main_process is not None:
            main_process.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- Checks ---------------------------------------------------------------------------


def _local_size(
    batch_size: int, process_index: int, process_count: int, image_shape: ImageShape
) -> int:
    """Images of a batch in this process, once the four settings are checked."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the number of "
            f"processes, {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index must lie in 0..{process_count - 1}, got {process_index}"
        )
    if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[2] not in (1, 3):
        raise UserError(
            f"image_shape must be (height, width, channels) with 1 or 3 channels, got "
            f"{tuple(image_shape)}"
        )
    return batch_size // process_count


def _check_not_negative(**settings: int) -> None:
    for name, value in settings.items():
        if value < 0:
            raise UserError(f"{name} must be at least 0, got {value}")


def _check_not_empty(source: Source) -> None:
    if len(source) == 0:
        raise UserError(f"{source.spec}: there are no images in this part")
