"""What evaluations cost, counted before they run.

The unit is a pass of one image through the network, forward or backward: a gradient by
the image takes two of them, one by the parameters three. In this unit evaluations and
training steps compare, and the speed of training gives a time.
"""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from atebm_jax import drawing
from atebm_jax.stages import CONTRASTIVE, STAGES

_FORWARD, _BY_IMAGE = 1, 2
# Records of training whose median is its speed; the first of all compiles.
_RECORDS = 5


def passes_of_evaluation(
    config: ml_collections.ConfigDict, num_images: int, num_samples: int
) -> int:
    """Passes of one evaluation: images classified and attacked, and samples drawn.

    Batches and chunks are filled up, and that is counted.
    """
    settings = config.evaluate
    size = settings.batch_size
    an_image = 2 * _FORWARD + _passes_of_attack(settings.attack)
    a_sample = settings.samples.num_steps * _BY_IMAGE
    accuracy = -(-num_images // size) * size * an_image
    return accuracy + drawing.num_chunks(num_samples) * drawing.CHUNK * a_sample


def passes_of_training(
    config: ml_collections.ConfigDict, stage: str, contrastive_steps: int = 0
) -> int:
    """Passes of a training step for one image of each of its streams, at T steps."""
    method, settings = STAGES[stage], config[stage]
    passes = method.loss_passes(settings)
    for name, part in method.parts(settings).items():
        counted = method.curriculum and name == CONTRASTIVE
        turns = contrastive_steps if counted else part.turns
        passes += turns * (_BY_IMAGE if part.scope else _FORWARD)
        passes += part.keep_best * _FORWARD
    return passes


def _passes_of_attack(attack: ml_collections.ConfigDict) -> int:
    return attack.num_steps * _BY_IMAGE + bool(attack.keep_best) * _FORWARD


def of_final(
    config: ml_collections.ConfigDict,
    stages: Sequence[str],
    num_test: int,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """Says what the evaluation of stages for the report costs.

    The speed is that of `records`, lines of `metrics.jsonl`; there may be none.
    """
    settings = config.evaluate
    images = min(settings.num_test_examples or num_test, num_test)
    num = settings.samples.num_test
    passes = len(stages) * passes_of_evaluation(config, images, num)
    step, name = _longest_step(config, max(stages, key=list(STAGES).index))
    time = ""
    if (speed := passes_per_second(config, records)) is not None:
        seconds = datetime.timedelta(seconds=round(passes / speed))
        time = f"; about {seconds} (estimated from training's speed)"
    return (
        f"the evaluation of {' and '.join(stages)} for the report: {images:,} images "
        f"under {settings.attack.num_steps} steps of attack and {num:,} samples of "
        f"{settings.samples.num_steps} steps each, {passes:,} passes of an image in "
        f"all, as many as {passes / step:,.0f} steps of {name}{time}."
    )


def of_periodic(
    config: ml_collections.ConfigDict, stage: str, total: int, num_eval: int
) -> str | None:
    """A warning where evaluations cost more than half of the `total` steps of a stage.

    `num_eval` is the number of images in the set that they look at.
    """
    settings = config.evaluate
    number = -(-total // (config[stage].eval_every_steps or total))
    images = min(settings.num_examples or num_eval, num_eval)
    passes = number * passes_of_evaluation(config, images, settings.samples.num)
    step, name = _longest_step(config, stage)
    if passes <= total * step / 2:
        return None
    return (
        f"{number} evaluation{'s' * (number > 1)} on the way "
        f"take{'s' * (number == 1)} {passes / (total * step):.2g} times as "
        f"many passes of an image as {total:,} steps of {name}: less with "
        f"a larger config.{stage}.eval_every_steps, or a smaller "
        "config.evaluate.num_examples or config.evaluate.samples.num."
    )


def _longest_step(config: ml_collections.ConfigDict, stage: str) -> tuple[int, str]:
    """Passes of a step of a stage, at T_max where it has a T, and its name."""
    t_max = STAGES[stage].t_max(config[stage])
    passes = config[stage].batch_size * passes_of_training(config, stage, t_max)
    return passes, f"{stage} at T_max" if t_max else stage


def passes_per_second(
    config: ml_collections.ConfigDict, records: Sequence[Mapping[str, Any]]
) -> float | None:
    """The latest speed of training by lines of `metrics.jsonl`; None if unknown."""
    speeds = [
        record["images_per_second"]
        * passes_of_training(config, record["stage"], int(record.get("T", 0)))
        for record in records
        if record.get("images_per_second", 0) > 0
    ]
    return statistics.median(speeds[-_RECORDS:]) if speeds else None
