"""PGD on the small network against the reference's trajectories.

A float32 rounding can put one ReLU on its other side, from where trajectories part:
the strict check starts every step from the stored image, the loose one runs freely.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import ascent, attacks, energy, losses, models

INFINITE = float("inf")


def label(logits, labels):
    return energy.score(logits, labels)


def label_descent(logits, labels):
    return -energy.score(logits, labels)


def marginal(logits, labels):
    del labels
    return energy.score(logits)


# Images, objective, threat, step size, as the golden files describe each case.
CASES = {
    "label_L2_epsinf": ("seed", label, attacks.l2(INFINITE), 0.1),
    "logsumexp_L2_epsinf": ("seed", marginal, attacks.unbounded(), 0.1),
    "label_L2_eps1_step02": ("seed", label, attacks.l2(1.0), 0.2),
    "label_descent_L2_eps05": ("clean", label_descent, attacks.l2(0.5), 0.1),
    "xent_L2_eps05": ("clean", losses.cross_entropy, attacks.l2(0.5), 0.1),
    "xent_Linf_eps8": ("clean", losses.cross_entropy, attacks.linf(8 / 255), 2 / 255),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    """(case, stored arrays, attack): the attack starts where it is told."""
    try:
        stored = golden("pgd")
    except pytest.skip.Exception:
        stored = golden("pgd_small")
    if f"{request.param}/traj" not in stored:
        pytest.skip("reference outputs are not here (pgd.npz)")
    weights = reference.variables(golden("wrn_state_dict"))
    return (
        request.param,
        stored,
        make_attack(request.param, stored, reference.network(), weights),
    )


def make_attack(name, stored, network, weights):
    images, objective, threat, step_size = CASES[name]
    origin = jnp.asarray(stored[f"{images}_images"])
    labels = jnp.asarray(stored[f"{images}_labels"].astype(np.int32))
    logits_fn = models.logits_fn(network, weights)

    @jax.jit
    def attack(start, num_steps):
        return ascent.climb(
            lambda x: objective(logits_fn(x), labels),
            start,
            ascent.along(threat.direction),
            step_size=step_size,
            num_steps=num_steps,
            project=lambda x: threat.project(x, origin),
        )

    return functools.partial(run, attack, origin)


def run(attack, origin, num_steps, start=None):
    start = origin if start is None else jnp.asarray(start)
    return np.asarray(attack(start, jnp.int32(num_steps)))


def distances(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.sqrt(np.square(difference).sum(axis=(-3, -2, -1)))


def test_each_step_from_a_stored_image_gives_the_next(case):
    name, stored, attack = case
    trajectory, steps = stored[f"{name}/traj"], stored[f"{name}/traj_steps"]
    made = np.stack(
        [
            attack(steps[k + 1] - steps[k], start=trajectory[k])
            for k in range(len(steps) - 1)
        ]
    )
    away = distances(made, trajectory[1:])
    # 95 %, and one pair where there are so few that it would be more than the rest.
    assert (away >= 1e-5).sum() <= max(0.05 * away.size, 1), away
    if CASES[name][2].norm == "linf":
        # A flipped unit shows as single pixels that went the other way.
        assert (np.abs(made - trajectory[1:]) > 1e-5).mean() <= 0.005
    else:
        assert away.max() < 1e-2, away


def test_free_run_follows_the_reference(case, golden):
    name, stored, attack = case
    linf = CASES[name][2].norm == "linf"
    steps = stored[f"{name}/traj_steps"]
    last = attack(steps[-1])
    away = distances(last, stored[f"{name}/traj"][-1])
    assert away.max() < (1.0 if linf else 0.1), away
    assert (away < 1e-5).mean() >= 0.5, away
    if f"{name}/fy" not in stored:
        return
    labels = jnp.asarray(stored[f"{CASES[name][0]}_labels"].astype(np.int32))
    weights = reference.variables(golden("wrn_state_dict"))
    logits_fn = jax.jit(models.logits_fn(reference.network(), weights))
    for count in (1, 2, steps[-1]):
        logits = logits_fn(attack(count))
        curves = {
            "fy": energy.score(logits, labels),
            "logsumexp": energy.score(logits),
            "ce": losses.cross_entropy(logits, labels),
        }
        tolerance = 1e-4 if count <= 2 else 0.1 if linf else 0.03
        for curve, values in curves.items():
            expected = stored[f"{name}/{curve}"][count]
            # In float32 a unit of one image may lie on the other side of zero, on
            # which processor it depends; in float64 below none does.
            close = np.abs(values - expected) <= tolerance
            assert (~close).sum() <= 1, (curve, count, values, expected)


@pytest.mark.usefixtures("optimized")
def test_free_run_in_float64_ends_where_the_reference_does(case, golden, monkeypatch):
    """Sixteen digits leave no room for flips, so the whole run must agree.

    Rounding of 1e-16 grows to 1e-12 where a gradient is small before it is normalised.
    """
    name, stored, _ = case
    if f"{name}/final_f64" not in stored:
        pytest.skip("reference outputs are not here (pgd.npz)")
    with jax.enable_x64(True):
        network = reference.double_network()
        weights = reference.variables(reference.double(golden("wrn_state_dict")))
        attack = make_attack(name, reference.double(stored), network, weights)
        last = attack(stored[f"{name}/traj_steps"][-1])
    assert last.dtype == np.float64
    np.testing.assert_allclose(last, stored[f"{name}/final_f64"], rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def operators(golden):
    return {
        name.removeprefix("ops/"): value
        for name, value in golden("pgd").items()
        if name.startswith("ops/")
    }


def test_single_steps_match_the_reference(operators):
    for threat, name, size in (
        (attacks.unbounded(), "l2_step", 0.1),
        (attacks.linf(1.0), "linf_step", 2 / 255),
    ):
        moved = operators["x0"] + size * threat.direction(operators["grad"])
        away = np.abs(moved - operators[name])
        assert away.max() < 1e-6, name


def test_projections_match_the_reference(operators):
    grey = np.full_like(operators["x0"], 0.5)
    l2, linf = attacks.l2(0.5), attacks.linf(8 / 255)
    for threat, images, origin, name in (
        (l2, "x_off", operators["x0"], "l2_project_eps05"),
        (linf, "x_off", operators["x0"], "linf_project_eps8"),
        (l2, "grey_off", grey, "grey_l2_project_eps05"),
    ):
        projected = threat.project(operators[images], origin)
        np.testing.assert_allclose(projected, operators[name], rtol=0, atol=1e-6)
