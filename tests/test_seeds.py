"""Seeds drawn from Gaussians of the training images, from the fit to the samples."""

import json

import numpy as np
import pytest
import tiny
from etils import epath

import atebm_jax
from atebm_jax import UserError, checkpoint, data, job, seeds
from atebm_jax.evaluate import suite
from atebm_jax.evaluate.options import Options
from atebm_jax.sample.__main__ import main as sample

RNG = np.random.default_rng(0)


def blobs(number, shape=(8, 8, 3)):
    """Images with a known mean and few directions: (images uint8, labels of 2)."""
    direction = RNG.uniform(-40, 40, shape)
    labels = np.arange(number) % 2
    z = RNG.standard_normal((number, 1, 1, 1))
    pixels = 100 + 50 * labels[:, None, None, None] + z * direction
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def test_draws_have_the_mean_and_the_covariance_of_the_images():
    images, _ = blobs(2000)
    drawn = seeds.fit(images).batch(3, np.arange(2000), np.zeros(2000, int))
    pixels, made = (x.reshape(2000, -1).astype(float) for x in (images / 255, drawn))
    np.testing.assert_allclose(made.mean(0), pixels.mean(0), atol=0.02)
    np.testing.assert_allclose(np.cov(made.T), np.cov(pixels.T), atol=3e-3)


def test_each_class_has_its_own_gaussian():
    images, labels = blobs(400)
    gaussian = seeds.fit(images, labels, 2)
    drawn = gaussian.batch(0, np.arange(400), labels)
    for k in (0, 1):
        found, wanted = drawn[labels == k].mean(), images[labels == k].mean() / 255
        assert abs(found - wanted) < 0.02


def test_an_image_is_the_same_in_every_batch_and_another_under_another_number():
    gaussian = seeds.fit(blobs(50)[0])
    many = gaussian.batch(7, np.arange(20), np.zeros(20, int))
    few = gaussian.batch(7, np.array([5, 2]), np.zeros(2, int))
    np.testing.assert_array_equal(few, many[[5, 2]])
    assert len(np.unique(many.reshape(20, -1), axis=0)) == 20
    assert (gaussian.draw(8, 5) != gaussian.draw(7, 5)).any()


@pytest.mark.parametrize("shape", [(70, 40, 3), (8, 8, 1), (64, 64, 1)])
def test_large_images_are_described_small_and_drawn_whole(shape):
    gaussian = seeds.fit(blobs(40, shape)[0])
    assert max(gaussian.means.shape[1:3]) <= 32
    drawn = gaussian.draw(0, 0)
    assert drawn.shape == shape and drawn.dtype == np.uint8


def test_two_equal_images_have_no_extent():
    images = np.full((2, 8, 8, 1), 77, np.uint8)
    np.testing.assert_array_equal(seeds.fit(images).draw(0, 0), images[0])


def test_classes_too_many_or_too_small_are_refused():
    images = np.zeros((40, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="choose 'gaussian'"):
        seeds.fit(images, np.arange(40), 1000)
    with pytest.raises(UserError, match="class 1 has 1 image among the 3"):
        seeds.fit(images[:3, :8, :8], np.array([0, 0, 1]), 2)
    with pytest.raises(UserError, match="fitted to 1 image: it needs two, .* 'noise'"):
        seeds.fit(images[:1])
    seeds.check("gaussian", 1000, (256, 256, 3))
    with pytest.raises(UserError, match="1000 classes are too large"):
        seeds.check("gaussian_per_class", 1000, (256, 256, 3))


def run(folder, kind, **settings):
    """A job of two steps a stage with these seeds: (workdir, config)."""
    steps = {"stage1.num_steps": 2, "stage2.num_steps": 2}
    config = tiny.config(**{"data.seeds": kind}, **steps, **settings)
    tiny.run(config, folder / "digits")
    return folder / "digits", config


@pytest.fixture(scope="module", params=seeds.FITTED)
def trained(request, tmp_path_factory):
    """A job whose seeds are Gaussian; of one a class it has both stages."""
    stages = "auto" if request.param == seeds.GAUSSIAN_PER_CLASS else "stage1"
    return run(tmp_path_factory.mktemp("gaussian"), request.param, stages=stages)


def test_a_checkpoint_keeps_them_and_samples_need_no_data(
    trained, tmp_path, monkeypatch
):
    workdir, config = trained
    monkeypatch.setattr(data, "open_source", None)
    monkeypatch.setattr(data, "materialise", None)
    stored = checkpoint.load_weights(workdir)[1]["seeds"]
    gaussian = seeds.from_arrays(stored, tuple(config.data.image_shape))
    seed, labels = 5, np.array([3, 7, 3])
    expected = gaussian.batch(seed, np.arange(3), labels)

    model = atebm_jax.load(workdir)
    np.testing.assert_array_equal(
        model.sample(labels, num_steps=0, seed=seed), expected
    )
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}", "--classes=3,7"]
    monkeypatch.setattr("atebm_jax.sample.asked.class_names", lambda *_: "0123456789")
    sample([*arguments, "--count=3", "--num_steps=0", f"--seed={seed}"])
    with np.load(tmp_path / "samples.npz") as drawn:
        np.testing.assert_array_equal(drawn["arr_0"], np.rint(expected * 255))
    protocol = json.loads((tmp_path / "samples.json").read_text())
    assert protocol["seeds"] == config.data.seeds


def test_evaluate_draws_from_them(trained, tmp_path):
    workdir, config = trained
    options = Options(num_samples=40, num_examples=40, feature_extractor="model")
    report = suite.evaluate(workdir, tmp_path, metrics=("generation",), options=options)
    protocol = report["metrics"]["generation"]["protocol"]
    assert protocol["seeds"] == config.data.seeds


def test_training_draws_by_position_and_label():
    images, labels = blobs(30)
    gaussian = seeds.fit(images, labels, 2)
    streams = {"gen": data.Stream(data.ArraySource(images, labels))}

    def batches(count, size, **more):
        options = {"batch_size": size, "image_shape": (8, 8, 3)}
        made = data.train_batches(
            streams, draw_seeds=lambda n, y: gaussian.draw(9, n, y), **options, **more
        )
        with made as iterator:
            return [next(iterator) for _ in range(count)]

    whole = batches(3, 4)
    for step, batch in enumerate(whole):
        numbers = np.arange(4 * step, 4 * step + 4)
        expected = gaussian.batch(9, numbers, batch["y_gen"])
        np.testing.assert_array_equal(batch["x_ood"], np.rint(expected * 255))
    # Resumed at a step, and shared by two processes.
    np.testing.assert_array_equal(batches(1, 4, start=2)[0]["x_ood"], whole[2]["x_ood"])
    for rank in (0, 1):
        part = batches(2, 4, process_index=rank, process_count=2)[1]
        np.testing.assert_array_equal(part["x_ood"], whole[1]["x_ood"][rank::2])


def source_of(number, shape=(8, 8, 1), **options):
    images, labels = blobs(number, shape)
    return data.ArraySource(images, labels, num_classes=2, **options)


def fit_and_keep(kind, source, config, path, **options):
    return seeds.fit_if_absent(kind, source, config, path, **options)()


def test_a_workdir_keeps_its_seeds_apart_from_those_of_others(tmp_path):
    path, config = epath.Path(tmp_path) / seeds.FILE, tiny.config().data
    first = source_of(60)
    fitted = fit_and_keep("gaussian", first, config, path)
    same = fit_and_keep("gaussian", first, config, path)
    assert same.fingerprint() == fitted.fingerprint()
    others = {"gaussian": source_of(60), "gaussian_per_class": first}
    for kind, source in others.items():
        with pytest.raises(UserError, match="holds the seeds of another"):
            fit_and_keep(kind, source, config, path)
    config.preprocess, config.image_shape = "resize(4)", (4, 4, 1)
    with pytest.raises(UserError, match="holds the seeds of another"):
        fit_and_keep("gaussian", first, config, path)
    small = fit_and_keep("gaussian", first, config, path, anew=True)
    assert small.draw(0, 0).shape == (4, 4, 1)
    assert fit_and_keep("gaussian", first, config, path).means.shape == (1, 4, 4, 1)


def test_gaussians_of_another_number_of_classes_are_others(tmp_path):
    path, config = epath.Path(tmp_path) / seeds.FILE, tiny.config().data
    images = blobs(60, (8, 8, 1))[0]
    labels = np.arange(60) % 3
    per_class = "gaussian_per_class"
    fit_and_keep(per_class, data.ArraySource(images, labels), config, path)
    more = data.ArraySource(images, labels, num_classes=4)
    with pytest.raises(UserError, match="holds the seeds of another"):
        fit_and_keep(per_class, more, config, path)
    with pytest.raises(UserError, match="class 3 has 0 images among the 60"):
        fit_and_keep(per_class, more, config, path, anew=True)
    assert fit_and_keep(
        per_class, data.ArraySource(images, labels), config, path
    ).means.shape == (3, 8, 8, 1)


def test_large_images_are_reduced_as_they_are_read(tmp_path):
    images, labels = blobs(70, (64, 64, 1))
    config = tiny.config().data
    config.image_shape = (64, 64, 1)
    source = data.ArraySource(images, labels, num_classes=2)
    for kind, per_class in (("gaussian", None), ("gaussian_per_class", labels)):
        path = epath.Path(tmp_path) / f"{kind}.npz"
        read = fit_and_keep(kind, source, config, path)
        whole = seeds.fit(images, per_class, 2)
        np.testing.assert_array_equal(read.means, whole.means)
        np.testing.assert_array_equal(read.factors, whole.factors)
        assert read.image_shape == (64, 64, 1)


def test_misspelt_seeds_are_told_what_else_there_is():
    with pytest.raises(UserError, match="config.data.seeds: unknown.*gaussian_per"):
        job._open_source(tiny.config(**{"data.seeds": "Gaussian"}), "seeds")


@pytest.mark.parametrize("content", [b"", b"no file", b"PK\x03\x04"])
def test_a_damaged_file_is_told(tmp_path, content):
    path = epath.Path(tmp_path) / seeds.FILE
    path.write_bytes(content)
    with pytest.raises(UserError, match="seeds.npz cannot be read .*: delete it"):
        fit_and_keep("gaussian", source_of(9), tiny.config().data, path)


@pytest.mark.parametrize("fault", ["one image", "no folder"])
def test_what_the_first_process_refuses_all_refuse(tmp_path, monkeypatch, fault):
    """Else the others would wait for it."""
    said = []
    monkeypatch.setattr(
        seeds.sharding, "first_said", lambda text: said.append(text) or text
    )
    folder = epath.Path(tmp_path) / ("absent" if fault == "no folder" else "")
    source = source_of(1 if fault == "one image" else 9)
    with pytest.raises(UserError) as told:
        fit_and_keep("gaussian", source, tiny.config().data, folder / seeds.FILE)
    assert said[-1] == str(told.value)
    assert not (folder / seeds.FILE).exists()
    # Another process, which would not know.
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(seeds.sharding, "first_said", lambda text: "the first's")
    with pytest.raises(UserError, match="the first's"):
        path = folder / seeds.FILE
        seeds.fit_if_absent("gaussian", source, tiny.config().data, path)


def test_seeds_that_cannot_be_fitted_are_refused_before_a_workdir_is_made(tmp_path):
    config = tiny.config()
    config.data.seeds = "gaussian_per_class"
    images, _ = blobs(40, (8, 8, 1))
    labels = np.append(np.arange(39) % 9, 9)
    sources = {"train": data.ArraySource(images, labels)}
    with pytest.raises(UserError, match="class 9 has 1 image among the 40"):
        tiny.run(config, tmp_path / "digits", sources=sources)
    assert not (tmp_path / "digits").exists()


def test_seeds_in_memory_take_the_place_of_gaussians(tmp_path, tmp_path_factory):
    """They are in no checkpoint, so that samples start from noise then."""
    workdir = tmp_path_factory.mktemp("memory") / "digits"
    config = tiny.config()
    config.data.seeds = "gaussian"
    black = data.ArraySource(np.zeros((50, 8, 8, 1), np.uint8), spec="black")
    report, _ = tiny.run(config, workdir, sources={"seeds": black})
    assert "from black;" in " ".join(report["notes"])
    # Black images have little to lose: the Gaussians would lie far nearer.
    assert report["reachability"]["least_distance"] > 2
    assert not (workdir / seeds.FILE).exists()
    assert "seeds" not in checkpoint.load_weights(workdir)[1]
    with pytest.raises(UserError, match="config.data.seeds is 'gaussian', holds no"):
        sample([f"--workdir={workdir}", f"--out={tmp_path}", "--seeds=gaussian"])
    sample([f"--workdir={workdir}", f"--out={tmp_path}", "--count=2", "--num_steps=0"])
    assert json.loads((tmp_path / "samples.json").read_text())["seeds"] == "noise"
