"""What stands behind the figures: data, units, held-out images, early refusals."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import atebm_jax
from atebm_jax import UserError, checkpoint, data, sharding
from atebm_jax.evaluate import (
    classification,
    extractors,
    generation,
    ood,
    report,
    suite,
)
from atebm_jax.evaluate.context import Context
from atebm_jax.evaluate.options import Options
from atebm_jax.evaluate.store import Store

pytestmark = pytest.mark.usefixtures("one_program_an_attack")

OPTIONS = Options(num_examples=80, num_resamples=10, radii=(2.0,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "digits"
    # Steps as wide as two balls, which plain PGD makes less of.
    attack = {"num_steps": 4, "step_size": 2.0, "momentum": 0.9, "keep_best": True}
    settings = {f"evaluate.attack.{name}": value for name, value in attack.items()}
    settings |= {"stage1.num_steps": 4, "evaluate.num_test_examples": 0}
    tiny.run(tiny.config(stages="stage1", **settings), folder)
    return folder


def write_folder(folder, images, labels):
    """Images as PNG files in a folder for each of ten classes."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(place / f"{index:03d}.png")


def digits(split, count):
    return data.materialise(data.open_source(f"digits:{split}"), "", (8, 8, 1), count)


def evaluate(workdir, out, metrics, options=OPTIONS, **settings):
    config = tiny.config(**settings)
    return suite.evaluate(workdir, out, metrics=metrics, options=options, config=config)


def test_other_images_under_the_same_name_are_measured_anew(workdir, tmp_path):
    images, labels = digits("test", 60)
    folder, out = tmp_path / "images", tmp_path / "out"
    write_folder(folder, images, labels)
    settings = {"data.test": f"folder:{folder}"}
    first = evaluate(workdir, out, ("accuracy",), **settings)
    write_folder(folder, 255 - images, labels)
    second = evaluate(workdir, out, ("accuracy",), **settings)
    units = list(out.rglob("units/*"))
    assert len(units) == 4, "logits and fingerprint, each of both"
    assert first["data"]["test"]["sha256"] != second["data"]["test"]["sha256"]


def test_temperature_is_never_fitted_on_reported_images(workdir, tmp_path):
    """A held-out folder that holds 40 of the test images beside 40 others."""
    test = digits("test", 60)
    train = digits("train", 40)
    mixed = [np.concatenate([a[:40], b]) for a, b in zip(test, train, strict=True)]
    write_folder(tmp_path / "test", *test)
    write_folder(tmp_path / "eval", *mixed)
    settings = {
        "data.test": f"folder:{tmp_path / 'test'}",
        "data.eval": f"folder:{tmp_path / 'eval'}",
    }
    result = evaluate(workdir, tmp_path / "out", ("calibration",), **settings)
    protocol = result["metrics"]["calibration"]["protocol"]
    figures = result["metrics"]["calibration"]["figures"]
    assert protocol["left_out_as_test_images"] == 40
    assert figures["temperature"]["count"] == 40
    assert figures["ece_before"]["count"] == 60
    # Nothing else held out: half of the test images are given up for the fit.
    settings["data.eval"] = f"folder:{tmp_path / 'test'}/../test"
    result = evaluate(workdir, tmp_path / "out", ("calibration",), **settings)
    metric = result["metrics"]["calibration"]
    assert metric["protocol"]["fitted_on"] == "every second test image"
    assert metric["figures"]["ece_before"]["count"] == 30


def test_report_names_data_versions_and_its_own_plots_only(workdir, tmp_path):
    evaluate(workdir, tmp_path, ("pgd",), replace(OPTIONS, epsilons=(0.5,)))
    result = evaluate(workdir, tmp_path, ("calibration",))
    assert (tmp_path / "robust_accuracy.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "![reliability.png]" in text and "robust_accuracy.png" not in text
    for said in (
        result["data"]["test"]["sha256"],
        result["checkpoint"]["averaged_weights_sha256"],
        "80 of 359 of digits:test, 8x8x1, preprocessing none",
        f"jaxlib {result['versions']['jaxlib']}",
    ):
        assert said in text
    assert json.loads((tmp_path / "report.json").read_text()) == result


def test_training_evaluation_and_model_have_one_adversary(workdir, tmp_path):
    """The momentum and the memory of the config's attack count in all of them."""
    trained = json.loads((workdir / "report.json").read_text())
    options = replace(OPTIONS, num_examples=0, epsilons=(0.5,))
    result = suite.evaluate(workdir, tmp_path, metrics=("pgd",), options=options)
    metric = result["metrics"]["pgd"]
    model = atebm_jax.load(workdir)
    images, labels = digits("test", 359)

    def robust(**settings):
        attacked = model.attack(images, labels, **settings)
        correct = [model.classify(x).argmax(1) == labels for x in (images, attacked)]
        return np.logical_and(*correct).mean()

    value = metric["figures"]["robust_accuracy_l2_0.5"]["value"]
    assert value == trained["stages"]["stage1"]["robust_accuracy"] == robust()
    assert value < robust(momentum=0.0, keep_best=False)
    assert metric["protocol"]["momentum"] == 0.9
    assert metric["protocol"]["keep_best"] is True
    assert "step 2, momentum 0.9, best iterate" in " ".join(trained["notes"])


def attacks_of(epsilons=(), **settings):
    config = tiny.config(**{f"evaluate.attack.{k}": v for k, v in settings.items()})
    options = Options(epsilons=epsilons)
    given = SimpleNamespace(config=config, options=options)
    attacks = classification._attacks(given)
    return {epsilon: attack.step_size for epsilon, attack in attacks.items()}


def test_steps_grow_with_the_radius_and_are_the_config_s_at_its_own():
    steps = attacks_of(epsilon=0.3, step_size=0.1, epsilons=(0.6,))
    assert steps == {0.3: 0.1, 0.6: 0.2}
    assert len(attacks_of(epsilon=0.3)) == 5


@pytest.mark.parametrize("settings", [{"norm": "unbounded"}, {"epsilon": math.inf}])
def test_attack_without_a_ball_has_no_curve(settings):
    assert attacks_of(**settings) == {math.inf: 0.1}
    with pytest.raises(UserError, match="must be finite"):
        attacks_of(epsilons=(0.5,), **settings)


def test_attack_of_radius_0_is_told_before_its_multiples_are_made():
    attack = dict(tiny.config().evaluate.attack) | {"epsilon": 0.0}
    settings = SimpleNamespace(evaluate=SimpleNamespace(attack=attack))
    context = SimpleNamespace(config=settings, options=Options(epsilons=(0.5,)))
    with pytest.raises(UserError, match="epsilon is 0.0: it must be positive"):
        classification.check_pgd(context)


@pytest.mark.parametrize("by_place", [False, True])
def test_gaussians_of_classes_follow_the_names_of_the_network(
    tmp_path, monkeypatch, by_place
):
    config = tiny.config(**{"data.seeds": "gaussian_per_class"})
    images = np.zeros((2, 8, 8, 1), np.uint8)
    train = data.ArraySource(images, [0, 1], class_names=("dog", "cat"))
    context = Context(
        *(config, None, None, None, {"train": train}, {}, Store(tmp_path, {})),
        options=OPTIONS,
        class_names=None if by_place else ("cat", "dog"),
    )
    fitted = []

    def fit(kind, source, *rest, **more):
        fitted.append([source[k]["label"] for k in range(2)])
        return lambda: SimpleNamespace(fingerprint=lambda: "x")

    monkeypatch.setattr(generation.seeds, "fit_if_absent", fit)
    before = SimpleNamespace(data=SimpleNamespace(seeds="noise"))
    loaded = SimpleNamespace(gaussian=None, config=before)
    generation.prepare(context, loaded, tmp_path)
    assert fitted == [[0, 1] if by_place else [1, 0]]


def test_what_cannot_be_measured_is_told_before_anything_is(workdir, tmp_path):
    for change, message in (
        ({"target": "10"}, "--target=10: expected"),
        ({"num_samples": 3}, "--num_samples is 3"),
        ({"version": "best"}, "unknown version 'best'"),
        ({"version": "custom"}, "needs a list"),
        ({"version": "custom", "attacks": ("pgd",)}, "unknown attack 'pgd'"),
        ({"attacks": ("square",)}, "use version 'custom'"),
        ({"norm": "l3", "epsilon": 1.0}, "unknown threat norm 'l3'"),
    ):
        with pytest.raises(UserError, match=message):
            suite.evaluate(workdir, tmp_path, options=Options(**change))
    assert not list(tmp_path.iterdir())


def test_network_of_an_imported_checkpoint_is_its_own():
    trained, given = tiny.config(), tiny.config(**{"model.depth": 16})
    suite._check_same_network(trained, given, "imported")
    with pytest.raises(UserError, match="config.model.depth is 16"):
        suite._check_same_network(trained, given, "stage1")
    trained.model.mean, trained.model.std = (0.49139977,), (0.24703225,)
    given.model.mean, given.model.std = (0.4914,), (0.247,)
    suite._check_same_network(trained, given, "imported")
    given.model.mean = (0.5,)
    with pytest.raises(UserError, match="config.model.mean is"):
        suite._check_same_network(trained, given, "imported")


def test_field_that_only_earlier_versions_had_is_not_compared():
    trained = tiny.config()
    trained.model.conv_gradient = "auto"
    suite._check_same_network(trained, tiny.config(), "stage1")
    with pytest.raises(UserError, match="config.model.activation is"):
        given = tiny.config(**{"model.activation": "swish"})
        suite._check_same_network(trained, given, "stage1")


def test_the_model_is_no_judge_of_itself(workdir, tmp_path):
    with pytest.raises(UserError, match="weights of the model itself"):
        suite.evaluate(
            workdir, tmp_path, metrics=("counterfactual",), judge=str(workdir)
        )


def test_network_for_imagenet_judges_imagenet_alone(workdir, tmp_path, monkeypatch):
    asked = {"metrics": ("counterfactual",), "judge": "efficientnet_lite0"}
    with pytest.raises(
        UserError, match="judge=efficientnet_lite0 knows ImageNet's 1,0"
    ):
        suite.evaluate(workdir, tmp_path, **asked)
    outputs = np.arange(1000, dtype=np.float32)[None]
    network = extractors.Extractor("", "sha", {}, lambda weights, x: (x, outputs), {})
    monkeypatch.setattr(
        extractors,
        "from_efficientnet_lite0",
        lambda names: network._replace(outputs=extractors.imagenet_outputs(names)),
    )
    backwards = tuple(f"n{k:08d}" for k in range(1000))[::-1]
    sources = {"test": SimpleNamespace(class_names=backwards)}
    for names in (None, backwards):
        context = SimpleNamespace(sources=sources, class_names=names)
        judge = suite._imagenet_judge(context, "efficientnet_lite0")
        np.testing.assert_array_equal(judge.logits({}, None), outputs[:, ::-1])


@pytest.mark.parametrize(
    ("own", "names", "outputs"),
    [
        (("a", "b", "c"), ("a", "b", "c"), [0, 1, 2]),
        (("c", "a", "b"), ("a", "b", "c"), [1, 2, 0]),
        (("a", "b", "d"), ("a", "b", "c"), None),
        (("a", "b"), ("a", "b", "c"), None),
        (None, ("a", "b", "c"), [0, 1, 2]),
        (("c", "a", "b"), None, [0, 1, 2]),
    ],
)
def test_classes_of_another_network_are_compared_by_name(
    monkeypatch, own, names, outputs
):
    """Those of the features, and those of a judge, whose others are refused."""
    other = SimpleNamespace(
        class_names=own,
        num_classes=3 if own is None else len(own),
        image_shape=(8, 8, 1),
        model=SimpleNamespace(apply=lambda variables, images, features=False: images),
        variables={"weight": np.ones(1)},
    )
    monkeypatch.setattr("atebm_jax.trained.load", lambda path: other)
    config = tiny.config(**{"model.num_classes": 3})
    context = Context(config, None, {}, sharding.make_mesh(), {}, class_names=names)
    context = replace(context, options=Options(feature_extractor="path"))
    network = extractors._chosen(context)
    assert (None if network.outputs is None else network.outputs.tolist()) == outputs
    by_place = own is None or names is None
    said = "others: no agreement" if outputs is None else None
    said = "compared by place" if by_place else said
    assert network.description.get("classes") == said

    if outputs is None:
        with pytest.raises(UserError, match="--judge=path"):
            suite._with_judge(context, "path")
        return
    made = suite._with_judge(context, "path")
    assert any("compared by place" in x for x in made.notes) == (own is None)
    logits = np.array([[10.0, 20.0, 30.0]])
    np.testing.assert_array_equal(made.judge.logits({}, logits), logits[:, outputs])


def test_judge_and_classes_stand_in_the_report(workdir, tmp_path, monkeypatch):
    load = checkpoint.load_weights

    def load_another(path, **options):
        weights, meta = load(workdir, **options)
        other = jax.tree.map(lambda x: x * np.float32(1.1), weights)
        return (other if path == "judge" else weights), meta

    monkeypatch.setattr(checkpoint, "load_weights", load_another)
    out = tmp_path / "out"
    result = suite.evaluate(
        workdir,
        out,
        metrics=("counterfactual",),
        judge="judge",
        options=replace(OPTIONS, num_examples=150),
    )
    figures = result["metrics"]["counterfactual"]["figures"]
    for name in ("judge_target_confidence", "judge_classifies_as_target"):
        assert 0 <= figures[f"radius_2/{name}"]["value"] <= 1
    classes = result["metrics"]["counterfactual"]["per_class"]["radius_2"]
    mean = np.mean([figure["value"] for figure in classes.values()])
    figure = figures["radius_2/frechet_distance_model_features"]
    assert list(classes) == [str(label) for label in range(10)]
    assert figure["value"] == pytest.approx(mean) and figure["count"] == 10
    assert "- Frechet distance per class, radius_2: 0 " in (
        out / "report.md"
    ).read_text(encoding="utf-8")
    # Of the images only the strips' are kept.
    kept = 0
    for path in out.rglob("units/*/*.npz"):
        with np.load(path) as unit:
            kept += len(unit["images"]) if "images" in unit.files else 0
    assert kept == 12


def test_custom_ensemble_runs_the_attacks_it_is_given(workdir, tmp_path):
    options = Options(
        num_examples=8, norm="l1", epsilon=2.0, version="custom", attacks=("apgd-ce",)
    )
    result = suite.evaluate(workdir, tmp_path, metrics=("autoattack",), options=options)
    metric = result["metrics"]["autoattack"]
    assert list(metric["figures"]) == ["accuracy_after_clean", "accuracy_after_apgd-ce"]
    assert metric["protocol"]["attacks"] == ["apgd-ce"]
    assert metric["protocol"]["attack"] == "apgd-ce (native)"
    heeded = {"num_steps": 100, "apgd_restarts": 5, "gradient_samples": 1}
    assert metric["protocol"]["settings"] == heeded | {"wide_ball": True}


@pytest.mark.parametrize("metric", ["accuracy", "generation", "ood", "counterfactual"])
def test_diverged_network_is_told(workdir, tmp_path, monkeypatch, metric):
    load = checkpoint.load_weights

    def diverged(*arguments, **options):
        weights, meta = load(*arguments, **options)
        return jax.tree.map(lambda x: np.full_like(x, np.nan), weights), meta

    monkeypatch.setattr(checkpoint, "load_weights", diverged)
    options = replace(OPTIONS, cache_dir=str(tmp_path / "cache"), sweep=0)
    with pytest.raises(UserError, match="the network has diverged"):
        suite.evaluate(workdir, tmp_path / "out", metrics=(metric,), options=options)


@pytest.mark.parametrize("name", ["auroc", "aupr_in", "aupr_out", "fpr95"])
@pytest.mark.parametrize("apart", [-10.0, 0.5, 10.0])
def test_intervals_of_detection_are_no_points_and_stay_in_bounds(name, apart):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(apart, size=30), rng.normal(size=50)
    options = Options(num_resamples=20)

    class Given:
        pass

    Given.options = options
    figures = ood._figures(Given, "noise/score/clean", inside, outside)
    figure = figures[f"noise/score/clean/{name}"]
    low, high = figure["interval_95"]
    assert 0 <= low <= figure["value"] <= high <= 1 and high - low > 0.005


def test_texts_of_lists_and_of_nothing_are_readable():
    assert report.in_words(["a", "b"]) == "a, b"
    assert report.in_words([]) == report.in_words("") == "none"
