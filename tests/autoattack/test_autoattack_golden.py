"""The attacks of the ensemble against the original, on its own network and images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import autoattack, losses, models
from atebm_jax.autoattack import apgd, fab, objectives

pytestmark = pytest.mark.golden

EPSILONS = {"L2": 0.5, "Linf": 8 / 255}
LOSSES = {"ce": losses.cross_entropy, "dlr": objectives.dlr}


@functools.cache
def _model(read):
    variables = reference.variables(read("autoattack_state_dict"))
    return models.logits_fn(reference.network(), variables)


def _images(golden):
    stored, chosen = golden("autoattack_inputs"), golden("apgd_deterministic")
    index = chosen["image_index"]
    return jnp.asarray(stored["images"][index]), jnp.asarray(
        stored["labels"][index], jnp.int32
    )


def _search(golden, images, loss, labels, norm, num_steps):
    logits_fn = _model(golden)
    evaluate = apgd.evaluator(lambda x, key: logits_fn(x), loss, labels, 1)
    key = jax.random.key(0)

    @jax.jit
    def search(images):
        state = apgd.search(
            evaluate,
            key,
            images,
            images,
            jnp.float32(EPSILONS[norm]),
            num_steps,
            norm=norm.lower(),
        )
        # The start, which is correct, where no iterate was misclassified.
        return state, logits_fn(state.adversarial).argmax(axis=-1) == labels

    return search(images)


def test_losses_equal_the_reference(golden):
    stored = golden("apgd_losses")
    logits = jnp.asarray(stored["logits"])
    labels = jnp.asarray(stored["labels"], jnp.int32)
    targets = jnp.asarray(stored["target_labels"], jnp.int32)
    values = {
        "ce": losses.cross_entropy(logits, labels),
        "dlr": objectives.dlr(logits, labels),
        "dlr_targeted": objectives.dlr_targeted(logits, labels, targets),
    }
    # Row 1 has a tie at the top, where the reference depends on its order.
    rows = np.arange(64) != 1
    for name, value in values.items():
        np.testing.assert_allclose(
            value[rows], stored[name][rows], rtol=1e-5, atol=1e-5
        )
    gradients = {
        "dlr": jax.grad(lambda z: objectives.dlr(z, labels).sum())(logits),
        "dlr_targeted": jax.grad(
            lambda z: objectives.dlr_targeted(z, labels, targets).sum()
        )(logits),
    }
    for name, gradient in gradients.items():
        expected = stored[f"grad_{name}"]
        np.testing.assert_allclose(gradient[2:], expected[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", EPSILONS)
@pytest.mark.parametrize(("loss", "num_steps"), [("ce", 20), ("dlr", 20), ("ce", 50)])
def test_apgd_from_the_image_matches_the_reference(golden, norm, loss, num_steps):
    stored = golden("apgd_deterministic")
    prefix = f"apgd_{loss}{num_steps}_{norm}"
    images, labels = _images(golden)
    state, robust = _search(
        golden, images, lambda z: LOSSES[loss](z, labels), labels, norm, num_steps
    )
    # Where a unit of the reference itself flips between float32 and float64, only
    # the verdict can be compared.
    flipped = (stored[f"{prefix}/f32_f64_l2_per_step"] > 1e-4).any(axis=0)
    agree = np.asarray(robust) == stored[f"{prefix}/robust"]
    assert agree[~flipped].all() and agree.sum() >= len(agree) - 1
    difference = np.abs(np.asarray(state.best_loss) - stored[f"{prefix}/best_loss"])
    # Our own rounding flips units of other images.
    assert (difference[~flipped] < 1e-4).mean() > 0.85
    loose = {("L2", "ce"): 1e-3, ("Linf", "ce"): 0.05}.get((norm, loss), 0.5)
    assert difference.max() < loose


@pytest.mark.parametrize("norm", EPSILONS)
def test_targeted_apgd_matches_the_reference(golden, norm):
    stored = golden("apgd_deterministic")
    images, labels = _images(golden)
    targets = jnp.asarray(stored[f"apgd_t20_{norm}/target"], jnp.int32)
    state, robust = _search(
        golden,
        images,
        lambda z: objectives.dlr_targeted(z, labels, targets),
        labels,
        norm,
        20,
    )
    agree = np.asarray(robust) == stored[f"apgd_t20_{norm}/robust"]
    assert agree.sum() >= len(agree) - 1
    difference = np.abs(state.best_loss - stored[f"apgd_t20_{norm}/best_loss"])
    assert np.median(difference) < 1e-4


@functools.cache
def _compiled_fab(read, norm):
    """One program for all targets."""
    logits_fn = _model(read)

    @jax.jit
    def search(images, labels, targets):
        key = jax.random.key(0)
        return fab.search(
            fab.targeted_boundary(lambda x, _: logits_fn(x), key, labels, targets),
            lambda z: logits_fn(z).argmax(axis=-1) == labels,
            images,
            images,
            jnp.int32(20),
            norm=norm,
        )

    return search


@pytest.mark.parametrize("norm", EPSILONS)
@pytest.mark.parametrize("rank", [2, 3])
def test_targeted_fab_finds_the_distances_of_the_reference(golden, norm, rank):
    stored = golden("apgd_deterministic")
    images, labels = _images(golden)
    order = jnp.argsort(_model(golden)(images), axis=-1)
    state = _compiled_fab(golden, norm.lower())(images, labels, order[:, -rank])
    expected = stored[f"fabt20_{norm}_target{rank}/pert_norm"]
    found = expected > 0
    ratio = np.asarray(state.distance)[found] / expected[found]
    assert np.median(np.abs(ratio - 1)) < 1e-3
    assert (np.abs(ratio - 1) < 0.02).mean() > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("norm", EPSILONS)
def test_ensemble_counts_as_many_robust_images_as_the_original(golden, norm):
    stored, inputs = golden(f"autoattack_{norm}"), golden("autoattack_inputs")
    result = autoattack.run(
        jax.random.key(0),
        _model(golden),
        inputs["images"],
        inputs["labels"],
        threat=(norm.lower(), EPSILONS[norm]),
        batch_size=128,
    )
    np.testing.assert_array_equal(result.clean, inputs["clean_correct"])
    for name, mask in result.robust.items():
        expected = stored[f"seed0/cascade_robust_mask/{name}"]
        assert abs(int(mask.sum()) - int(expected.sum())) <= 2, name
