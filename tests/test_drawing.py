"""Samples, their seeds and labels, and edits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from flax import linen as nn
from PIL import Image

from atebm_jax import (
    ascent,
    attacks,
    constraints,
    data,
    drawing,
    editing,
    energy,
    models,
    recipes,
    seeds,
)

pytestmark = pytest.mark.usefixtures("two_devices")

SHAPE = (4, 4, 3)
LABELS = jnp.arange(6) % 3

# Operation by operation it would compile for longer.
noise_seeds = jax.jit(seeds.noise_seeds, static_argnums=2)


@pytest.fixture(scope="module")
def stored(golden):
    try:
        return golden("pgd")
    except pytest.skip.Exception:
        return golden("pgd_small")


@pytest.fixture(scope="module")
def logits_fn(golden):
    weights = reference.variables(golden("wrn_state_dict"))
    return models.logits_fn(reference.network(), weights)


def assert_follows(sample, trajectory):
    """The first two steps, where no unit has flipped yet."""
    for steps in (1, 2):
        made = sample(num_steps=jnp.int32(steps))
        np.testing.assert_allclose(made, trajectory[steps], rtol=0, atol=1e-5)


def test_conditional_samples_follow_the_reference(stored, logits_fn):
    labels = jnp.asarray(stored["seed_labels"].astype(np.int32))
    sample = jax.jit(
        lambda num_steps: ascent.climb(
            lambda x: energy.score(logits_fn(x), labels),
            stored["seed_images"],
            step_size=0.1,
            num_steps=num_steps,
        )
    )
    assert_follows(sample, stored["label_L2_epsinf/traj"])


def test_unconditional_samples_follow_the_reference(stored, logits_fn):
    if "logsumexp_L2_epsinf/traj" not in stored:
        pytest.skip("reference outputs are not here (pgd.npz)")
    sample = jax.jit(
        lambda num_steps: ascent.climb(
            lambda x: energy.score(logits_fn(x)),
            stored["seed_images"],
            step_size=0.1,
            num_steps=num_steps,
        )
    )
    assert_follows(sample, stored["logsumexp_L2_epsinf/traj"])


def linear_logits(images):
    """Class k is the sum of channel k."""
    return images.sum(axis=(1, 2))


def joint_score(labels):
    return lambda x: energy.score(linear_logits(x), labels)


def marginal_score(x):
    return energy.score(linear_logits(x))


def test_samples_of_a_linear_model_lower_their_own_energy():
    seeds = noise_seeds(jax.random.key(0), jnp.arange(6), SHAPE)
    labels = LABELS
    options = {"step_size": 0.2, "num_steps": 5}
    made = ascent.climb(joint_score(labels), seeds, **options)
    assert (made >= 0).all() and (made <= 1).all()
    before, after = (energy.joint(linear_logits(x), labels) for x in (seeds, made))
    assert (after < before).all()
    # Nothing else than the class's channel moves.
    for image, seed, label in zip(made, seeds, labels, strict=True):
        others = [k for k in range(3) if k != label]
        np.testing.assert_array_equal(image[..., others], seed[..., others])
    made = ascent.climb(marginal_score, seeds, **options)
    before, after = (energy.marginal(linear_logits(x)) for x in (seeds, made))
    assert (after < before).all()


@partial(jax.jit, static_argnames="rule")
def edit(constraint, labels, num_steps=6, rule="pgd"):
    return editing.descend(
        linear_logits,
        constraint,
        labels,
        jnp.broadcast_to(jax.random.key(0), constraint.start.shape[:1]),
        rule=ascent.rule(rule),
        step_size=0.3,
        num_steps=num_steps,
        capacity=8,
    )


def test_edit_in_a_ball_is_the_counterfactual():
    images = noise_seeds(jax.random.key(0), jnp.arange(6), SHAPE)
    targets = LABELS
    for norm, rule in (("l2", "pgd"), ("linf", "sign")):
        made = edit(constraints.ball(images, 0.4, norm), targets, rule=rule)
        expected = attacks.attack(
            joint_score(targets),
            images,
            attacks.threat(norm, 0.4),
            step_size=0.3,
            num_steps=6,
        )
        np.testing.assert_allclose(made.images, expected, rtol=0, atol=1e-6)


def test_path_of_an_edit_reads_its_images():
    images = noise_seeds(jax.random.key(0), jnp.arange(6), SHAPE)
    labels = LABELS
    made = edit(constraints.ball(images, 1.0), labels)
    for row, x in ((0, images), (6, made.images)):
        logits = linear_logits(x)
        np.testing.assert_allclose(made.path.energy[row], energy.joint(logits, labels))
        np.testing.assert_array_equal(made.path.predicted[row], logits.argmax(1))
        everything = energy.class_probabilities(logits)
        for read, classes in (
            (made.path.target_confidence, labels),
            (made.path.original_confidence, made.originals),
        ):
            expected = everything[jnp.arange(6), classes]
            np.testing.assert_allclose(read[row], expected, rtol=1e-5)
    np.testing.assert_array_equal(made.originals, linear_logits(images).argmax(1))
    # What was not reached stays empty.
    assert made.path.energy.shape == (9, 6) and not made.path.energy[7:].any()


def test_edit_without_a_class_or_with_a_guessed_one():
    images = noise_seeds(jax.random.key(1), jnp.arange(3), SHAPE)
    ball = constraints.ball(images, 1.0)
    free = edit(ball, None)
    marginal = energy.marginal(linear_logits(free.images))
    np.testing.assert_allclose(free.path.energy[6], marginal)
    guessed = edit(ball, jnp.full(3, editing.GUESS))
    np.testing.assert_array_equal(guessed.targets, guessed.originals)
    told = edit(ball, guessed.originals)
    np.testing.assert_array_equal(guessed.images, told.images)


def test_growing_steps_of_an_edit_does_not_recompile():
    ball = constraints.ball(np.zeros((1, *SHAPE), np.uint8), 1.0)
    compiled = jax.jit(lambda n: edit(ball, None, n).path.energy)
    few, many = compiled(jnp.int32(2)), compiled(jnp.int32(5))
    np.testing.assert_array_equal(few[:3], many[:3])
    assert compiled._cache_size() == 1


def test_steps_of_a_counterfactual_shrink_with_its_ball():
    sizes = editing.counterfactual_step_size(0.3, np.array([0.5, 1.5, 4.0]))
    np.testing.assert_allclose(sizes, [0.1, 0.3, 0.3])


def test_no_steps_return_the_seeds():
    seeds = noise_seeds(jax.random.key(0), jnp.arange(2), SHAPE)
    made = ascent.climb(marginal_score, seeds, step_size=0.2, num_steps=0)
    np.testing.assert_array_equal(made, seeds)


def test_noise_of_an_index_does_not_depend_on_the_batch():
    key = jax.random.key(3)
    together = noise_seeds(key, jnp.arange(8), SHAPE)
    apart = [noise_seeds(key, jnp.asarray([i]), SHAPE)[0] for i in (5, 2)]
    np.testing.assert_array_equal(together[jnp.asarray([5, 2])], apart)
    assert len(np.unique(together)) == together.size


def test_noise_is_uniform_and_follows_its_key():
    noise = [
        np.asarray(noise_seeds(jax.random.key(k), jnp.arange(50), SHAPE))
        for k in (0, 1)
    ]
    assert noise[0].min() >= 0 and noise[0].max() <= 1
    np.testing.assert_allclose(noise[0].mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(noise[0].std(), 12**-0.5, atol=0.02)
    assert not np.array_equal(*noise)


def test_labels_are_cyclic_and_balanced():
    labels = drawing.cyclic_labels(3)(np.arange(7))
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(drawing.cyclic_labels(1)(np.arange(3)), [0, 0, 0])


def test_seed_that_cannot_be_decoded_gives_way_to_the_next(tmp_path):
    """Never a black image, and again where there are fewer seeds than images."""
    for level in range(20):
        image = Image.fromarray(np.full((8, 8), 10 * level, np.uint8))
        image.save(tmp_path / f"{level:02d}.png")
    (tmp_path / "05.png").write_text("no image")
    seeds_of = seeds.ReadSeeds(
        data.open_source(f"folder:{tmp_path}"), tiny.config().data
    )
    indices = np.arange(4, 28, dtype=np.int32)
    images = seeds_of(indices, indices)
    places = indices % 20
    levels = 10 * np.where(places == 5, 6, places)
    np.testing.assert_allclose(images[:, 0, 0, 0] * 255, levels, atol=1e-4)
    assert seeds_of.stand_ins == {5, 25}


class Linear(nn.Module):
    """Class k is the sum of channel k."""

    def __call__(self, images):
        return linear_logits(images)


@pytest.mark.parametrize("sampler", ["pgd", "sgld(noise=0.01)"])
def test_image_i_does_not_depend_on_what_is_drawn_beside_it(sampler):
    recipe = recipes.Recipe(sampler, num_steps=3, seed=5)
    settings = tiny.config().data
    settings.image_shape = SHAPE
    labels_of = drawing.cyclic_labels(3)
    seeds_of = seeds.seeds_fn("noise", recipe.seed, settings)
    arguments = (Linear(), {}, recipe)
    many = drawing.images(*arguments, 100, labels_of, seeds_of)
    few = drawing.images(*arguments, 5, labels_of, seeds_of)
    np.testing.assert_array_equal(many[:5], few)
    (number, chunk), *_ = drawing.draw(*arguments, [2], labels_of, seeds_of)
    assert number == 2
    np.testing.assert_array_equal(many[64:96], chunk)
    # The same image again where other numbers of steps are looked at on the way.
    made = drawing.draw(
        *arguments, [2], labels_of, seeds_of, ends=[0, 3], read=_both_ends
    )
    before, after = next(made)[1]
    np.testing.assert_array_equal(after, chunk)
    np.testing.assert_array_equal(before[0], seeds_of(np.array([64]), None)[0])


def _both_ends(weights, images):
    return images[0], images[1]
