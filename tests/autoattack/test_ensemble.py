"""The ensemble on small linear classifiers: its edges, its order, its resumption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.tree_util import Partial

from atebm_jax import UserError, autoattack, hlo, losses, sharding
from atebm_jax.autoattack import checks, ensemble, objectives, programs, versions

# Results do not depend on batches, which `test_batches_do_not_matter` looks at.
pytestmark = pytest.mark.usefixtures("one_program_an_attack")

QUICK = {"num_steps": 6, "num_queries": 12, "targets": 2, "fab_targets": 2}
SHAPE = (4, 4, 3)


def classify(weights, bias, x):
    flat = x.reshape(x.shape[0], -1) - 0.5
    return jnp.dot(flat, weights, precision="highest") + bias[None]


def linear(num_classes):
    """A linear classifier of images, and images whose labels it mostly gets right.

    Its weights are arguments: classifiers of as many classes share their programs.
    """
    rng = np.random.default_rng(num_classes)
    weights = rng.normal(size=(np.prod(SHAPE), num_classes)).astype(np.float32)
    images = rng.uniform(size=(21, *SHAPE)).astype(np.float32)
    logits_fn = Partial(classify, weights, np.zeros(num_classes, np.float32))
    labels = np.asarray(logits_fn(images)).argmax(axis=1).astype(np.int32)
    labels[::7] = (labels[::7] + 1) % num_classes
    return logits_fn, images, labels


def run(logits_fn, images, labels, **options):
    arguments = {"threat": ("l2", 0.3), "settings": QUICK, "batch_size": 8} | options
    return autoattack.run(jax.random.key(0), logits_fn, images, labels, **arguments)


def chosen(*names):
    return {"version": "custom", "attacks": names}


@pytest.fixture(scope="module")
def whole():
    """The standard version, of which every program is compiled once."""
    return run(*linear(5))


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_classes_have_fewer_targets_and_a_plain_margin(num_classes):
    plan = versions.plan("plus", ("l2", 0.3), num_classes)
    text = " ".join(plan.notes)
    for name in ("apgd-t", "fab-t"):
        assert f"{name} has {num_classes - 1} instead of 9 target classes" in text
        numbers = [round_.number for round_ in plan.rounds if round_.attack == name]
        assert numbers == list(range(1, num_classes))
    assert ("apgd-t ascends the plain margin" in text) == (num_classes < 4)
    assert ("apgd-dlr ascends the plain margin" in text) == (num_classes < 3)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, num_classes)))
    labels, targets = jnp.zeros(6, jnp.int32), jnp.ones(6, jnp.int32)
    for needed, classes, dlr, margin in (
        (3, (labels,), objectives.dlr, objectives.margin),
        (4, (labels, targets), objectives.dlr_targeted, objectives.targeted_margin),
    ):
        ascended = objectives.loss("dlr", logits, *(*classes, None)[:2])
        expected = margin if num_classes < needed else dlr
        np.testing.assert_array_equal(ascended, expected(logits, *classes))
    cross_entropy = losses.cross_entropy(logits, labels)
    ascended = objectives.loss("ce", logits, labels, None)
    np.testing.assert_array_equal(ascended, cross_entropy)


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
    names = ("square", "apgd-ce")
    plan = versions.plan("custom", ("linf", 0.1), 10, names=names)
    assert plan.title == "square, apgd-ce" and plan.attacks == names


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
    none = versions.plan("standard", ("l2", 0.0), 10)
    assert none.settings_in_use() == {}


def test_one_class_is_always_robust():
    labels = np.zeros(5, np.int32)
    _, images, _ = linear(2)
    result = run(lambda x: x.sum(axis=(1, 2, 3))[:, None], images[:5], labels)
    assert result.robust_accuracy == result.clean_accuracy == 1.0


@pytest.mark.parametrize(
    ("threat", "names"),
    [
        (("linf", 0.04), ("apgd-ce", "fab", "fab-t", "square")),
        (("l2", 0.3), ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")),
        (("l1", 1.5), ("apgd-ce", "apgd-t")),
    ],
    ids=lambda value: value[0],
)
def test_adversarial_images_lie_in_the_ball_and_are_misclassified(threat, names):
    logits_fn, images, labels = linear(5)
    norm, epsilon = threat
    result = run(logits_fn, images, labels, threat=threat, **chosen(*names))
    assert tuple(result.robust) == names
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


def test_robust_accuracy_falls_from_attack_to_attack(whole):
    before = whole.clean
    assert list(whole.robust) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for mask in whole.robust.values():
        assert not (mask & ~before).any()
        before = mask
    assert 0 < whole.robust_accuracy < whole.clean_accuracy == 18 / 21


def test_linear_classifier_is_broken_exactly_where_its_boundary_is_near():
    logits_fn, images, _ = linear(2)
    weights, _ = logits_fn.args
    logits = np.asarray(logits_fn(images))
    gap = np.abs(logits[:, 0] - logits[:, 1])
    reach = gap / np.linalg.norm(weights[:, 0] - weights[:, 1])
    epsilon = float(np.median(reach))
    # Away from the edges of [0, 1], where the nearest point may be out of reach.
    middle = images * 0.2 + 0.4
    reach = 0.2 * reach
    # With two classes, both kinds of APGD ascend the plain margin.
    result = run(
        logits_fn,
        middle,
        logits.argmax(axis=1).astype(np.int32),
        threat=("l2", 0.2 * epsilon),
        settings=QUICK | {"num_steps": 20},
        **chosen("apgd-t", "fab-t"),
    )
    sure = np.abs(reach / (0.2 * epsilon) - 1) > 0.01
    for robust in result.robust.values():
        np.testing.assert_array_equal(robust[sure], (reach > 0.2 * epsilon)[sure])


def test_radius_zero_leaves_the_clean_accuracy():
    logits_fn, images, labels = linear(5)
    result = run(logits_fn, images, labels, threat=("linf", 0.0))
    assert result.robust_accuracy == result.clean_accuracy < 1


def test_images_wrong_from_the_start_are_not_attacked():
    logits_fn, images, _ = linear(5)
    wrong = np.asarray(logits_fn(images)).argmin(axis=1).astype(np.int32)
    seen = []
    result = run(logits_fn, images, wrong, on_unit=seen.append)
    assert {unit.attack for unit in seen} == {"clean"}
    assert result.clean_accuracy == result.robust_accuracy == 0.0
    np.testing.assert_array_equal(result.adversarial, images)


def test_constant_logits_are_told_by_their_zero_gradient():
    logits_fn, images, labels = linear(5)
    weights, bias = logits_fn.args
    constant = Partial(classify, 0 * weights, bias + np.eye(5, dtype=np.float32)[0])
    result = run(constant, images, np.zeros_like(labels))
    assert result.robust_accuracy == 1.0
    assert any("zero gradient" in note for note in result.notes)


def test_outputs_that_make_figures_doubtful_are_told():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    flat = np.zeros(6, bool)

    def told(one, other, version="standard", stochastic=False):
        return " ".join(
            checks.before(programs.Probe(one, other, flat), version, stochastic)
        )

    assert told(logits, logits) == ""
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert "probabilities, not logits" in told(softmax, softmax)
    assert "Use version 'rand'" in told(logits, logits + 1, stochastic=True)
    assert told(logits, logits + 1, "rand", stochastic=True) == ""
    assert "this one is not" in told(logits, logits, "rand")
    logits[0, 0] = np.nan
    assert "not finite" in told(logits, logits)


def test_square_that_finds_more_than_gradients_do_is_told():
    standing, fewer = np.ones(5, bool), np.arange(5) > 1
    assert not checks.after({"square": fewer})
    assert not checks.after({"apgd-ce": fewer, "square": fewer})
    (note,) = checks.after({"apgd-ce": standing, "square": fewer})
    assert "fooled 2 images" in note


def test_randomised_networks_have_a_version():
    logits_fn, images, labels = linear(5)

    def noisy(x, key):
        return logits_fn(x) + 0.5 * jax.random.normal(key, (x.shape[0], 5))

    result = run(noisy, images, labels, stochastic=True, version="rand")
    assert list(result.robust) == ["apgd-ce", "apgd-dlr"] and not result.notes
    assert result.robust_accuracy < result.clean_accuracy


def test_plus_runs_six_attacks():
    logits_fn, images, labels = linear(5)
    result = run(logits_fn, images, labels, version="plus")
    assert len(result.robust) == 6


def test_programs_do_not_grow_with_images_rounds_radii_and_weights(whole):
    """Nor are weights constants in them: those of another network are arguments."""
    logits_fn, images, labels = linear(5)
    before = programs.attack._cache_size(), programs.probe._cache_size()
    other = Partial(classify, *(x + 0.01 for x in logits_fn.args))
    for number, settings in ((3, QUICK), (21, QUICK | {"targets": 4})):
        run(
            other,
            images[:number],
            labels[:number],
            threat=("l2", 0.1 * number),
            settings=settings,
        )
    assert (programs.attack._cache_size(), programs.probe._cache_size()) == before


@pytest.mark.parametrize(("batch_size", "parts"), [(5, (1, 2)), (64, (1,))])
def test_batches_do_not_matter(whole, batch_size, parts, monkeypatch):
    monkeypatch.setattr(ensemble, "_PARTS", parts)
    logits_fn, images, labels = linear(5)
    other = run(logits_fn, images, labels, batch_size=batch_size)
    for name, mask in whole.robust.items():
        np.testing.assert_array_equal(other.robust[name], mask)
    np.testing.assert_allclose(other.adversarial, whole.adversarial, atol=1e-5)


def test_last_batch_is_filled_up_to_a_part(monkeypatch):
    monkeypatch.setattr(ensemble, "_PARTS", (1, 2, 4, 8))
    sizes = ensemble._sizes(10, None)
    assert sizes == (10, 5, 3, 2)
    batches = list(ensemble._batches(np.arange(24), sizes))
    assert [(len(indices), size) for indices, size in batches] == [
        (10, 10),
        (10, 10),
        (4, 5),
    ]
    assert ensemble._sizes(10, sharding.batched(sharding.make_mesh())) == (16, 8)


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
    new, shown = [], []
    again = run(
        logits_fn,
        images,
        labels,
        done=kept,
        on_unit=new.append,
        on_progress=shown.append,
    )
    assert len(kept) == after and new
    for name, mask in whole.robust.items():
        np.testing.assert_array_equal(again.robust[name], mask)
    np.testing.assert_array_equal(again.adversarial, whole.adversarial)
    # Units of the earlier run are shown too.
    assert len(shown) == after + len(new)
    assert shown[0][:5] == ("clean", 0, 0, 7, 8) and shown[0].of == 21
    assert shown[-1].robust == round(21 * whole.robust_accuracy)


def test_units_of_another_run_are_refused():
    logits_fn, images, labels = linear(5)
    kept = []
    run(logits_fn, images, labels, on_unit=kept.append)
    with pytest.raises(UserError, match="not of this run"):
        run(logits_fn, images[:9], labels[:9], done=kept)


def test_sharded_batches_give_the_same_result(whole):
    logits_fn, images, labels = linear(5)
    target = sharding.batched(sharding.make_mesh())
    eight = run(logits_fn, images, labels, sharding=target)
    for name, mask in whole.robust.items():
        np.testing.assert_array_equal(eight.robust[name], mask)
    np.testing.assert_allclose(eight.adversarial, whole.adversarial, atol=1e-5)


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_devices_have_nothing_to_say_to_each_other(attack):
    logits_fn, images, labels = linear(5)
    target = sharding.batched(sharding.make_mesh())
    plan = versions.plan("custom", ("l2", 0.3), 5, names=(attack,), settings=QUICK)
    network, key = ensemble._everywhere(logits_fn, jax.random.key(0), target)
    task = ensemble._Task(network, key, images, labels, plan, target)
    batch = ensemble._batch(task, versions.Round(attack, 1), np.arange(8), 8)
    program = programs.Program(False, attack, "l2", plan.settings.heeded_by(attack))
    compiled = reference.compiled(programs.attack.lower(program, network, batch))
    text = reference.Program(compiled.as_text())
    assert text.loop_bodies()
    assert not hlo.collectives(text.everything())


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
        ({"settings": {"targets": 2.5}}, "targets is 2.5"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    logits_fn, images, labels = linear(5)
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
    logits_fn, images, labels = linear(5)
    with pytest.raises(UserError, match=message):
        run(logits_fn, *change(images, labels))
