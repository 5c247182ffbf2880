"""The loop and its rules on a quadratic score, whose best image is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import UserError, ascent, attacks, editing, hlo, recipes, sharding

SHAPE = (4, 5, 3)
BEST = 0.25


def score(x):
    return -jnp.square(x - BEST).sum(axis=(1, 2, 3))


@functools.cache
def seeds_and_keys(count=6):
    return jax.jit(_seeds_and_keys, static_argnums=0)(count)


def _seeds_and_keys(count):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(
        jnp.arange(count)
    )
    return jax.vmap(lambda k: jax.random.uniform(k, SHAPE))(keys), keys


@functools.cache
def compiled(name, project):
    """One program a rule, for all numbers and lengths of steps."""
    return jax.jit(
        lambda seeds, keys, options: ascent.climb(
            score, seeds, ascent.rule(name), keys=keys, project=project, **options
        )
    )


def draw(name, count=6, project=ascent.clip, **options):
    seeds, keys = seeds_and_keys(count)
    arguments = {"step_size": 0.05, "num_steps": 60} | options
    return compiled(name, project)(seeds, keys, arguments)


@pytest.mark.parametrize("name", ascent.RULES)
def test_every_rule_raises_the_score_and_stays_in_range(name):
    seeds, _ = seeds_and_keys()
    images = draw(name)
    assert (score(images) > score(seeds)).all()
    assert images.min() >= 0 and images.max() <= 1
    np.testing.assert_array_equal(draw(name, num_steps=0), seeds)


def test_pgd_is_the_attack_without_a_ball():
    seeds, _ = seeds_and_keys()
    expected = attacks.attack(
        score, seeds, attacks.unbounded(), step_size=0.05, num_steps=7
    )
    np.testing.assert_array_equal(draw("pgd", num_steps=7), expected)


def test_one_step_has_the_length_of_the_step():
    seeds, _ = seeds_and_keys()
    for name in ("pgd", "momentum", "adam"):
        delta = draw(name, num_steps=1, step_size=1e-3) - seeds
        lengths = np.sqrt(np.square(delta).sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(lengths, 1e-3, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ascent.RULES)
def test_image_does_not_depend_on_its_batch(name):
    np.testing.assert_array_equal(draw(name, count=2), draw(name, count=6)[:2])


def test_noise_is_new_in_every_step_and_for_every_image():
    sgld = ascent.rule("sgld(noise=0.1)")
    _, keys = seeds_and_keys(2)
    grey = jnp.full((2, *SHAPE), 0.5)
    flat = lambda x: jnp.zeros(2) * x.sum()
    one, two = (
        ascent.climb(flat, grey, sgld, keys=keys, step_size=1.0, num_steps=n)
        for n in (1, 2)
    )
    assert not np.allclose(one[0], one[1])
    assert not np.allclose(two - one, one - grey, atol=1e-3)
    assert np.std(one - grey) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("name", ascent.RULES)
def test_images_stop_one_by_one_at_the_target(name):
    seeds, keys = seeds_and_keys()
    target = float(jnp.median(score(seeds)))
    stopped = jax.jit(
        lambda seeds, keys: ascent.climb_through(
            score,
            seeds,
            ascent.rule(name),
            keys=keys,
            step_size=0.05,
            ends=jnp.array([60], jnp.int32),
            target=target,
        )
    )(seeds, keys)[0]
    there = score(seeds) >= target
    np.testing.assert_array_equal(stopped[there], seeds[there])
    assert (score(stopped[~there]) >= target).all()
    assert not np.array_equal(stopped[~there], draw(name)[~there])


def test_trace_reads_the_images_of_the_climb():
    name = "sgld"
    seeds, keys = seeds_and_keys()
    images, scores = editing.trace(
        lambda x: (score(x), score(x)),
        seeds,
        ascent.rule(name),
        capacity=5,
        keys=keys,
        step_size=0.05,
        num_steps=4,
        schedule=ascent.SCHEDULES["constant"],
        project=ascent.clip,
    )
    assert scores.shape == (6, 6) and not scores[5].any()
    np.testing.assert_array_equal(images, draw(name, num_steps=4))
    for steps in (0, 2, 4):
        made = draw(name, num_steps=steps)
        np.testing.assert_allclose(scores[steps], score(made), rtol=1e-6)


def test_signed_steps_move_every_pixel_by_the_step():
    seeds, _ = seeds_and_keys()
    moved = draw("sign", num_steps=1, step_size=0.001) - seeds
    expected = 0.001 * np.sign(BEST - np.asarray(seeds))
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-7)


def test_each_image_may_have_its_own_step_size():
    sizes = jnp.linspace(0.01, 0.06, 6)
    together = draw("momentum", num_steps=3, step_size=sizes[:, None, None, None])
    alone = draw("momentum", num_steps=3, step_size=float(sizes[4]))
    np.testing.assert_allclose(together[4], alone[4], rtol=1e-6)


def test_schedules_fall_from_one():
    steps = jnp.arange(10, dtype=jnp.int32)
    for name, schedule in ascent.SCHEDULES.items():
        values = np.asarray([schedule(s, jnp.int32(10)) for s in steps])
        assert values[0] == 1 and (values > 0).all(), name
        assert (np.diff(values) <= 0).all(), name
    half = ascent.SCHEDULES["cosine"](jnp.int32(5), jnp.int32(10))
    assert half == pytest.approx(0.5)


def test_constraint_holds_after_every_step():
    known = jnp.zeros((1, *SHAPE)).at[:, :2].set(1.0)

    def project(x):
        return jnp.where(known > 0, 0.9, jnp.clip(x, 0.0, 1.0))

    seeds, _ = seeds_and_keys()
    images = draw("adam", project=project)
    np.testing.assert_array_equal(images[:, :2], np.float32(0.9))
    assert (score(images[:, 2:]) > score(seeds[:, 2:])).all()


@pytest.mark.parametrize("name", ascent.RULES)
def test_devices_have_nothing_to_say_to_each_other(name):
    split = sharding.batched(sharding.make_mesh())
    seeds, keys = (jax.device_put(x, split) for x in seeds_and_keys(16))

    def sample(seeds, keys, number):
        return ascent.climb_through(
            score,
            seeds,
            ascent.rule(name),
            keys=keys,
            step_size=0.05,
            ends=number[None],
            target=-0.1,
        )

    compiled = reference.compiled(jax.jit(sample).lower(seeds, keys, jnp.int32(3)))
    program = reference.Program(compiled.as_text())
    assert program.loop_bodies() and not hlo.collectives(program.everything())


def test_rules_batch_under_vmap():
    seeds, keys = seeds_and_keys(6)
    adam = ascent.rule("adam")

    def one(seed, key):
        return ascent.climb(
            score, seed[None], adam, keys=key[None], step_size=0.05, num_steps=5
        )[0]

    together = ascent.climb(score, seeds, adam, keys=keys, step_size=0.05, num_steps=5)
    np.testing.assert_allclose(jax.vmap(one)(seeds, keys), together, atol=1e-6)


@pytest.mark.parametrize("name", ascent.RULES)
def test_ascent_in_parts_is_one_ascent(name):
    """Momentum and noise go on: nothing begins anew between the parts."""
    seeds, keys = seeds_and_keys()
    rule = ascent.rule(name)
    ends = jnp.array([0, 3, 3, 7], jnp.int32)
    shown = ascent.climb_through(
        score, seeds, rule, keys=keys, ends=ends, step_size=0.05
    )
    np.testing.assert_array_equal(shown[0], seeds)
    np.testing.assert_array_equal(shown[1], draw(name, num_steps=3))
    np.testing.assert_array_equal(shown[2], shown[1])
    np.testing.assert_array_equal(shown[3], draw(name, num_steps=7))


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("pgd", "pgd"),
        ("sign()", "sign"),
        ("sgld", "sgld(noise=0.01)"),
        (" sgld( noise = 5e-3 ) ", "sgld(noise=0.005)"),
        ("sgld(noise=0)", "sgld(noise=0.0)"),
        ("momentum", "momentum(decay=0.9)"),
        ("adam(beta2=0.99)", "adam(beta1=0.9,beta2=0.99)"),
        ("adam(beta2=0.99,beta1=0.5)", "adam(beta1=0.5,beta2=0.99)"),
    ],
)
def test_rule_is_written_with_all_of_its_settings(text, resolved):
    assert recipes.resolved(text) == resolved
    assert recipes.resolved(resolved) == resolved


def test_settings_in_the_text_are_those_of_the_rule():
    written, given = draw("sgld(noise=0.2)"), ascent.sgld(noise=0.2)
    seeds, keys = seeds_and_keys()
    options = {"step_size": 0.05, "num_steps": 60}
    made = ascent.climb(score, seeds, given, keys=keys, **options)
    np.testing.assert_array_equal(written, made)
    assert not np.allclose(written, draw("sgld"), atol=0.05)


def test_rule_is_one_function_and_its_name(monkeypatch):
    def half(share: float = 0.5) -> ascent.Rule:
        return ascent.along(lambda v: share * ascent.unit(v))

    monkeypatch.setitem(ascent.RULES, "half", half)
    assert recipes.resolved("half") == "half(share=0.5)"
    with pytest.raises(UserError, match=r"sign, half\(share=0.5\)[.]"):
        ascent.rule("quarter")
    seeds, _ = seeds_and_keys()
    moved = draw("half(share=0.25)", num_steps=1, step_size=1e-3) - seeds
    np.testing.assert_allclose(ascent.l2_norm(moved).ravel(), 2.5e-4, rtol=1e-2)


def test_length_of_a_step_is_known_where_gradients_do_not_decide_it():
    for name in ("pgd", "momentum(decay=0.5)", "adam"):
        assert recipes.step_length(name, 0.3) == 0.3
    assert recipes.step_length("sgld(noise=0)", 0.3) == np.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hmc", r"unknown sampler 'hmc'.*momentum\(decay=0.9\).*sgld\(noise=0.01\)"),
        ("sgld(noise=0.1", r"unknown sampler 'sgld\(noise=0.1': choose one of pgd"),
        ("", "unknown sampler ''"),
        (None, "unknown sampler None"),
        ("sgld(step=1)", r"sgld has no setting 'step'; write sgld\(noise=0.01\)"),
        ("sgld(0.005)", r"no setting '0.005'; write sgld\(noise=0.01\)"),
        ("sgld(noise=high)", "noise is 'high', which is no number; write sgld"),
        ("sgld(noise=)", "noise is '', which is no number"),
        ("sgld(noise=1,noise=2)", "noise is given twice"),
        ("sgld(noise=0.1,)", "sgld has no setting ''"),
        ("pgd(decay=0.9)", "pgd has no setting 'decay'; write pgd[.]"),
        ("sgld(noise=-0.1)", "noise is -0.1: it must be finite and not negative"),
        ("sgld(noise=nan)", "noise is nan: it must be finite"),
        ("sgld(noise=1e39)", "finite and not negative, in float32"),
        ("sgld(noise=inf)", "finite and not negative"),
        ("momentum(decay=1)", r"decay is 1.0: it must lie in \[0, 1\)"),
        ("adam(beta1=1)", r"beta1=1.0, .*expected numbers in \[0, 1\)"),
        # One in float32, where the correction of Adam's start would be a zero.
        ("adam(beta2=0.999999999)", r"beta2=0.999999999: expected numbers in \[0, 1\)"),
    ],
)
def test_text_that_is_no_rule_gets_one_clear_sentence(text, message):
    for read in (ascent.rule, recipes.resolved):
        with pytest.raises(UserError, match=message):
            read(text)
