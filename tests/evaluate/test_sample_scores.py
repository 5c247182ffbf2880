"""Scores of samples: names, cached statistics, sweep, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from atebm_jax import (
    UserError,
    load,
    local_path,
    metrics,
    recipes,
    trained,
    workdir_lock,
)
from atebm_jax.evaluate import extractors, generation, references, suite
from atebm_jax.evaluate.context import Options
from atebm_jax.evaluate.store import Store
from atebm_jax.sample import __main__ as sample


def settings_of(**overrides):
    """A network of 64 features, more than there are samples."""
    return tiny.config(**{"model.widen_factor": 4} | overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        tiny.run(settings_of(stages="stage1", **{"stage1.num_steps": 2}), folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return Options(
        num_examples=40,
        num_samples=60,
        num_reference=200,
        num_pairs=100,
        sweep=1,
        cache_dir=str(tmp_path_factory.mktemp("statistics")),
    )


@pytest.fixture(scope="module")
def scored(workdir, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    report = suite.evaluate(workdir, out, metrics=("generation",), options=options)
    return report["metrics"]["generation"], out


def test_scores_of_other_features_are_not_called_fid(scored):
    result, _ = scored
    assert set(result["figures"]) == {
        "agreement_model_classes",
        "frechet_distance_model_features",
        "kernel_distance_model_features",
        "inception_score_model_classes",
        "inception_score_model_classes_spread",
        "precision_model_features",
        "recall_model_features",
    }
    assert result["figures"]["frechet_distance_model_features"]["count"] == 60
    assert any("biased" in note for note in result["protocol"]["notes"])


def assert_sample_gives_what_was_scored(scored, workdir, out, *flags):
    protocol = scored[0]["protocol"]
    flags += (f"--workdir={workdir}", f"--out={out}", "--count=60")
    sample.main([*flags, f"--num_steps={protocol['num_steps']}"])
    drawn = json.loads((out / "samples.json").read_text())
    for name in ("quantise", "sampler", "step_size", "num_steps"):
        assert drawn[name] == protocol[name], name
    with np.load(out / "samples.npz") as file:
        images = file["arr_0"]
    model = load(workdir)
    network = extractors.from_model("model", model._model, model._variables, 10)
    features, _ = network.apply(model._variables, images / np.float32(255))
    mean, covariance = metrics.feature_statistics(np.asarray(features, np.float64))
    with np.load(scored[1] / "sample_statistics.npz") as file:
        np.testing.assert_allclose(mean, file["mu"], atol=1e-4)
        np.testing.assert_allclose(covariance, file["sigma"], atol=1e-4)


def test_sample_command_gives_the_bytes_that_were_scored(scored, workdir, tmp_path):
    """What another tool measures on its files is what the report says."""
    assert scored[0]["protocol"]["sampler"] == "pgd"
    assert_sample_gives_what_was_scored(scored, workdir, tmp_path)


def test_sampler_of_the_config_is_scored_and_told(workdir, options, tmp_path):
    """Its noise goes on through the sweep of steps, and is that of `sample`."""
    settings = {"sampler": "sgld(noise=0.05)", "step_size": 0.1}
    config = settings_of(**{f"evaluate.samples.{k}": v for k, v in settings.items()})
    out = tmp_path / "evaluation"
    report = suite.evaluate(
        workdir, out, metrics=("generation",), config=config, options=options
    )
    metric = report["metrics"]["generation"]
    assert metric["protocol"]["sampler"] == "sgld(noise=0.05)"
    flags = ("--sampler=sgld(noise=0.05)", "--step_size=0.1")
    scored = (metric, out)
    assert_sample_gives_what_was_scored(scored, workdir, tmp_path / "samples", *flags)
    config.evaluate.samples.sampler = "sgld(nois=1)"
    with pytest.raises(UserError, match="samples.sampler: sampler.*no setting 'nois'"):
        suite.evaluate(workdir, tmp_path / "b", metrics=("generation",), config=config)
    assert not (tmp_path / "b").exists()


def test_sweep_tries_numbers_of_steps_and_takes_the_best(scored):
    protocol = scored[0]["protocol"]
    curve = protocol["sweep"]
    assert set(curve) == {"2", "3", "4"}
    assert curve[str(protocol["num_steps"])] == min(curve.values())


def test_written_statistics_serve_as_reference(scored, workdir, options, tmp_path):
    result, out = scored
    given = replace(options, reference_statistics=str(out / "reference_statistics.npz"))
    again = suite.evaluate(workdir, tmp_path, metrics=("generation",), options=given)
    figures = again["metrics"]["generation"]["figures"]
    name = "frechet_distance_model_features"
    assert figures[name] == result["figures"][name]
    assert not any("precision" in figure for figure in figures)
    # The samples' own statistics are at no distance.
    given = replace(options, reference_statistics=str(out / "sample_statistics.npz"))
    given = replace(given, sweep=0)
    config = settings_of()
    config.evaluate.samples.num_steps = result["protocol"]["num_steps"]
    same = suite.evaluate(
        workdir,
        tmp_path / "same",
        metrics=("generation",),
        options=given,
        config=config,
    )
    value = same["metrics"]["generation"]["figures"][name]["value"]
    assert value == pytest.approx(0, abs=1e-6)


def test_statistics_of_a_data_set_are_computed_once(
    scored, workdir, options, tmp_path, monkeypatch
):
    def compute(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(references, "_compute", compute)
    report = suite.evaluate(workdir, tmp_path, metrics=("generation",), options=options)
    assert report["metrics"]["generation"]["figures"] == scored[0]["figures"]


def test_statistics_go_on_after_a_batch_of_which_no_image_was_decoded(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(references, "_SAVE_EVERY", 1)
    parts = np.split(np.random.default_rng(0).normal(size=(40, 3)), [10, 10, 20, 30])
    extractor = SimpleNamespace(
        sizes=lambda shape: (3, 2), features=None, variables=None
    )
    seen = []

    def compute(folder, stop):
        def show(name, done, total):
            if done == stop:
                raise KeyboardInterrupt

        def rows(compiled, batch, variables):
            seen.append(batch)
            return {"features": parts[batch]}

        context = SimpleNamespace(
            image_shape=(8, 8, 1),
            options=Options(num_pairs=20),
            config=tiny.config(**{"evaluate.batch_size": 10}),
            compiled=lambda function: function,
            batches=lambda role, limit, start: range(start, len(parts)),
            rows=rows,
            show=show,
        )
        store = Store(local_path.absolute(folder), {})
        return references._compute(context, extractor, 50, store)

    whole = compute(tmp_path / "whole", None)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "stopped", 3)
    again = compute(tmp_path / "stopped", None)
    assert seen == [0, 1, 2, 2, 3, 4]
    for key, values in whole.items():
        np.testing.assert_array_equal(again[key], values)
    assert whole["number"] == 40 and len(whole["features"]) == 16


def test_statistics_do_not_depend_on_the_size_of_batches(
    scored, workdir, options, tmp_path
):
    config = settings_of()
    config.evaluate.batch_size = 16
    other = replace(options, cache_dir=str(tmp_path / "cache"))
    suite.evaluate(
        workdir,
        tmp_path / "out",
        metrics=("generation",),
        options=other,
        config=config,
    )
    name = "reference_statistics.npz"
    with np.load(scored[1] / name) as a, np.load(tmp_path / "out" / name) as b:
        for key in ("mu", "sigma"):
            np.testing.assert_allclose(a[key], b[key], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_reference": 2}, "--num_reference is 2: .* need 20 or more; 0 takes all"),
        ({"num_reference": 19}, "--num_reference is 19"),
        ({"cache_dir": "{file}/cache"}, "cannot be written.*another --cache_dir"),
        ({"cache_dir": None}, "cannot be written.*another --cache_dir"),
    ],
)
def test_statistics_that_cannot_be_had_are_refused_before_the_work(
    workdir, options, tmp_path, monkeypatch, changed, message
):
    def compute(*arguments):
        raise AssertionError("work")

    monkeypatch.setattr(references, "_compute", compute)
    (tmp_path / "file").touch()
    # A home that nothing can be written to, whoever runs the test.
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if changed.get("cache_dir"):
        changed = {"cache_dir": changed["cache_dir"].format(file=tmp_path / "file")}
    with pytest.raises(UserError, match=message):
        suite.evaluate(
            workdir,
            tmp_path / "out",
            metrics=("generation",),
            options=replace(options, **changed),
        )
    assert not (tmp_path / "out").exists()


def test_user_without_a_home_is_told_what_helps(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(references.os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="no home.*--cache_dir"):
        references._users_cache()


def test_data_set_too_small_for_statistics_is_named(workdir, options, tmp_path):
    config = settings_of()
    folder = folder_of_seeds(tmp_path / "few", 10, bad=2)
    config.data.train = f"folder:{folder}"
    with pytest.raises(UserError, match="config.data.train=folder:.* has 10 images"):
        suite.evaluate(
            workdir,
            tmp_path / "out",
            metrics=("generation",),
            options=options,
            config=config,
        )


def test_one_evaluation_writes_into_a_folder_at_a_time(workdir, options, tmp_path):
    with workdir_lock.held(tmp_path, "--out"):
        with pytest.raises(UserError, match="in use by another job.*another --out"):
            suite.evaluate(workdir, tmp_path, metrics=("accuracy",), options=options)
        assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]


def test_photographs_can_be_the_seeds(workdir, options, tmp_path):
    config = settings_of()
    config.data.seeds = "digits:test"
    config.data.preprocess_seeds = config.data.preprocess
    figures = suite.evaluate(
        workdir, tmp_path, metrics=("generation",), options=options, config=config
    )["metrics"]["generation"]
    assert figures["protocol"]["seeds"] == "digits:test"
    assert figures["protocol"]["undecodable_seeds"] == 0
    # Fewer seeds than a batch has places are used again.
    config.evaluate.batch_size = 400
    config.data.seeds = f"folder:{folder_of_seeds(tmp_path / 'seeds', 10, bad=2)}"
    figures = suite.evaluate(
        workdir,
        tmp_path / "more",
        metrics=("generation",),
        options=replace(options, sweep=0),
        config=config,
    )["metrics"]["generation"]
    assert figures["protocol"]["undecodable_seeds"] == 6
    assert "6 samples began at the next image" in figures["protocol"]["notes"][-1]


def folder_of_seeds(folder, number, bad):
    """Images of grey level 10 i, one of them no image."""
    folder.mkdir()
    for level in range(number):
        image = Image.fromarray(np.full((8, 8), 10 * level, np.uint8))
        image.save(folder / f"{level:02d}.png")
    (folder / f"{bad:02d}.png").write_text("no image")
    return folder


def test_another_network_names_its_scores(workdir, options, tmp_path):
    given = replace(options, feature_extractor=str(workdir), sweep=0)
    report = suite.evaluate(workdir, tmp_path, metrics=("generation",), options=given)
    figures = report["metrics"]["generation"]["figures"]
    assert "frechet_distance_network_features" in figures
    # The judge's opinion, computed again from the samples themselves.
    model, classes = load(workdir), np.arange(60) % 10
    calls = model.classify(model.sample(classes)).argmax(-1)
    agreement = figures["agreement_network_classes"]
    assert agreement["count"] == 60
    assert agreement["value"] == pytest.approx((calls == classes).mean(), abs=0.02)


def test_network_of_a_package_does_not_call_its_scores_fid(
    workdir, options, tmp_path, monkeypatch
):
    loaded = trained.load(workdir)
    network = (loaded.model, loaded.variables, loaded.num_classes)
    made = extractors.from_model("efficientnet_lite0", *network)
    monkeypatch.setattr(extractors, "from_efficientnet_lite0", lambda _: made)
    given = replace(options, feature_extractor="efficientnet_lite0", sweep=0)
    report = suite.evaluate(workdir, tmp_path, metrics=("generation",), options=given)
    figures = report["metrics"]["generation"]["figures"]
    assert "frechet_distance_efficientnet_lite0_features" in figures
    assert "kernel_distance_efficientnet_lite0_features" in figures
    assert "fid" not in figures and "kid" not in figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 19}, "num_samples is 19"),
        ({"num_samples": 10**12}, "num_samples is 1000000000000: .*are the most"),
        ({"sweep": 10**9}, "sweep is 1000000000: at most 100"),
        ({"sweep_samples": 1}, "sweep_samples is 1: .*or give --sweep=0"),
        ({"quantise": "up"}, "unknown --quantise 'up': choose"),
        ({"score_protocol": "mine"}, "unknown --score_protocol 'mine': choose"),
        ({"feature_extractor": "inception"}, "needs --inception_weights"),
        ({"inception_weights": "nowhere.pth"}, "no Inception weights at"),
        ({"reference_statistics": "nowhere.npz"}, "cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_refused(workdir, options, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        suite.evaluate(
            workdir,
            tmp_path,
            metrics=("generation",),
            options=replace(options, **change),
        )


def test_statistics_of_other_features_are_refused(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert references.read(str(path), 3).covariance.shape == (3, 3)
    with pytest.raises(UserError, match="have 4 dimensions"):
        references.read(str(path), 4)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.zeros((3, 3)))
    with pytest.raises(UserError, match="NaN"):
        references.read(str(path), 3)


@pytest.mark.golden
def test_reference_bytes_are_rounded_down(golden):
    stored = golden("png_quantise")
    levels = recipes.QUANTISE["reference"](jnp.asarray(stored["float_image"]))
    np.testing.assert_array_equal(levels, stored["saved_u8"])
    nearest = recipes.QUANTISE["nearest"](jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(nearest, [0, 128, 255])


def test_running_sums_give_the_inception_score_of_the_whole():
    logits = np.random.default_rng(0).normal(size=(103, 7)) * 3
    splits = metrics.split_of_images(103, 10, "torch_fidelity")
    sums = metrics.SplitSums.empty(10, 7)
    for start in range(0, 103, 25):
        part = slice(start, start + 25)
        sums = sums.add(logits[part], splits[part])
    whole = metrics.inception_score(logits, protocol="torch_fidelity")
    assert sums.scores().mean() == pytest.approx(whole[0])
    assert generation._SPLITS == 10
