"""Releases: what is written is what is read, here, from a hub and by JAX alone."""

import errno
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

import atebm_jax
from atebm_jax import (
    UserError,
    archs,
    checkpoint,
    models,
    release_format,
    seeds,
    trained,
)
from atebm_jax.convert import exporting, importing, normalization
from atebm_jax.evaluate import suite
from atebm_jax.evaluate.options import Options
from atebm_jax.models import forms
from atebm_jax.release import __main__ as command
from atebm_jax.release import card, licences, writing

LICENCE = licences.Licence("mit", "do what you like")
NAMES = tuple(f"digit {k}" for k in range(10))
META = {"stage": "stage2", "step": 6, "T": 3}


def random_model(config=None, **more):
    """A network with random weights, as if it were trained."""
    config = config or tiny.config()
    rng = np.random.default_rng(0)
    model = models.build(config.model)
    weights = jax.tree.map(
        lambda x: 0.1 + 0.1 * rng.random(x.shape, np.float32),
        models.variable_shapes(model, config.data.image_shape),
    )
    return trained.Trained(model, weights, config, META, **more)


def with_gaussian():
    config = tiny.config(**{"data.seeds": "gaussian_per_class"})
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), np.uint8)
    gaussian = seeds.fit(images, np.arange(40) % 10, 10)
    return random_model(config, gaussian=gaussian, class_names=NAMES)


def assert_equal_bits(made, expected):
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def write(loaded, out, evaluation=None, **options):
    return writing.write(
        loaded, str(out), evaluation=evaluation, license_=LICENCE, **options
    )


@pytest.fixture(scope="module")
def loaded():
    return with_gaussian()


@pytest.fixture(scope="module")
def release(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "digits"
    write(loaded, folder)
    return folder


def test_release_is_read_with_the_bits_it_was_made_of(loaded, release):
    found = trained.load(release)
    assert_equal_bits(found.variables, loaded.variables)
    assert_equal_bits(found.gaussian.arrays(), loaded.gaussian.arrays())
    assert found.fingerprint == loaded.fingerprint
    assert (
        found.class_names == NAMES and found.config.data.seeds == "gaussian_per_class"
    )
    assert [found.meta[key] for key in META] == list(META.values())
    model = atebm_jax.load(release, batch_size=4)
    images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    expected = atebm_jax.Model(loaded, 4)
    np.testing.assert_array_equal(model.logits(images), expected.logits(images))
    assert model.class_names == NAMES


def test_command_makes_a_folder_that_says_how_to_use_it(trained, tmp_path):
    printed, out = io.StringIO(), tmp_path / "out"
    flags = [f"--workdir={trained}", f"--out={out}", "--name=Digits [small]"]
    command.main(flags, Console(file=printed, width=200))
    files = {"model.safetensors", "config.json", "README.md", "LICENSE"}
    assert {path.name for path in out.iterdir()} == files
    assert f"atebm_jax.load('{out}')" in printed.getvalue()
    assert "atebm_jax.evaluate measures them" in printed.getvalue()
    text = (out / "README.md").read_text()
    assert "# Digits [small]" in text and "atebm_jax.load(" in text
    assert "Apache License" in (out / "LICENSE").read_text()
    assert_equal_bits(
        checkpoint.load_weights(out)[0], checkpoint.load_weights(trained)[0]
    )
    with pytest.raises(UserError, match="--out=.* is not empty"):
        command.main(flags)


def random_wide_resnet():
    config = tiny.config()
    config.model = archs.model_config(
        "wrn16_4", depth=10, widen_factor=1, mean=(), std=()
    )
    return random_model(config, class_names=NAMES)


def test_weights_survive_the_way_through_pytorchs_names(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "probe_logits", lambda *_: np.zeros(3))
    loaded = random_wide_resnet()
    write(loaded, tmp_path / "a")
    exporting.export(str(tmp_path / "a"), str(tmp_path / "w.safetensors"))
    asked = normalization.parse("none", None, None)
    made = importing.read(tmp_path / "w.safetensors", asked=asked, image_size=8)
    again = loaded._replace(
        variables=made.variables, class_names=made.class_names, config=made.config
    )
    write(again, tmp_path / "b")
    assert_equal_bits(trained.load(tmp_path / "b").variables, loaded.variables)
    assert trained.load(tmp_path / "b").class_names == NAMES


def test_stage2_starts_from_the_weights_of_a_release(loaded, tmp_path, monkeypatch):
    tiny.only_the_loop(monkeypatch)
    write(loaded._replace(class_names=None), tmp_path / "release")
    # A step too short to change a bit.
    settings = {"stage2.num_steps": 1, "stage2.learning_rate": 1e-30}
    config = tiny.config(
        stages="stage2", init_from=str(tmp_path / "release"), **settings
    )
    tiny.run(config, tmp_path / "run")
    weights, meta = checkpoint.load_weights(tmp_path / "run")
    assert_equal_bits(weights, loaded.variables)
    assert (meta["stage"], meta["step"]) == ("stage2", 1)


# --- In float16 ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A workdir of both stages with Gaussian seeds, and its release in float16."""
    folder = tmp_path_factory.mktemp("pair")
    few = {"stage1.num_steps": 2, "stage2.num_steps": 2, "data.seeds": "gaussian"}
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        tiny.run(tiny.config(**few), folder / "run")
    flags = [f"--workdir={folder / 'run'}", "--dtype=float16", "--command=mine"]
    command.main([*flags, f"--out={folder / 'light'}"])
    return folder / "run", folder / "light"


def test_float16_has_the_rounded_weights_and_all_that_is_read(pair):
    whole, light = map(trained.load, pair)
    halved = lambda tree: jax.tree.map(lambda x: np.float32(np.float16(x)), tree)
    assert_equal_bits(light.variables, halved(whole.variables))
    assert_equal_bits(light.gaussian.arrays(), halved(whole.gaussian.arrays()))
    assert light.class_names == whole.class_names == tuple("0123456789")
    numbers = sum(x.size for x in jax.tree.leaves(light.variables))
    numbers += sum(x.size for x in light.gaussian.arrays().values())
    size = (pair[1] / "model.safetensors").stat().st_size
    assert 2 * numbers < size < 3 * numbers
    text = (pair[1] / "README.md").read_text()
    assert "averaged, float16, of stage2" in text and "- Command: `mine`" in text


def test_figures_are_those_of_the_rounded_weights_alone(pair, tmp_path):
    flags = [f"--workdir={pair[0]}", "--dtype=float16", f"--out={tmp_path / 'out'}"]
    for folder in pair:
        options = Options(num_examples=40)
        out = tmp_path / folder.name
        suite.evaluate(folder, out, metrics=("accuracy",), options=options)
    with pytest.raises(UserError, match="in float16, with other weights: evaluate"):
        command.main([*flags, f"--evaluation={tmp_path / pair[0].name}"])
    assert not (tmp_path / "out").exists()
    command.main([*flags, f"--evaluation={tmp_path / pair[1].name}"])
    assert "clean_accuracy" in (tmp_path / "out" / "README.md").read_text()


def test_numbers_beyond_float16_and_other_dtypes_are_told(loaded, tmp_path):
    large = loaded.variables | {
        "params": jax.tree.map(
            lambda x: x * np.float32(1e6), loaded.variables["params"]
        )
    }
    with pytest.raises(UserError, match="params/.* has numbers beyond float16's 65504"):
        write(loaded._replace(variables=large), tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match="unknown --dtype 'int8': choose one of"):
        command.main(["--workdir=a", f"--out={tmp_path / 'out'}", "--dtype=int8"])
    assert not list(tmp_path.iterdir())


# --- What is refused ---


def copied(release, to):
    shutil.copytree(release, to)
    return to, json.loads((to / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library_name": "timm"}, "is no release of atebm_jax: .*convert"),
        ({"format": 2}, "format 2: this version reads format 1"),
        ({"sha256": "0" * 64}, "the SHA-256 of model.safetensors is not"),
        ({"sha256": None}, "no usable sha256"),
        ({"stage": 1}, "no usable stage"),
        ({"config": []}, "no usable config"),
        ({"config": {"seed": "x"}}, "config.seed is 'x'"),
        ({"config": {"seed.x": 1}}, "damaged: config.json: .*dots in field names"),
        ({"config": {"__class__": 1}}, "damaged: config.json: .*__class__ cannot be"),
        ({"class_names": ["a"]}, "1 class_names for 10 classes"),
    ],
)
def test_config_that_is_no_releases_is_told_in_one_sentence(
    release, tmp_path, change, message
):
    folder, about = copied(release, tmp_path / "r")
    (folder / "config.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=message):
        checkpoint.load_weights(folder)


@pytest.mark.parametrize(
    "content", ["truncated", "pickle", "integers", "elsewhere", "below", "seeds"]
)
def test_weights_that_are_none_are_told_in_one_sentence(release, tmp_path, content):
    from safetensors.numpy import save

    folder, about = copied(release, tmp_path / "r")
    path, one = folder / "model.safetensors", np.ones(1, np.float32)
    made = {
        "truncated": path.read_bytes()[:-8],
        "pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
        "integers": save({"params/a": np.ones(1, np.int32)}),
        "elsewhere": save({"a": one}),
        "below": save({"params/a": one, "params/a/b/c": one}),
        "seeds": save({"seeds/means": one}),
    }[content]
    path.write_bytes(made)
    with pytest.raises(UserError, match="the SHA-256 of model.safetensors is not"):
        checkpoint.load_weights(folder)
    # Whoever changes the weights can change the digest too.
    about["sha256"] = release_format._sha256(made)
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged: model.safetensors"):
        checkpoint.load_weights(folder)


def gaussians(means, factors):
    return {"seeds/means": np.ones(means), "seeds/factors": np.ones(factors)}


@pytest.mark.parametrize(
    "arrays",
    [
        {"seeds": np.ones(2)},
        {"seeds/means": np.ones(1), "seeds/factors/x": np.ones(1)},
        gaussians((), ()),
        gaussians((1,), (1, 5)),
        gaussians((2, 8, 8, 1), (2, 5, 8, 8, 1)),
        gaussians((1, 9, 8, 1), (1, 5, 9, 8, 1)),
        gaussians((1, 8, 8, 3), (1, 5, 8, 8, 3)),
        gaussians((1, 8, 8, 1), (1, 0, 8, 8, 1)),
        gaussians((1, 8, 8, 1), (10, 5, 8, 8, 1)),
    ],
)
def test_gaussians_that_draw_no_image_are_refused(release, tmp_path, arrays):
    from safetensors.numpy import load, save

    folder, about = copied(release, tmp_path / "r")
    path = folder / "model.safetensors"
    kept = {k: x for k, x in load(path.read_bytes()).items() if "seeds" not in k}
    path.write_bytes(save(kept | {k: x.astype(np.float32) for k, x in arrays.items()}))
    about["sha256"] = release_format._sha256(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged: model.safetensors has seeds of shap"):
        checkpoint.load_weights(folder)


def test_workdir_with_exported_weights_in_it_is_no_release(release, tmp_path):
    folder, _ = copied(release, tmp_path / "workdir")
    (folder / "checkpoints" / "stage2" / "6").mkdir(parents=True)
    assert checkpoint.find(folder) == folder / "checkpoints" / "stage2" / "6"


def test_weights_of_another_network_are_refused(release, tmp_path):
    folder, about = copied(release, tmp_path / "r")
    about["config"]["model"]["widen_factor"] = 2
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="weights of .* do not fit config.model"):
        atebm_jax.load(folder)
    about["config"]["data"]["image_shape"] = [8, "x"]
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged: config.json describes no network"):
        atebm_jax.load(folder)


def test_release_has_one_model_and_is_no_workdir(release, tmp_path):
    with pytest.raises(UserError, match="is a release and best_by is"):
        atebm_jax.load(release, best_by="robust_accuracy")
    with pytest.raises(UserError, match="or a release"):
        atebm_jax.load(tmp_path)
    before = (release / "config.json").read_bytes()
    with pytest.raises(UserError, match="is a release: give another --workdir, and"):
        tiny.run(tiny.config(), release, allow_config_change=True)
    assert (release / "config.json").read_bytes() == before
    # Evaluations do not land between the files of a release.
    with pytest.raises(UserError, match="would be written to .* give --out, another"):
        suite.evaluate(release, release / "evaluation")


@pytest.mark.parametrize("name", ["x", "a/b/c", "../x", "a/b@", "a b/c", ""])
def test_name_that_no_release_can_have_is_told(name):
    with pytest.raises(UserError, match="hf:.* is no name of a release: write hf:OWN"):
        atebm_jax.load(f"hf:{name}")


def test_release_that_cannot_be_finished_leaves_nothing(loaded, tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(card, "text", full)
    with pytest.raises(UserError, match="--out=.* cannot be written .No space left"):
        write(loaded, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file", "stage", "message"),
    [
        (None, None, checkpoint.IMPORTED, "imported, and their licence is their own"),
        ("mit", None, "stage2", "--license=mit needs its text"),
        ("a\nb", None, "stage2", "no abbreviation of a licence"),
        ("mit", "nowhere", "stage2", "--license_file=nowhere cannot be read"),
    ],
)
def test_licence_that_nobody_gives_is_asked_for(loaded, name, file, stage, message):
    of_stage = loaded._replace(meta=META | {"stage": stage})
    with pytest.raises(UserError, match=message):
        licences.choose(name, file, of_stage, "apache-2.0", released=False)


def test_licence_of_a_release_is_asked_for_and_not_replaced(release, tmp_path):
    flags = [f"--workdir={release}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="come from a release, and their licence is th"):
        command.main(flags)
    assert not list(tmp_path.iterdir())
    command.main([*flags, "--license=apache-2.0"])
    assert 'license: "apache-2.0"' in (tmp_path / "out" / "README.md").read_text()


def test_weights_that_training_started_from_are_told(loaded, tmp_path):
    config = loaded.config.copy_and_resolve_references()
    config.init_from = "hf:owner/name"
    said = "\n".join(write(loaded._replace(config=config), tmp_path / "out"))
    assert "started from hf:owner/name: the licence of those" in said
    # A name on a hub is no place of this machine.
    assert "places of this machine" not in said


# --- Figures ---


def figures(loaded, out):
    """A folder as of an evaluation, with one plot."""
    weights = {"path": "runs/x", "stage": "stage2", "step": 6}
    value = {"value": 0.75, "interval_95": [0.7, 0.8], "count": 80}
    metric = {"figures": {"clean_accuracy": value}, "protocol": {"interval": "Wilson"}}
    test = {"source": "folder:a: b", "num_images": 1, "num_in_source": 1}
    test |= {"image_shape": [8, 8, 1], "preprocess": "", "sha256": "0"}
    content = {
        "checkpoint": weights | {"averaged_weights_sha256": loaded.fingerprint},
        "data": {"test": test},
        "metrics": {"accuracy": metric | {"plots": ["curve.png"]}},
        "versions": {"jax": "1"},
        "seed": 0,
        "device": "1 x cpu",
        "notes": [],
    }
    out.mkdir()
    (out / "report.json").write_text(json.dumps(content))
    (out / "curve.png").write_bytes(b"picture")
    return writing.evaluation_of("runs/x", str(out))


def test_card_shows_the_figures_with_their_protocol(loaded, tmp_path):
    yaml = pytest.importorskip("yaml")
    evaluation = figures(loaded, tmp_path / "evaluation")
    said = write(loaded, tmp_path / "out", evaluation, name="A: 'model'")
    assert said[-1].endswith("are in README.md and evaluation/: checkpoint.path runs/x")
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "mit" and header["library_name"] == "atebm_jax"
    (model,) = header["model-index"]
    assert model["name"] == "A: 'model'"
    (result,) = model["results"]
    assert result["dataset"]["name"] == "folder:a: b"
    assert result["metrics"][0]["value"] == 0.75
    assert "| clean_accuracy | 0.7500 | 0.7000 to 0.8000 | 80 |" in text
    assert "- interval: Wilson" in text and "`digit 3`" in text
    assert "![curve.png](evaluation/curve.png)" in text
    assert (tmp_path / "out" / "evaluation" / "curve.png").read_bytes() == b"picture"


def test_figures_of_other_weights_are_refused(loaded, tmp_path):
    evaluation = figures(loaded, tmp_path / "evaluation")
    other = jax.tree.map(lambda x: x + np.float32(1), loaded.variables)
    with pytest.raises(UserError, match="is of stage2 step 6 and this model .*other w"):
        write(loaded._replace(variables=other), tmp_path / "out", evaluation)
    (tmp_path / "evaluation" / "curve.png").unlink()
    with pytest.raises(UserError, match="is not complete"):
        write(loaded, tmp_path / "out", evaluation)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be read"):
        writing.evaluation_of("runs/x", str(tmp_path))


# --- A hub ---


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as a hub does for the files of one repository, owner/digits."""

    folder: Path
    commit = "c" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(r"/owner/(\w+)/resolve/(\w+)/([\w.]+)", self.path)
        name, revision, file = match.groups() if match else ("", "", "")
        path = self.folder / file
        problem = None
        if name not in ("digits", "empty"):
            problem = "RepoNotFound"
        elif revision not in ("main", self.commit):
            problem = "RevisionNotFound"
        elif name == "empty" or not path.is_file():
            problem = "EntryNotFound"
        content = b"" if problem else path.read_bytes()
        self.send_response(404 if problem else 200)
        if problem:
            self.send_header("X-Error-Code", problem)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{release_format._sha256(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(release, tmp_path, monkeypatch):
    """A stand-in for the hub on this machine, and an empty cache."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    handler = type("Handler", (Hub,), {"folder": release})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_name_on_a_hub_gives_the_same_bits_and_then_needs_no_network(
    hub, loaded, monkeypatch
):
    from huggingface_hub import constants

    for name in ("hf:owner/digits", f"hf:owner/digits@{Hub.commit}"):
        found = trained.load(name)
        assert_equal_bits(found.variables, loaded.variables)
    found = checkpoint.meta_of(checkpoint.find("hf:owner/digits"))
    assert found["class_names"] == list(NAMES)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert trained.load("hf:owner/digits").fingerprint == loaded.fingerprint
    with pytest.raises(UserError, match="cannot be reached and is not in this machine"):
        atebm_jax.load("hf:owner/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/nobodys", "hf:owner/nobodys cannot be fetched .*check owner, name and"),
        ("owner/digits@gone", "cannot be fetched .*revision"),
        ("owner/empty", "is no release of atebm_jax: it has no config.json beside"),
    ],
)
def test_name_that_is_no_release_is_told_in_one_sentence(hub, name, message):
    with pytest.raises(UserError, match=message) as caught:
        atebm_jax.load(f"hf:{name}")
    assert "\n" not in str(caught.value)


def test_hub_without_its_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'atebm_jax\[hub\]'"):
        atebm_jax.load("hf:owner/name")


def test_connection_that_breaks_is_told(monkeypatch):
    class Broken(Exception):
        """Of an HTTP library, which knows nothing of OSError."""

    def download(*_, **options):
        raise Broken("peer closed connection\nincomplete message body")

    kinds = ("LocalEntryNotFoundError", "EntryNotFoundError")
    errors = types.SimpleNamespace(**{k: type(k, (Exception,), {}) for k in kinds})
    hub = types.SimpleNamespace(hf_hub_download=download, errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UserError, match=r"cannot be fetched .peer closed connection\)"):
        atebm_jax.load("hf:owner/name")


# --- Programs for JAX alone ---

# Of the card's block, what it made; this package cannot be imported.
_ALONE = """
import sys

sys.modules["atebm_jax"] = sys.modules["flax"] = None
text = open("README.md").read().partition("## Use without the package")[2]
exec(text.partition("```python\\n")[2].partition("```")[0])
np.savez(sys.argv[1], images=images, logits=logits, energies=energies)
"""


def test_programs_of_a_release_run_with_jax_alone(loaded, tmp_path):
    beside = Path(pytest.importorskip("flatbuffers").__file__).parents[1]
    out, made = tmp_path / "out", tmp_path / "made.npz"
    write(loaded, out, programs_too=True, dtype="float16")
    subprocess.run(
        [sys.executable, "-c", _ALONE, str(made)],
        cwd=out,
        env=os.environ | {"PYTHONPATH": str(beside), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    found = np.load(made)
    images = found["images"]
    assert images.shape == (4, 8, 8, 1) and 0 <= images.min() <= images.max() <= 1
    model = atebm_jax.load(out, batch_size=4)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(found["logits"], model.logits(images), **close)
    np.testing.assert_allclose(found["energies"], model.energy(images), **close)
    for kind, platforms in {"cpu": ["cpu"], "accelerator": ["cuda", "tpu"]}.items():
        for name in ("logits", "energy", "sample"):
            content = (out / "programs" / kind / f"{name}.jaxexport").read_bytes()
            program = jax.export.deserialize(bytearray(content))
            assert list(program.platforms) == platforms
            assert str(program.in_avals[-1 if name != "sample" else -5].shape[0]) == (
                "batch"
            )


def test_exported_sampler_draws_what_the_model_draws(loaded, tmp_path):
    pytest.importorskip("flatbuffers")
    from etils import epath

    from atebm_jax.release import programs

    config = tiny.config(**{"evaluate.samples.sampler": "sgld(noise=0.05)"})
    noisy = loaded._replace(config=config)
    programs.write(noisy, epath.Path(tmp_path))
    content = (tmp_path / "cpu" / "sample.jaxexport").read_bytes()
    draw = jax.jit(jax.export.deserialize(bytearray(content)).call)
    arrays = release_format.flat(loaded.variables)
    start = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    settings = np.uint32(7), np.float32(0.5), np.int32(3)
    model = atebm_jax.Model(noisy, 4)
    for labels in ([1, 2, 3], None):
        numbers = np.full(3, -1) if labels is None else np.asarray(labels)
        made = draw(arrays, start, numbers.astype(np.int32), *settings)
        expected = model.sample(labels, seeds=start, seed=7, step_size=0.5, num_steps=3)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("wrn16_4", {"depth": 10, "widen_factor": 1}),
        ("resnet18", {}),
        ("convnext_tiny", {}),
        ("vit_s", {}),
        ("xcit_s12", {"depth": 1}),
        ("swin_t", {"window": 1, "position_grid": 8}),
    ],
)
def test_networks_take_batches_whose_size_is_not_known(name, fields, monkeypatch):
    import reference

    reference.shallow(monkeypatch)
    network = models.build(archs.model_config(name, **fields))
    weights = models.variable_shapes(network, (64, 64, 3))
    (batch,) = jax.export.symbolic_shape("batch")

    def gradient(weights, images):
        score = lambda x: network.apply(weights, x)[:, 0].sum()
        return jax.grad(score)(images)

    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
    with forms.only("cpu"):
        assert jax.eval_shape(gradient, weights, images).shape == images.shape
