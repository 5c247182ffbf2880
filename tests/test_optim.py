"""Optimisers, schedules and the weight average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError, optim

RATE = 0.1


def steps(optimizer, params, gradients, rate=RATE):
    """Parameters after each of several steps."""
    state, trajectory = optimizer.init(params), []
    for gradient in gradients:
        params, state = optim.apply(
            optimizer, gradient, state, params, jnp.float32(rate)
        )
        trajectory.append(params)
    return trajectory


def test_sgd_steps_are_worked_by_hand():
    optimizer = optim.sgd(weight_decay=0.5)
    # Decayed gradient 1 + 0.5 * 2 = 2, v = 2, u = 2 + 0.9 * 2 = 3.8.
    # Then 1 + 0.5 * 1.62 = 1.81, v = 1.8 + 1.81 = 3.61, u = 1.81 + 3.249 = 5.059.
    made = steps(optimizer, jnp.float32(2.0), [jnp.float32(1.0)] * 2)
    np.testing.assert_allclose(made, [1.62, 1.1141], rtol=1e-6)


def test_first_adamw_step_is_worked_by_hand():
    optimizer = optim.adamw(weight_decay=0.5)
    # m / sqrt(v) is the gradient's sign: 2 - 0.1 * (1 + 0.5 * 2).
    made = steps(optimizer, jnp.float32(2.0), [jnp.float32(3.0)])
    np.testing.assert_allclose(made, [1.8], rtol=1e-6)


def test_second_adam_step_is_worked_by_hand():
    """m = 0.37 / 0.19 and v = 0.009991 / 0.001999: 1.9 - 0.1 * 0.871064."""
    optimizer = optim.optimizer("adam", weight_decay=0.0)
    made = steps(optimizer, jnp.float32(2.0), [jnp.float32(3.0), jnp.float32(1.0)])
    np.testing.assert_allclose(made, [1.9, 1.8128936], rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_zero_gradient_leaves_what_is_not_decayed(name):
    optimizer = optim.optimizer(name, weight_decay=0.0)
    made = steps(optimizer, jnp.float32(2.0), [jnp.float32(0.0)])
    np.testing.assert_array_equal(made, [2.0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_covers_every_parameter(name):
    params = {"bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "fc": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = optim.optimizer(name, weight_decay=0.1)
    (made,) = steps(optimizer, params, [zeros])
    assert all((x < 1).all() for x in jax.tree.leaves(made))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_step_like_torch(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=20).astype(np.float32)
    gradients = rng.normal(size=(8, 20)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    makers = {
        "sgd": lambda: torch.optim.SGD(
            [weight], lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.05
        ),
        "adamw": lambda: torch.optim.AdamW(
            [weight], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05
        ),
    }
    theirs = makers[name]()
    expected = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        theirs.step()
        expected.append(weight.detach().numpy().copy())
    optimizer = optim.optimizer(name, weight_decay=0.05)
    made = steps(optimizer, jnp.asarray(start), jnp.asarray(gradients))
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_unknown_optimizer_and_negative_decay_are_refused():
    with pytest.raises(UserError, match="'lion'.*sgd, adamw, adam"):
        optim.optimizer("lion", weight_decay=0.0)
    with pytest.raises(UserError, match="weight_decay is -1"):
        optim.optimizer("sgd", weight_decay=-1.0)


def rates(name, at, **options):
    schedule = optim.schedule(name, peak=1.0, **options)
    return [float(schedule(jnp.int32(step))) for step in at]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {"num_steps": 10}, {0: 1.0, 9: 1.0, 99: 1.0}),
        (
            "constant",
            {"num_steps": 10, "warmup_steps": 3},
            {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 9: 1.0},
        ),
        ("cosine", {"num_steps": 12}, {0: 1.0, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0.0}),
        (
            "cosine",
            {"num_steps": 12, "warmup_steps": 4},
            {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.5, 12: 0.0},
        ),
        ("cosine", {"num_steps": 4, "warmup_steps": 4}, {3: 0.8, 4: 1.0, 5: 0.0}),
        (
            "step",
            {"num_steps": 20},
            {0: 1.0, 9: 1.0, 10: 0.1, 14: 0.1, 15: 0.01, 20: 0.01},
        ),
        (
            "step",
            {"num_steps": 20, "warmup_steps": 4, "decay_at": (0.5,)},
            {0: 0.2, 4: 1.0, 9: 1.0, 10: 0.1},
        ),
        ("step", {"num_steps": 4, "decay_factor": 0.5}, {1: 1.0, 2: 0.5, 3: 0.25}),
    ],
)
def test_learning_rates_are_worked_by_hand(name, options, expected):
    found = rates(name, expected, **options)
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 30])
def test_cosine_never_rises_after_its_warmup(warmup_steps):
    found = rates("cosine", range(100), num_steps=100, warmup_steps=warmup_steps)
    assert (np.diff(found[warmup_steps:]) <= 1e-7).all()
    assert (np.diff(found[: warmup_steps + 1]) > 0).all()


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "decay_at"),
    [(100, 60, (0.3, 0.5)), (3, 0, (0.5, 0.75))],
)
def test_decays_that_fall_on_one_step_all_count(num_steps, warmup_steps, decay_at):
    last = rates(
        "step",
        [num_steps],
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay_at=decay_at,
    )
    np.testing.assert_allclose(last, [0.01], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {}, "'linear'.*constant, cosine, step"),
        ("cosine", {"warmup_steps": 11}, "warmup_steps is 11"),
        ("cosine", {"warmup_steps": -1}, "warmup_steps is -1"),
        ("step", {"decay_at": (0.5, 1.0)}, "decay_at"),
    ],
)
def test_impossible_schedule_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        optim.schedule(name, peak=0.1, num_steps=10, **options)


def test_first_average_copies():
    value = {"w": jnp.asarray([1.0, -2.0])}
    average = optim.average({"w": jnp.full(2, jnp.nan)}, value, jnp.int32(0))
    np.testing.assert_array_equal(average["w"], value["w"])


def test_average_moves_by_the_warmed_up_decay():
    # d = 2/11 and 3/12: 1 -> 1 * 2/11 + 3 * 9/11 = 29/11; then 29/44 + 5 * 3/4.
    average = jnp.float32(1.0)
    average = optim.average(average, jnp.float32(3.0), jnp.int32(1))
    np.testing.assert_allclose(average, 29 / 11, rtol=1e-6)
    average = optim.average(average, jnp.float32(5.0), jnp.int32(2))
    np.testing.assert_allclose(average, 29 / 44 + 15 / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "limit", "decay"),
    [(10**6, 0.999, 0.999), (8990, 0.999, 0.999), (89, 0.5, 0.5), (80, 0.9, 0.9)],
)
def test_decay_is_clamped(count, limit, decay):
    average = optim.average(jnp.float32(0.0), jnp.float32(1.0), jnp.int32(count), limit)
    np.testing.assert_allclose(average, 1 - decay, rtol=1e-3)


def test_average_of_a_constant_stays_bit_by_bit():
    values = jnp.asarray(np.random.default_rng(0).random(50, np.float32))
    average = jnp.zeros(50)
    for count in range(12):
        average = optim.average(average, values, jnp.int32(count))
    np.testing.assert_array_equal(average, values)
