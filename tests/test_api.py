"""The Python interface: numpy in, numpy out, batched inside."""

import subprocess
import sys

import numpy as np
import pytest

import atebm_jax
from atebm_jax import UserError, api, constraints

# Packages that take long to import; none is needed before something asks for it.
HEAVY = ("IPython", "PIL", "array_record", "clu", "grain", "matplotlib", "pandas")
# Of SciPy, whose parts come at their first use.
HEAVY += ("scipy.linalg", "scipy.optimize", "scipy.spatial", "scipy.special")
HEAVY += ("scipy.stats", "sklearn", "tensorboardX", "tensorflow")
HEAVY += ("tensorflow_datasets", "timm", "torch", "torchvision")

pytestmark = pytest.mark.usefixtures("two_devices")


def test_import_loads_nothing_heavy():
    code = f"import sys, atebm_jax; print(*[n for n in {HEAVY} if n in sys.modules])"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


@pytest.fixture(scope="module")
def workdir(trained):
    return trained


@pytest.fixture(scope="module")
def model(workdir):
    return atebm_jax.load(workdir, batch_size=4)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((6, 8, 8, 1), np.float32)


def test_model_names_its_classes_and_says_how_it_was_trained(model):
    assert model.class_names == tuple("0123456789")
    assert model.config.data.train == "digits:train"


def test_three_readings_of_the_logits_agree(model, images):
    logits = model.logits(images)
    assert logits.shape == (6, 10) and logits.dtype == np.float32
    labels = np.arange(6)
    np.testing.assert_array_equal(
        model.energy(images, labels), -logits[np.arange(6), labels]
    )
    marginal = -np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(model.energy(images), marginal, rtol=1e-5, atol=1e-5)
    probabilities = model.classify(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probabilities.argmax(1), logits.argmax(1))


def test_result_does_not_depend_on_the_batch_size(workdir, model, images):
    other = atebm_jax.load(workdir, batch_size=6)
    np.testing.assert_allclose(
        other.logits(images), model.logits(images), rtol=1e-5, atol=1e-6
    )


def test_bytes_and_floats_are_the_same_image(model):
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    as_floats = pixels.astype(np.float32) / 255
    np.testing.assert_array_equal(model.logits(pixels), model.logits(as_floats))


def test_one_image_counts_as_a_batch_of_one(model, images):
    assert model.logits(images[0]).shape == (1, 10)


def test_samples_lie_in_the_unit_range_and_raise_their_class(model):
    labels = np.arange(6)
    drawn = model.sample(labels, step_size=0.3, num_steps=5)
    assert drawn.shape == (6, 8, 8, 1) and drawn.dtype == np.float32
    assert drawn.min() >= 0 and drawn.max() <= 1
    start = model.sample(labels, num_steps=0)
    assert (model.energy(drawn, labels) < model.energy(start, labels)).all()


def test_unconditional_samples_lower_the_marginal_energy(model):
    drawn = model.sample(count=3, step_size=0.3, num_steps=5)
    start = model.sample(count=3, num_steps=0)
    assert (model.energy(drawn) < model.energy(start)).all()


def test_sample_does_not_depend_on_how_many_are_drawn(model):
    few, many = model.sample(count=2, num_steps=0), model.sample(count=5, num_steps=0)
    np.testing.assert_array_equal(few, many[:2])
    other = model.sample(count=2, num_steps=0, seed=1)
    assert not np.array_equal(few, other)


def test_image_is_the_same_bits_in_every_batch(model, workdir):
    other = atebm_jax.load(workdir, batch_size=64)
    labels = np.arange(40) % 10
    many = other.sample(labels, num_steps=20)
    np.testing.assert_array_equal(model.sample(labels[:3], num_steps=20), many[:3])
    noisy = model.sample(labels[:2], num_steps=4, step_size=1.0, sampler="sgld")
    again = other.sample(labels, num_steps=4, step_size=1.0, sampler="sgld")
    np.testing.assert_array_equal(noisy, again[:2])


def test_sampler_of_the_config_is_the_default(workdir):
    model = atebm_jax.load(workdir, batch_size=4)
    options = {"count": 2, "num_steps": 3, "step_size": 0.5}
    drawn = {
        text: model.sample(sampler=text, **options)
        for text in ("pgd", "sgld(noise=0.05)", "sgld(noise=0.1)")
    }
    np.testing.assert_array_equal(model.sample(**options), drawn["pgd"])
    model.config.evaluate.samples.sampler = "sgld(noise=0.05)"
    np.testing.assert_array_equal(model.sample(**options), drawn["sgld(noise=0.05)"])
    assert not np.allclose(drawn["sgld(noise=0.05)"], drawn["sgld(noise=0.1)"])


def test_samples_stop_at_a_target_energy(model):
    start = model.sample(count=8, num_steps=0)
    target = float(np.median(model.energy(start)))
    drawn = model.sample(count=8, num_steps=5, target_energy=target)
    there = model.energy(start) <= target
    np.testing.assert_array_equal(drawn[there], start[there])
    assert (drawn[~there] != start[~there]).any(axis=(1, 2, 3)).all()


def test_smooth_seeds_have_less_contrast(model):
    rough, blurred = (model.sample(count=4, num_steps=0, smooth=s) for s in (0.0, 1.5))
    assert blurred.std() < 0.5 * rough.std()
    assert blurred.mean() == pytest.approx(rough.mean(), abs=0.05)


def test_samples_start_from_given_seeds(model, images):
    np.testing.assert_array_equal(model.sample(3, seeds=images, num_steps=0), images)


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 0.5), ("linf", 8 / 255)])
def test_attack_stays_in_the_ball_and_raises_the_loss(model, images, norm, epsilon):
    labels = model.classify(images).argmax(1)
    size = epsilon / 4
    attacked = model.attack(images, labels, norm=norm, epsilon=epsilon, step_size=size)
    delta = (attacked - images).reshape(6, -1)
    order = 2 if norm == "l2" else np.inf
    assert (np.linalg.norm(delta, order, axis=1) <= epsilon * (1 + 1e-5)).all()
    rows = np.arange(6)
    before, after = model.classify(images), model.classify(attacked)
    assert (after[rows, labels] < before[rows, labels]).all()


def test_radius_and_steps_of_an_attack_are_run_time_values(model, images):
    model.attack(images, 1, epsilon=0.5, step_size=0.1, num_steps=1)
    programs = api._attacker.cache_info().currsize
    model.attack(images, 1, epsilon=0.7, step_size=0.2, num_steps=2)
    assert api._attacker.cache_info().currsize == programs


def test_attack_keeps_the_best_of_its_iterates(model, images):
    """Steps twice as long as the radius lead on and back again."""
    labels = model.classify(images).argmax(1)
    options = {"epsilon": 0.5, "step_size": 1.0, "momentum": 0.9}
    losses = np.stack(
        [
            -np.log(model.classify(attacked)[np.arange(6), labels])
            for steps in range(5)
            for attacked in [model.attack(images, labels, num_steps=steps, **options)]
        ]
    )
    best = model.attack(images, labels, num_steps=4, keep_best=True, **options)
    loss = -np.log(model.classify(best)[np.arange(6), labels])
    np.testing.assert_allclose(loss, losses.max(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.8), ("linf", 0.1)])
def test_counterfactuals_stay_in_their_ball_and_raise_their_class(
    model, images, norm, radius
):
    targets = (model.classify(images).argmax(1) + 1) % 10
    made = model.counterfactual(images, targets, radius=radius, norm=norm, num_steps=8)
    assert made.images.shape == images.shape and made.path.energy.shape == (6, 9)
    assert made.images.min() >= 0 and made.images.max() <= 1
    delta = (made.images - images).reshape(6, -1)
    lengths = np.linalg.norm(delta, 2 if norm == "l2" else np.inf, axis=1)
    assert (lengths <= radius * (1 + 1e-5)).all() and (lengths > radius / 2).all()
    confidence = made.path.target_confidence
    assert (confidence[:, -1] > confidence[:, 0]).all()
    np.testing.assert_allclose(
        confidence[:, -1], model.classify(made.images)[np.arange(6), targets], 1e-4
    )
    np.testing.assert_array_equal(made.start, images)
    np.testing.assert_array_equal(made.targets, targets)


def test_counterfactual_is_the_same_bits_alone_and_among_many(model, images):
    """The 36th image lies in the second chunk, on another device."""
    many = np.concatenate([images] * 6)
    radii = np.linspace(0.1, 4.0, 36)
    made = model.counterfactual(many, 3, radius=radii)
    alone = model.counterfactual(many[35], 3, radius=radii[35])
    np.testing.assert_array_equal(made.images[35:], alone.images)
    for together, one in zip(made.path, alone.path, strict=True):
        np.testing.assert_array_equal(together[35:], one)


def test_edit_keeps_what_is_known_and_lowers_the_energy(model, images):
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    made = model.edit(constraints.inpaint(images, mask), num_steps=5)
    np.testing.assert_array_equal(made.images[:, ~mask], images[:, ~mask])
    assert (made.path.energy[:, -1] < made.path.energy[:, 0]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.counterfactual(x, 10), "expected 0 to 9"),
        (lambda m, x: m.counterfactual(x, [1, 2]), "one int"),
        (lambda m, x: m.counterfactual(x, 1, radius=0), "must be positive"),
        (lambda m, x: m.counterfactual(x, 1, norm="linf"), "at most 1"),
        (lambda m, x: m.counterfactual(x, 1, num_steps=-1), "num_steps is -1"),
        (lambda m, x: m.counterfactual(x, 1, step_size=0), "positive"),
        (
            lambda m, x: m.counterfactual(x, 1, num_steps=2**30),
            "1000000 at most",
        ),
        (lambda m, x: m.edit(x), "the constraint is a ndarray"),
        (
            lambda m, x: m.edit(constraints.Known(np.uint8(x), x[..., :1] > 0)),
            "images of uint8: expected floats",
        ),
        (lambda m, x: m.edit(constraints.superres(x, 2)), r"takes \[N, 8, 8, 1\]"),
        (lambda m, x: m.edit(constraints.ball(x), "cat"), "'guess' or None"),
        (lambda m, x: m.edit(constraints.ball(x), sampler="hmc"), "unknown sampler"),
        (
            lambda m, x: m.edit(
                constraints.together(constraints.ball(x), constraints.ball(x[:1]))
            ),
            "of different lengths",
        ),
        (lambda m, x: m.logits(x[:, :7]), r"this model takes \[N, H, W, C\]"),
        (lambda m, x: m.logits(x[:0]), "N >= 1"),
        (lambda m, x: m.logits(x * 255), "without any normalisation"),
        (lambda m, x: m.logits(x * np.nan), "finite"),
        (lambda m, x: m.energy(x, np.arange(5)), "one int"),
        (lambda m, x: m.energy(x, np.full(6, 10)), "expected 0 to 9"),
        (lambda m, x: m.energy(x, np.full(6, 0.5)), "dtype float64"),
        (lambda m, x: m.sample([1, 2], count=3), "labels 2, count 3"),
        (lambda m, x: m.sample(count=0), "count 0"),
        (lambda m, x: m.sample(1, num_steps=-1), "num_steps is -1"),
        (lambda m, x: m.sample(1, step_size=0.0), "positive"),
        (lambda m, x: m.sample(count=2.5), "count is 2.5"),
        (lambda m, x: m.sample(count=10**13), "count is 10000000000000"),
        (lambda m, x: m.sample(1, smooth="a"), "smooth is 'a'"),
        (lambda m, x: m.sample(1, target_energy="low"), "target_energy is 'low'"),
        (lambda m, x: m.sample(1, num_steps=2.5), "num_steps is 2.5"),
        (lambda m, x: m.sample(1, step_size="a"), "step_size is 'a'"),
        (lambda m, x: m.sample(1, sampler="sgld(nois=1)"), "no setting 'nois'"),
        (lambda m, x: m.sample(1, sampler=3), "unknown sampler 3"),
        (lambda m, x: m.attack(x, 1, norm="linf"), "give epsilon and step_size too"),
        (lambda m, x: m.attack(x, 1, norm="l3"), "unknown threat norm 'l3'"),
        (lambda m, x: m.attack(x, 1, epsilon=-1.0), "must be positive"),
        (lambda m, x: m.attack(x, 1, epsilon="a"), "epsilon is 'a'"),
        (lambda m, x: m.attack(x, 1, num_steps=-1), "num_steps is -1"),
        (lambda m, x: m.attack(x, 1, momentum=1.0), r"momentum is 1.0.*\[0, 1\)"),
        (lambda m, x: m.attack(x, 1, momentum="a"), "momentum is 'a'"),
        (lambda m, x: m.attack(x, 1, keep_best="no"), "keep_best is 'no'"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(model, images, call, message):
    with pytest.raises(UserError, match=message):
        call(model, images)


def test_loading_says_nothing(workdir, caplog):
    atebm_jax.load(workdir)
    assert not caplog.records


def test_wrong_path_or_batch_size_gets_one_clear_sentence(workdir, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        atebm_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="batch_size is 0"):
        atebm_jax.load(workdir, batch_size=0)
