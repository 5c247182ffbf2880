"""The evaluation of a checkpoint, stopped and gone on with, and its report."""

import json
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from atebm_jax import (
    UserError,
    autoattack,
    config,
    data,
    local_path,
    trained,
)
from atebm_jax.evaluate import counterfactual, suite
from atebm_jax.evaluate.context import Options
from atebm_jax.evaluate.store import Store

pytestmark = pytest.mark.usefixtures("one_program_an_attack")

QUICK = {"num_steps": 3, "num_queries": 5, "targets": 2, "fab_targets": 2}
OPTIONS = Options(
    num_examples=80,
    epsilons=(0.25, 1.0),
    radii=(1.0, 4.0),
    num_resamples=20,
    num_samples=60,
    num_reference=200,
    sweep=1,
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_autoattack():
    """The attacks of the ensemble cut to a few steps each."""
    with pytest.MonkeyPatch.context() as patch:
        run = autoattack.run
        patch.setattr(autoattack, "run", partial(run, settings=QUICK))
        yield


@pytest.fixture(scope="module")
def workdir(trained):
    return trained


@pytest.fixture(scope="module")
def report(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return suite.evaluate(workdir, out, options=OPTIONS), out


def test_every_figure_has_value_and_protocol(report):
    result, out = report
    assert list(result["metrics"]) == list(suite.METRICS)
    for name, metric in result["metrics"].items():
        assert metric["protocol"] and metric["figures"], name
        for figure in metric["figures"].values():
            assert np.isfinite(figure["value"])
            low, high = figure.get("interval_95", (-np.inf, np.inf))
            assert low <= figure["value"] <= high
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(result))
    plots = {path.name for path in out.glob("*.png")}
    assert plots == {
        "robust_accuracy.png",
        "reliability.png",
        "abstention.png",
        "ood_noise.png",
        "counterfactuals.png",
        "samples.png",
        "sampling_steps.png",
    }
    text = (out / "report.md").read_text()
    assert all(f"## {name}" in text for name in suite.METRICS)


def test_accuracy_is_that_of_the_model(report, workdir):
    import atebm_jax
    from atebm_jax import data

    images, labels = data.materialise(
        data.open_source("digits:test"), "", (8, 8, 1), 80
    )
    predicted = atebm_jax.load(workdir).classify(images).argmax(axis=1)
    figure = report[0]["metrics"]["accuracy"]["figures"]["clean_accuracy"]
    assert figure["value"] == pytest.approx((predicted == labels).mean())
    assert figure["count"] == 80


def test_robust_accuracy_falls_with_the_radius(report):
    figures = report[0]["metrics"]["pgd"]["figures"]
    values = [figure["value"] for figure in figures.values()]
    assert len(values) == 3 and values == sorted(values, reverse=True)


def test_each_attack_leaves_no_more_than_those_before(report):
    figures = report[0]["metrics"]["autoattack"]["figures"]
    names = ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(figures) == [f"accuracy_after_{name}" for name in names]
    values = [figure["value"] for figure in figures.values()]
    assert values == sorted(values, reverse=True)


def test_abstention_is_of_the_errors_that_accuracy_counts(report):
    metrics = report[0]["metrics"]
    figures = {k: f["value"] for k, f in metrics["abstention"]["figures"].items()}
    clean = metrics["accuracy"]["figures"]["clean_accuracy"]["value"]
    assert figures["clean/error"] == pytest.approx(1 - clean)
    for moment in ("clean", "attacked"):
        for score in ("max_softmax", "log_density"):
            assert 0 < figures[f"{moment}/{score}/aurc"] < 1


def test_counterfactuals_gain_confidence_and_stay_in_their_ball(report):
    figures = report[0]["metrics"]["counterfactual"]["figures"]
    near, far = (figures[f"radius_{r}/target_confidence"]["value"] for r in (1, 4))
    assert near < far
    assert figures["radius_1/l2_distance"]["value"] <= 1.0 + 1e-5


def folders_of_digits(root, names):
    """The first test images of the digits, a folder a class."""
    images, labels = data.materialise(
        data.open_source("digits:test"), "", (8, 8, 1), 80
    )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return f"folder:{root}"


def accuracy_on(workdir, out, spec, **options):
    config = tiny.config(**{"data.test": spec})
    result = suite.evaluate(
        workdir, out, metrics=("accuracy",), config=config, **options
    )
    return result["metrics"]["accuracy"]["figures"]["clean_accuracy"]["value"], result


def test_classes_of_test_images_are_known_by_name(report, workdir, tmp_path):
    digits = [str(k) for k in range(10)]
    expected = report[0]["metrics"]["accuracy"]["figures"]["clean_accuracy"]["value"]
    spec = folders_of_digits(tmp_path / "same", digits)
    assert accuracy_on(workdir, tmp_path / "a", spec)[0] == pytest.approx(expected)
    # As text 10 comes before 2.
    for name, names in (
        ("two", [*digits[:2], "two", *digits[3:]]),
        ("from_one", [str(k + 1) for k in range(10)]),
    ):
        spec = folders_of_digits(tmp_path / name, names)
        with pytest.raises(UserError, match="name their classes differently.*by_place"):
            accuracy_on(workdir, tmp_path / "b", spec)
        _, result = accuracy_on(
            workdir, tmp_path / name / "c", spec, classes_by_place=True
        )
        assert "Classes were compared by place, not by name." in result["notes"]
    assert not (tmp_path / "b").exists()


def test_report_says_by_place_also_where_the_network_names_no_classes(
    workdir, tmp_path, monkeypatch
):
    load = trained.load
    unnamed = lambda *args, **kwargs: load(*args, **kwargs)._replace(class_names=None)
    monkeypatch.setattr(trained, "load", unnamed)
    spec = folders_of_digits(tmp_path / "same", [str(k) for k in range(10)])
    _, result = accuracy_on(workdir, tmp_path / "a", spec, classes_by_place=True)
    assert "Classes were compared by place, not by name." in result["notes"]
    _, result = accuracy_on(workdir, tmp_path / "b", spec)
    assert any("does not name its classes" in note for note in result["notes"])


class Stopped(Exception):
    pass


def test_stopped_evaluation_goes_on_to_the_same_report(report, workdir, tmp_path):
    seen = []

    def stop(name, done, total):
        seen.append((name, done))
        if len(seen) == 9:
            raise Stopped

    with pytest.raises(Stopped):
        suite.evaluate(workdir, tmp_path, options=OPTIONS, show=stop)
    assert not (tmp_path / "report.json").exists()
    again = []
    result = suite.evaluate(
        workdir, tmp_path, options=OPTIONS, show=lambda *step: again.append(step)
    )
    first = next(step for step in again if step[0] == seen[0][0])
    assert first[1] == first[2], "the finished part was made again"
    assert json.dumps(result) == json.dumps(report[0])


def test_damaged_unit_is_made_again(tmp_path):
    store = Store(local_path.absolute(tmp_path), {"seed": 0})
    store.save("000000", {"x": np.arange(3)})
    np.testing.assert_array_equal(store.load("000000")["x"], [0, 1, 2])
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-20])
    assert store.load("000000") is None


def test_units_of_another_protocol_are_not_met(tmp_path):
    store = Store(local_path.absolute(tmp_path), {"seed": 0})
    store.within(radius=1.0).save("000000", {"x": np.arange(3)})
    assert store.within(radius=2.0).load("000000") is None
    assert store.load("000000") is None
    assert store.within(radius=1.0).load("000000") is not None


@pytest.mark.parametrize(
    ("target", "expected"), [("next", [1, 0]), ("runner_up", [1, 0]), ("2", [2, 2])]
)
def test_targets_are_other_classes(target, expected):
    logits = jnp.asarray([[5.0, 4.0, 3.0], [1.0, 0.0, 9.0]])
    targets = counterfactual.targets_of(logits, jnp.asarray([0, 2]), target, 3)
    np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("fid",)}, "unknown metric 'fid': choose"),
        ({"metrics": ()}, "unknown metric '': choose"),
        (
            {"metrics": ("ood",), "options": Options(ood=("folder:/nowhere",))},
            "nowhere",
        ),
        ({"options": Options(target="10")}, "from 0 to 9"),
        ({"options": Options(radii=())}, "--radii is empty"),
        ({"metrics": ("ood",), "options": Options(ood=())}, "--ood is empty"),
        ({"judge": "nowhere"}, "no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(workdir, tmp_path, arguments, message):
    arguments = {"metrics": ("counterfactual",)} | arguments
    with pytest.raises(UserError, match=message):
        suite.evaluate(workdir, tmp_path, **arguments)


@pytest.mark.parametrize("below", ["", "checkpoints/stage1/4/evaluation"])
def test_report_does_not_go_among_the_files_of_what_is_evaluated(workdir, below):
    before = (workdir / "report.json").read_bytes()
    path = workdir / "checkpoints/stage1/4" if below else workdir
    with pytest.raises(UserError, match="among the files of what is evaluated"):
        suite.evaluate(path, workdir / below, metrics=("accuracy",))
    assert (workdir / "report.json").read_bytes() == before
    assert not (workdir / below / "units").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.image_shape", (16, 16, 1)),
        ("model.mean", (0.5,)),
        ("model.activation", "swish"),
    ],
)
def test_config_of_another_network_is_refused(workdir, tmp_path, field, value):
    config = tiny.config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field} is .* cannot be compared"):
        suite.evaluate(workdir, tmp_path, config=config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir or --checkpoint"),
        (["--checkpoint=x"], "--checkpoint needs --out"),
        (["--workdir=nowhere"], "there is no checkpoint at nowhere"),
        (["--workdir=x", "stray"], "unexpected argument"),
        (["--workdir=x", "--radii=0"], "expected positive numbers"),
        (["--workdir=x", "--seed=-1"], "must not be negative"),
        (["--workdir=x", f"--seed={2**32}"], "expected 0 to 2**32 - 1"),
        (["--workdir=x", "--norm=linf"], "go together"),
        (["--workdir=x", "--process_id=0"], "--process_id go together"),
        (["--workdir=x", "--metrics=fid"], "unknown metric 'fid'"),
        (["--workdir=x", "--metric=all"], "Unknown command line flag"),
    ],
)
def test_user_mistake_on_the_command_line_exits_with_2(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tiny.evaluate(*arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_network_is_told_by_the_fields_that_are_not_at_their_defaults():
    model = config.default().model
    assert suite._unusual(model) == {}
    model.depth, model.mean = 10, (0.5,)
    with model.unlocked():
        model.own = "field"
    assert suite._unusual(model) == {"depth": 10, "mean": [0.5], "own": "field"}
