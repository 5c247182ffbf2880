"""The ensemble on small linear classifiers: its edges, its order, its resumption."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError, autoattack, sharding
from atebm_jax.autoattack import ensemble, units, versions

# Results do not depend on batches, which `test_batches_do_not_matter` looks at.
pytestmark = pytest.mark.usefixtures("one_program_an_attack")

QUICK = {"num_steps": 6, "num_queries": 12, "targets": 2, "fab_targets": 2}
# Where the notes of a run are the point.
ONE = {"version": "custom", "attacks": ("apgd-ce",)}
SHAPE = (4, 4, 3)


def linear(num_classes, scale=1.0):
    """A linear classifier of images, and images whose labels it mostly gets right."""
    rng = np.random.default_rng(num_classes)
    weights = rng.normal(size=(np.prod(SHAPE), num_classes)).astype(np.float32)
    images = rng.uniform(size=(21, *SHAPE)).astype(np.float32)
    logits = (images.reshape(21, -1) - 0.5) @ weights
    labels = logits.argmax(axis=1).astype(np.int32)
    labels[::7] = (labels[::7] + 1) % num_classes

    def logits_fn(x):
        flat = x.reshape(x.shape[0], -1) - 0.5
        return scale * jnp.dot(flat, jnp.asarray(weights), precision="highest")

    return logits_fn, images, labels


def run(logits_fn, images, labels, **options):
    arguments = {"threat": ("l2", 0.3), "settings": QUICK, "batch_size": 8} | options
    return autoattack.run(jax.random.key(0), logits_fn, images, labels, **arguments)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_classes_have_fewer_targets_and_a_plain_margin(num_classes):
    logits_fn, images, labels = linear(num_classes)
    settings = QUICK | {"targets": 9, "fab_targets": 9}
    result = run(logits_fn, images, labels, settings=settings)
    text = " ".join(result.notes)
    assert f"apgd-t has {num_classes - 1} instead of 9 target classes" in text
    assert ("apgd-t ascends the plain margin" in text) == (num_classes < 4)
    assert result.clean.sum() == (18 if num_classes > 1 else 0)
    assert 0 < result.robust_accuracy < result.clean_accuracy


@pytest.mark.parametrize(
    ("version", "norm", "num_classes", "title"),
    [
        ("standard", "l2", 10, "AutoAttack standard"),
        ("standard", "linf", 2, "AutoAttack standard"),
        ("standard", "l1", 10, "apgd-ce, apgd-t"),
        ("plus", "l1", 10, "apgd-ce, apgd-dlr, apgd-t"),
        ("rand", "l1", 10, "AutoAttack rand"),
        ("standard", "l2", 1, "no attack"),
    ],
)
def test_plan_is_called_by_what_runs(version, norm, num_classes, title):
    plan = versions.plan(version, (norm, 1.0), num_classes)
    assert plan.title == title


def test_chosen_attacks_are_called_by_their_names():
    chosen = ("square", "apgd-ce")
    plan = versions.plan("custom", ("linf", 0.1), 10, names=chosen)
    assert plan.title == "square, apgd-ce" and plan.attacks == chosen


def test_settings_of_attacks_that_do_not_run_are_not_told():
    l1 = versions.plan("standard", ("l1", 1.0), 10)
    assert l1.settings_in_use() == {
        "num_steps": 100,
        "apgd_restarts": 5,
        "targets": 5,
        "gradient_samples": 1,
        "wide_ball": True,
    }
    l2 = versions.plan("standard", ("l2", 1.0), 10).settings_in_use()
    assert l2["num_queries"] == 5000 and l2["fab_targets"] == 9
    assert "wide_ball" not in l2 and "fab_restarts" not in l2


def test_one_class_is_always_robust():
    labels = np.zeros(5, np.int32)
    _, images, _ = linear(2)
    result = run(lambda x: x.sum(axis=(1, 2, 3))[:, None], images[:5], labels)
    assert result.robust_accuracy == result.clean_accuracy == 1.0


@pytest.mark.parametrize(
    "threat", [("linf", 0.04), ("l2", 0.3), ("l1", 1.5)], ids=lambda t: t[0]
)
def test_adversarial_images_lie_in_the_ball_and_are_misclassified(threat):
    logits_fn, images, labels = linear(5)
    norm, epsilon = threat
    names = ("apgd-ce", "apgd-t") if norm == "l1" else tuple(versions.ATTACKS)
    result = run(
        logits_fn, images, labels, threat=threat, version="custom", attacks=names
    )
    delta = (result.adversarial - images).reshape(len(images), -1)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    assert np.linalg.norm(delta, order, axis=1).max() <= epsilon * (1 + 1e-5)
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    robust = result.robust[names[-1]]
    lost = result.clean & ~robust
    assert lost.any()
    wrong = np.asarray(logits_fn(result.adversarial)).argmax(axis=1) != labels
    np.testing.assert_array_equal(wrong[result.clean], lost[result.clean])
    np.testing.assert_array_equal(result.adversarial[robust], images[robust])


def test_robust_accuracy_falls_from_attack_to_attack():
    logits_fn, images, labels = linear(6)
    result = run(logits_fn, images, labels)
    before = result.clean
    for mask in result.robust.values():
        assert not (mask & ~before).any()
        before = mask


def test_linear_classifier_is_broken_exactly_where_its_boundary_is_near():
    logits_fn, images, _ = linear(2)
    weights = np.asarray(jax.jacobian(lambda x: logits_fn(x[None])[0])(images[0]))
    logits = np.asarray(logits_fn(images))
    gap = np.abs(logits[:, 0] - logits[:, 1])
    reach = gap / np.linalg.norm(weights[0] - weights[1])
    epsilon = float(np.median(reach))
    # Away from the edges of [0, 1], where the nearest point may be out of reach.
    middle = images * 0.2 + 0.4
    reach = 0.2 * reach
    result = run(
        logits_fn,
        middle,
        logits.argmax(axis=1).astype(np.int32),
        threat=("l2", 0.2 * epsilon),
        settings=QUICK | {"num_steps": 20},
    )
    sure = np.abs(reach / (0.2 * epsilon) - 1) > 0.01
    robust = list(result.robust.values())[-1]
    np.testing.assert_array_equal(robust[sure], (reach > 0.2 * epsilon)[sure])


def test_radius_zero_leaves_the_clean_accuracy():
    logits_fn, images, labels = linear(3)
    result = run(logits_fn, images, labels, threat=("linf", 0.0))
    assert result.robust_accuracy == result.clean_accuracy < 1


def test_images_wrong_from_the_start_are_not_attacked():
    logits_fn, images, _ = linear(4)
    wrong = np.asarray(logits_fn(images)).argmin(axis=1).astype(np.int32)
    seen = []
    result = run(logits_fn, images, wrong, on_unit=seen.append)
    assert {unit.attack for unit in seen} == {"clean"}
    assert result.clean_accuracy == result.robust_accuracy == 0.0
    np.testing.assert_array_equal(result.adversarial, images)


def test_constant_logits_are_told_by_their_zero_gradient():
    _, images, labels = linear(4)
    labels = np.zeros_like(labels)
    result = run(
        lambda x: jnp.zeros((x.shape[0], 4)) + jnp.asarray([[1.0, 0, 0, 0]]),
        images,
        labels,
    )
    assert result.robust_accuracy == 1.0
    assert any("zero gradient" in note for note in result.notes)


def test_saturated_softmax_is_told():
    logits_fn, images, labels = linear(4)
    result = run(lambda x: jax.nn.softmax(logits_fn(x) * 50), images, labels, **ONE)
    assert any("probabilities, not logits" in note for note in result.notes)


def test_randomised_networks_are_told_and_have_a_version():
    logits_fn, images, labels = linear(4)

    def noisy(x, key):
        return logits_fn(x) + 0.5 * jax.random.normal(key, (x.shape[0], 4))

    custom = run(noisy, images, labels, stochastic=True, **ONE)
    assert any("randomised" in note for note in custom.notes)
    rand = run(noisy, images, labels, stochastic=True, version="rand")
    assert list(rand.robust) == ["apgd-ce", "apgd-dlr"] and not rand.notes
    fixed = run(logits_fn, images, labels, version="rand")
    assert any("this one is not" in note for note in fixed.notes)


def test_plus_runs_six_attacks():
    logits_fn, images, labels = linear(4)
    result = run(logits_fn, images, labels, version="plus")
    assert len(result.robust) == 6


@pytest.fixture(scope="module")
def whole():
    return run(*linear(5))


@pytest.mark.parametrize(("batch_size", "parts"), [(5, (1, 2, 4, 8)), (64, (1,))])
def test_batches_do_not_matter(whole, batch_size, parts, monkeypatch):
    monkeypatch.setattr(ensemble, "_PARTS", parts)
    logits_fn, images, labels = linear(5)
    one = whole
    other = run(logits_fn, images, labels, batch_size=batch_size)
    for name, mask in one.robust.items():
        np.testing.assert_array_equal(other.robust[name], mask)
    np.testing.assert_allclose(other.adversarial, one.adversarial, atol=1e-5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 9])
def test_stopped_run_goes_on_to_the_same_result(whole, after):
    logits_fn, images, labels = linear(5)
    kept = []

    def keep(unit):
        kept.append(unit)
        if len(kept) == after:
            raise Stopped

    with pytest.raises(Stopped):
        run(logits_fn, images, labels, on_unit=keep)
    new = []
    again = run(logits_fn, images, labels, done=kept, on_unit=new.append)
    assert len(kept) == after and new
    for name, mask in whole.robust.items():
        np.testing.assert_array_equal(again.robust[name], mask)
    np.testing.assert_array_equal(again.adversarial, whole.adversarial)


def test_units_of_another_run_are_refused():
    logits_fn, images, labels = linear(5)
    kept = []
    run(logits_fn, images, labels, on_unit=kept.append)
    with pytest.raises(UserError, match="not of this run"):
        run(logits_fn, images[:9], labels[:9], done=kept)


def test_sharded_batches_give_the_same_result(whole):
    logits_fn, images, labels = linear(5)
    target = sharding.batched(sharding.make_mesh())
    one = whole
    eight = run(logits_fn, images, labels, sharding=target)
    for name, mask in one.robust.items():
        np.testing.assert_array_equal(eight.robust[name], mask)
    np.testing.assert_allclose(eight.adversarial, one.adversarial, atol=1e-5)


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_devices_have_nothing_to_say_to_each_other(attack):
    logits_fn, images, labels = linear(5)
    mesh = sharding.make_mesh()
    split, whole = sharding.batched(mesh), sharding.replicated(mesh)
    plan = versions.plan("custom", ("l2", 0.3), 5, names=(attack,), settings=QUICK)
    function = units.attack_function(attack, plan, lambda x, key: logits_fn(x))
    batch = units.Batch(
        *(
            jax.device_put(jnp.asarray(values[:16]), split)
            for values in (images, labels, np.arange(21, dtype=np.int32))
        ),
        *jax.device_put((jnp.int32(1), jax.random.key(0)), whole),
    )
    program = hlo.Program(jax.jit(function).lower(batch).compile().as_text())
    assert program.loop_bodies()
    assert not hlo.collectives(program.everything())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threat": ("l2", -1.0)}, "-1"),
        ({"threat": ("l3", 1.0)}, "l3"),
        ({"version": "best"}, "best"),
        ({"version": "custom"}, "needs a list"),
        ({"version": "custom", "attacks": ("apgd",)}, "unknown attack 'apgd'"),
        ({"attacks": ("fab",)}, "use version 'custom'"),
        ({"settings": {"steps": 3}}, "unknown setting 'steps'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    logits_fn, images, labels = linear(4)
    with pytest.raises(UserError, match=message):
        run(logits_fn, images, labels, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: ((x * 255).astype(np.uint8), y), "divide bytes by 255"),
        (lambda x, y: (x * 255, y), r"\[0, 1\]"),
        (lambda x, y: (x, y + 4), "classes"),
        (lambda x, y: (x, y[:-1]), "labels"),
    ],
)
def test_data_that_does_not_fit_is_refused(change, message):
    logits_fn, images, labels = linear(4)
    with pytest.raises(UserError, match=message):
        run(logits_fn, *change(images, labels))
