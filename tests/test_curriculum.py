"""The curriculum on the number of contrastive steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError, curriculum


def course(aucs, *, length, threshold=0.5, max_steps=100):
    """T after each AUC."""
    update = jax.jit(
        lambda state, auc: curriculum.update(
            state, auc, threshold=threshold, max_steps=max_steps
        )
    )
    state, steps = curriculum.init(length), []
    for auc in aucs:
        state = update(state, jnp.float32(auc))
        steps.append(int(state.num_steps))
    return steps


def test_training_starts_without_contrastive_steps():
    assert int(curriculum.init(4).num_steps) == 0


def test_steps_grow_when_a_full_window_reaches_the_threshold():
    # Mean of the first full window 0.4, of the second (0.4 + 0.6 + 0.6) / 3.
    assert course([0.2, 0.4, 0.6, 0.6], length=3, threshold=0.5) == [0, 0, 0, 1]


def test_window_is_emptied_after_growth():
    assert course([1.0] * 9, length=3) == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_window_slides_while_the_threshold_is_not_reached():
    aucs = [0.0] * 5 + [1.0, 1.0]
    assert course(aucs, length=2, threshold=1.0) == [0] * 6 + [1]


def test_mean_equal_to_the_threshold_is_enough():
    assert course([0.25, 0.75], length=2, threshold=0.5) == [0, 1]


def test_low_aucs_never_grow_the_steps():
    assert course([0.49] * 20, length=4) == [0] * 20


def test_steps_stop_at_their_maximum():
    assert course([1.0] * 5, length=1, max_steps=3) == [1, 2, 3, 3, 3]
    assert course([1.0] * 3, length=1, max_steps=0) == [0, 0, 0]


def test_broken_auc_holds_the_steps_until_it_has_left_the_window():
    aucs = [1.0, np.nan, 1.0, 1.0]
    assert course(aucs, length=2) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(1000, 128, 8), (1000, 512, 2), (1000, 1000, 1), (1000, 2000, 1), (1001, 100, 11)],
)
def test_window_covers_the_images_asked_for(images, batch, steps):
    assert curriculum.window_length(images, batch) == steps


@pytest.mark.parametrize(("images", "batch"), [(0, 8), (1000, 0), (-1, 8)])
def test_empty_window_is_refused(images, batch):
    with pytest.raises(UserError, match="both must be positive"):
        curriculum.window_length(images, batch)


def test_state_round_trips_through_any_moment():
    """Everything needed to go on lies in the state: growth does not depend on it."""
    rng = np.random.default_rng(0)
    aucs = rng.random(40)
    state = curriculum.init(3)
    expected = course(aucs, length=3, threshold=0.6)
    for auc, steps in zip(aucs, expected, strict=True):
        state = curriculum.update(
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state),
            jnp.float32(auc),
            threshold=0.6,
            max_steps=100,
        )
        assert int(state.num_steps) == steps
    assert expected[-1] > 1
