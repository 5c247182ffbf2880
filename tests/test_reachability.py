"""Whether seeds can come near the training images, before the first step."""

from pathlib import Path

import numpy as np
import pytest

from atebm_jax import UserError, data, reachability
from atebm_jax.command_line import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
SHAPE = (32, 32, 3)
CIFAR = {"num_sampling_steps": 35, "sampling_step_size": 1.0, "stage": "stage2"}


def photographs(rng, number):
    """Images with the spectrum of photographs: lengths fall with the frequency."""
    height, width, channels = SHAPE
    down, across = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    frequency = np.hypot(down[:, None], across)
    length = np.where(frequency > 0, 1 / np.maximum(frequency, 1 / width) ** 1.2, 0)
    white = np.fft.rfft2(rng.normal(size=(number, *SHAPE)), axes=(1, 2))
    images = np.fft.irfft2(white * length[..., None], s=SHAPE[:2], axes=(1, 2))
    images *= 0.2 / images.std()
    brightness = rng.normal(0.5, 0.1, size=(number, 1, 1, channels))
    return np.clip(images + brightness, 0, 1).astype(np.float32)


def gaussian(rng, images):
    """Draws with the mean and the full covariance of images."""
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    weights = rng.normal(size=(len(images), len(images))) / np.sqrt(len(images))
    return np.clip(mean + weights @ (pixels - mean), 0, 1).reshape(images.shape)


def with_random_phases(rng, images):
    spectrum = np.fft.rfft2(images, axes=(1, 2))
    phase = np.fft.rfft2(rng.normal(size=images.shape[:3]), axes=(1, 2))[..., None]
    phase /= np.abs(phase)
    phase[:, 0, 0] = 1
    return np.clip(np.fft.irfft2(spectrum * phase, s=SHAPE[:2], axes=(1, 2)), 0, 1)


def shuffled(rng, images, side=8):
    count = SHAPE[0] // side
    patches = images.reshape(-1, count, side, count, side, 3).swapaxes(2, 3)
    patches = patches.reshape(-1, count**2, side, side, 3)
    patches = np.stack([x[rng.permutation(count**2)] for x in patches])
    patches = patches.reshape(-1, count, count, side, side, 3).swapaxes(2, 3)
    return patches.reshape(images.shape)


SEEDS = {
    "noise": lambda rng, held_back: rng.random(held_back.shape),
    "black": lambda rng, held_back: np.zeros_like(held_back),
    "grey": lambda rng, held_back: np.full_like(held_back, 0.5),
    "photographs": lambda rng, held_back: held_back,
    "gaussian": gaussian,
    "random phases": with_random_phases,
    "shuffled patches": shuffled,
}


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    images = photographs(rng, 400)
    held_back = images[200:]
    seeds = {name: make(rng, held_back) for name, make in SEEDS.items()}
    return images[:200], seeds


def measured(sets, kind, t_max, step, **sampling):
    images, seeds = sets
    return reachability.measure(
        seeds[kind],
        images,
        t_max=t_max,
        contrastive_step_size=step,
        **(CIFAR | sampling),
    )


@pytest.mark.parametrize(
    ("kind", "t_max", "step"),
    [("noise", 20, 0.2), ("noise", 25, 0.1), ("black", 25, 0.1), ("grey", 25, 0.1)],
)
def test_steps_that_are_too_short_for_the_seeds_are_told(sets, kind, t_max, step):
    found = measured(sets, kind, t_max, step)
    assert found.farthest_contrastive == pytest.approx(t_max * step)
    assert found.farthest_contrastive < found.least_distance / 2
    assert f"contrastive images go no farther than {t_max * step:.3g}" in found.sentence
    assert "samples go" not in found.sentence


def test_steps_without_a_length_are_not_told_to_be_short(sets):
    found = measured(sets, "noise", 40, 1.0, sampling_step_size=None)
    assert found.farthest_sampling is None and found.sentence is None
    (line,) = reachability.lines(found)
    assert line.endswith("at most, samples as their gradients take them.")


@pytest.mark.parametrize(
    ("kind", "t_max", "step"),
    [
        ("noise", 40, 1.0),
        ("photographs", 25, 0.1),
        ("gaussian", 25, 0.1),
        ("random phases", 25, 0.1),
        ("shuffled patches", 25, 0.1),
    ],
)
def test_seeds_that_can_come_near_are_not_warned_of(sets, kind, t_max, step):
    found = measured(sets, kind, t_max, step)
    assert found.sentence is None
    assert len(reachability.lines(found)) == 1


def test_distance_to_a_training_image_does_not_tell_noise_from_photographs(sets):
    noise = measured(sets, "noise", 20, 0.2)
    near = measured(sets, "photographs", 20, 0.2)
    assert near.distance > 0.6 * noise.distance
    assert near.least_distance < 0.1 * noise.least_distance


def test_what_the_warning_says_would_do_does(sets):
    found = measured(sets, "noise", 20, 0.2)
    steps = int(found.sentence.partition("--config.stage2.t_max=")[2].split(",")[0])
    flag = "--config.stage2.contrastive_step_size="
    size = float(found.sentence.partition(flag)[2].split()[0])
    assert 0.2 * steps >= found.distance and 20 * size >= found.distance
    assert 20 * size < 1.1 * found.distance
    for settings in ((steps, 0.2), (20, size)):
        assert measured(sets, "noise", *settings).sentence is None


def test_fields_of_the_warning_are_those_of_the_stage(sets):
    config = load_config(f"{CONFIGS}/cifar10.py:small")
    images = np.round(255 * sets[0]).astype(np.uint8)
    sources = {"train": data.ArraySource(images, np.zeros(len(images), np.int64))}
    config.data.seeds, config.another = (
        "noise",
        config.stage2.copy_and_resolve_references(),
    )
    config.another.update(t_max=20, contrastive_step_size=0.2)
    found = reachability.of_config(config, sources, "another")
    assert found.farthest_contrastive == pytest.approx(4.0)
    assert "--config.another.t_max=" in found.sentence
    assert "stage2" not in found.sentence


def test_samples_that_cannot_come_near_are_told_by_their_own_fields(sets):
    found = measured(sets, "noise", 40, 1.0, sampling_step_size=0.1)
    assert "samples go no farther than 3.5 (35 steps of 0.1)" in found.sentence
    assert "--config.evaluate.samples.step_size=" in found.sentence
    assert "stage2" not in found.sentence


def test_without_any_step_only_more_steps_would_do(sets):
    found = measured(sets, "noise", 0, 0.2)
    assert found.farthest_contrastive == 0
    assert "contrastive_step_size" not in found.sentence
    assert "--config.stage2.t_max=" in found.sentence


def test_no_remedy_is_beyond_what_a_config_can_hold(sets):
    for step in (1e-12, 1e-320):
        found = measured(sets, "noise", 20, step)
        assert "--config.stage2.contrastive_step_size=" in found.sentence
        assert "t_max" not in found.sentence


def test_classes_too_many_for_gaussians_are_told_before_a_run():
    config = load_config(f"{CONFIGS}/cifar100.py:small")
    config.data.seeds = "gaussian_per_class"
    images = np.zeros((4, 32, 32, 3), np.uint8)
    sources = {"train": data.ArraySource(images, np.arange(4), num_classes=100)}
    with pytest.raises(UserError, match="100 classes are too large to be kept"):
        reachability.of_config(config, sources, "stage2")


def test_seeds_that_are_the_training_images_do_not_meet_themselves(sets):
    images = sets[0]
    found = reachability.measure(
        images, images, t_max=5, contrastive_step_size=0.1, **CIFAR
    )
    assert found.distance > 5 and found.least_distance == 0


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        # Both fail: AUC 1, and samples that stay far (docs/curriculum.md).
        ({"stage2.contrastive_step_size": 0.02}, True),
        ({"stage2.t_max": 3}, True),
    ],
)
def test_digits_are_warned_of_where_their_runs_fail(settings, warned):
    config = load_config(f"{CONFIGS}/digits.py")
    config.update_from_flattened_dict(settings)
    sources = {"train": data.open_source(config.data.train)}
    found = reachability.of_config(config, sources, "stage2")
    assert (found.sentence is not None) == warned
    assert "samples go" not in (found.sentence or "")


@pytest.mark.parametrize(
    ("seeds", "t_max", "step", "warned"),
    [
        ("noise", 20, 0.2, True),
        ("noise", 40, 1.0, False),
        ("tfds:imagenet_sample:train", 25, 0.1, False),
    ],
)
def test_cifar10_is_warned_of_where_its_runs_fail(tfds_dir, seeds, t_max, step, warned):
    config = load_config(f"{CONFIGS}/cifar10.py:small")
    config.data.seeds = seeds
    config.stage2.t_max, config.stage2.contrastive_step_size = t_max, step
    config.evaluate.samples.step_size = 1.0
    sources = {"train": data.open_source(config.data.train, tfds_dir)}
    if seeds != "noise":
        sources["seeds"] = data.open_source(seeds, tfds_dir)
    found = reachability.of_config(config, sources, "stage2")
    assert 15 < found.distance < 25
    assert (found.sentence is not None) == warned


def test_large_photographs_reach_others_and_noise_does_not(tfds_dir):
    config = load_config(f"{CONFIGS}/imagenet256.py:resnet50_t15")
    halves = ("tfds:imagenet_sample:train[:50%]", "tfds:imagenet_sample:train[50%:]")
    train, seeds = (data.open_source(half, tfds_dir) for half in halves)
    config.data.seeds = halves[1]
    near = reachability.of_config(config, {"train": train, "seeds": seeds}, "stage2")
    config.data.seeds = "gaussian"
    drawn = reachability.of_config(config, {"train": train}, "stage2")
    config.data.seeds = "noise"
    noise = reachability.of_config(config, {"train": train}, "stage2")
    assert near.sentence is None and drawn.sentence is None
    assert near.distance > 100 and noise.distance > 100
    assert near.least_distance < 30 and noise.least_distance > 100
    assert "contrastive images go no farther than 30" in noise.sentence
