"""What evaluations cost, counted before they run.

The unit is a pass of one image through the network, forward or backward: a gradient by
the image takes two of them, one by the parameters three. So much makes evaluations and
training steps comparable, and gives a time once training's speed is known.
"""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from atebm_jax import drawing
from atebm_jax.stages import STAGES

_FORWARD, _BY_IMAGE = 1, 2
# Records of training whose median is its speed; the first of all compiles.
_RECORDS = 5


def limited(limit: int, available: int) -> int:
    """Images that a limit of the config means; 0 is all."""
    return min(limit or available, available)


def num_batches(num: int, batch_size: int) -> int:
    """Batches of `num` images; the last one is filled up."""
    return -(-num // batch_size)


def passes_of_evaluation(
    config: ml_collections.ConfigDict, num_images: int, num_samples: int
) -> int:
    """Passes of one evaluation: accuracy, accuracy under attack, and samples.

    Args:
      config: a complete config.
      num_images: classified and attacked.
      num_samples: drawn. Batches and chunks are filled up: somewhat more is computed.
    """
    settings = config.evaluate
    size = settings.batch_size
    an_image = 2 * _FORWARD + _passes_of_attack(settings.attack)
    a_sample = settings.samples.num_steps * _BY_IMAGE
    accuracy = num_batches(num_images, size) * size * an_image
    return accuracy + drawing.num_chunks(num_samples) * drawing.CHUNK * a_sample


def passes_of_training(
    config: ml_collections.ConfigDict, stage: str, contrastive_steps: int = 0
) -> int:
    """Passes of a training step for one image of each of its streams, at T steps."""
    settings = config[stage]
    passes = STAGES[stage].passes(settings, contrastive_steps)
    return passes + _passes_of_attack(settings.adversary)


def _passes_of_attack(attack: ml_collections.ConfigDict) -> int:
    return attack.num_steps * _BY_IMAGE + bool(attack.keep_best) * _FORWARD


def of_final(
    config: ml_collections.ConfigDict,
    stages: Sequence[str],
    num_test: int,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """Says what the evaluation for the report costs.

    Args:
      config: a complete config.
      stages: whose weights are evaluated.
      num_test: images of the test set.
      records: lines of `metrics.jsonl`, for the speed; may be empty.
    """
    settings = config.evaluate
    images = limited(settings.num_test_examples, num_test)
    num = settings.samples.num_test
    passes = len(stages) * passes_of_evaluation(config, images, num)
    last = max(stages, key=list(STAGES).index)
    steps = passes / (config[last].batch_size * _at_t_max(config, last))
    return (
        f"the evaluation of {' and '.join(stages)} for the report: {images:,} images "
        f"under {settings.attack.num_steps} steps of attack and {num:,} samples of "
        f"{settings.samples.num_steps} steps each, {passes:,} passes of an image in "
        f"all, as many as {steps:,.0f} steps of {_named(config, last)}"
        f"{_time(config, passes, records)}"
    )


def of_periodic(
    config: ml_collections.ConfigDict, stage: str, total: int, num_eval: int
) -> str | None:
    """Says so where evaluations while training cost more than half of the training.

    Args:
      config: a complete config.
      stage: a key of `STAGES`.
      total: its steps.
      num_eval: images of the set that is evaluated meanwhile.
    """
    settings = config.evaluate
    number = num_batches(total, config[stage].eval_every_steps or total)
    images = limited(settings.num_examples, num_eval)
    passes = number * passes_of_evaluation(config, images, settings.samples.num)
    training = total * config[stage].batch_size * _at_t_max(config, stage)
    if passes <= training / 2:
        return None
    return (
        f"{number} evaluations on the way take {passes / training:.2g} times as many "
        f"passes of an image as {total:,} steps of {_named(config, stage)}: less with "
        f"a larger config.{stage}.eval_every_steps, or a smaller "
        "config.evaluate.num_examples or config.evaluate.samples.num."
    )


def _named(config: ml_collections.ConfigDict, stage: str) -> str:
    return f"{stage} at T_max" if _t_max(config, stage) else stage


def _at_t_max(config: ml_collections.ConfigDict, stage: str) -> int:
    return passes_of_training(config, stage, _t_max(config, stage))


def _t_max(config: ml_collections.ConfigDict, stage: str) -> int:
    return STAGES[stage].contrastive_steps(config[stage])


def _time(
    config: ml_collections.ConfigDict,
    passes: int,
    records: Sequence[Mapping[str, Any]],
) -> str:
    speed = passes_per_second(config, records)
    if speed is None:
        return "."
    time = datetime.timedelta(seconds=round(passes / speed))
    return f"; about {time} (estimated from training's speed)."


def passes_per_second(
    config: ml_collections.ConfigDict, records: Sequence[Mapping[str, Any]]
) -> float | None:
    """The speed of training of late; None where none is known.

    Args:
      config: a complete config.
      records: lines of `metrics.jsonl`.
    """
    speeds = [
        record["images_per_second"]
        * passes_of_training(config, record["stage"], int(record.get("T", 0)))
        for record in records
        if record.get("images_per_second", 0) > 0
    ]
    return statistics.median(speeds[-_RECORDS:]) if speeds else None
