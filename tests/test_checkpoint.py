"""Checkpoints: what is kept, what is read, what is refused."""

import errno
import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from etils import epath

from atebm_jax import (
    UserError,
    checkpoint,
    checksums,
    compilation,
    curriculum,
    data,
    fitting,
    local_path,
    models,
    optim,
    sharding,
    storage,
    train_step,
)
from atebm_jax.convert import importing
from atebm_jax.evaluate import references

CONFIG = tiny.config()


@pytest.fixture(scope="module")
def state():
    """A train state of the tiny network, with an AUC window."""
    model = models.build(CONFIG.model)
    variables = reference.random_variables(model, (8, 8, 1))
    optimizer = optim.optimizer("sgd", weight_decay=0.0)
    fresh = train_step.create_state(variables, optimizer, extra=curriculum.init(3))
    return sharding.put_replicated(fresh, sharding.make_mesh())


def at(state, step):
    """The state as it would be at a step, told apart by its weights."""
    values = jnp.asarray(step, jnp.int32), jnp.asarray(step, jnp.float32)
    scaled = jax.tree.map(lambda x: x + values[1], state.average_params)
    reached = replace(state.extra, num_steps=values[0])
    moved = replace(state, step=values[0], average_params=scaled, extra=reached)
    return sharding.put_replicated(moved, sharding.make_mesh())


def write(workdir, state, evaluated):
    """Saves one checkpoint for each (step, metrics)."""
    manager = checkpoint.manager(workdir, "stage1")
    for step, metrics in evaluated.items():
        checkpoint.save(
            manager,
            at(state, step),
            stage="stage1",
            config=CONFIG,
            metrics=metrics,
            contrastive_steps=step,
        )
        manager.wait_until_finished()
    manager.close()
    return checkpoint.stage_folder(workdir, "stage1")


def figures(robust, distance):
    return {"robust_accuracy": robust, "sample_distance": distance}


@pytest.fixture(scope="module")
def stored(state, tmp_path_factory):
    """A stage's folder: best accuracy at 1, best distance at 2, last two 5 and 6."""
    evaluated = {
        1: figures(0.9, 3.0),
        2: figures(0.2, 0.5),
        3: figures(0.3, 2.0),
        4: None,
        5: figures(0.4, 2.5),
        6: None,
    }
    return write(tmp_path_factory.mktemp("stored"), state, evaluated)


def test_last_two_and_best_by_each_metric_are_kept(stored):
    assert checkpoint.steps_in(stored) == [1, 2, 5, 6]


def test_worst_value_of_a_metric_is_never_the_best(state, tmp_path):
    worst = figures(-float("inf"), float("inf"))
    folder = write(tmp_path, state, {1: worst, 2: figures(0.1, 9.0), 3: None, 4: None})
    assert checkpoint.steps_in(folder) == [2, 3, 4]


@pytest.mark.parametrize(
    ("best_by", "step"), [(None, 6), ("robust_accuracy", 1), ("sample_distance", 2)]
)
def test_weights_are_those_of_the_step_that_was_asked_for(stored, state, best_by, step):
    weights, meta = checkpoint.load_weights(stored, best_by=best_by)
    assert meta["step"] == step and meta["stage"] == "stage1"
    expected = at(state, step).average_params
    jax.tree.map(np.testing.assert_array_equal, weights["params"], expected)


def test_workdir_stage_and_step_are_all_paths_of_a_checkpoint(stored):
    workdir = stored.parent.parent
    assert checkpoint.find(workdir) == checkpoint.find(stored) == stored / "6"
    assert checkpoint.find(stored / "2") == stored / "2"


def test_restored_state_is_the_saved_one_bit_by_bit(stored, state):
    manager = checkpoint.manager(stored.parent.parent, "stage1")
    restored = checkpoint.restore(manager, 5, state)
    manager.close()
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 5))
    assert restored.step.sharding == state.step.sharding


def test_step_that_is_there_is_not_saved_again(stored, state):
    manager = checkpoint.manager(stored.parent.parent, "stage1")
    other = replace(state, step=jnp.asarray(6, jnp.int32))
    checkpoint.save(manager, other, stage="stage1", config=CONFIG, metrics=None)
    manager.close()
    weights, _ = checkpoint.load_weights(stored)
    expected = at(state, 6).average_params
    jax.tree.map(np.testing.assert_array_equal, weights["params"], expected)


def test_metrics_are_added_to_a_step_saved_without_them(state, tmp_path):
    folder = write(tmp_path, state, {1: None})
    assert not (folder / "1" / "metrics").exists()
    folder = write(tmp_path, state, {1: figures(0.5, 1.0)})
    assert checkpoint.load_weights(folder, best_by="robust_accuracy")[1]["step"] == 1


def test_leftovers_of_a_killed_process_are_removed(stored, tmp_path):
    folder = checkpoint.stage_folder(tmp_path, "stage1")
    shutil.copytree(stored, folder)
    (folder / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "trash" / "3").mkdir(parents=True)
    (folder / "notes").mkdir()
    manager = checkpoint.manager(tmp_path, "stage1")
    assert sorted(manager.all_steps()) == [1, 2, 5, 6]
    manager.close()
    left = {p.name for p in folder.iterdir()}
    # What a user laid there stays.
    assert {"1", "2", "5", "6", "notes"} <= left
    assert left <= {"1", "2", "5", "6", "notes", "trash"}
    assert not (folder / "trash" / "3").exists()


def test_another_network_is_refused_and_nothing_is_cast(stored, state):
    manager = checkpoint.manager(stored.parent.parent, "stage1")
    wider = jax.tree.map(lambda x: jnp.concatenate([x, x]), state.params["fc"])
    other = replace(state, params={**state.params, "fc": wider})
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoint.restore(manager, 6, other)
    manager.close()


# Letters that a pattern of file names is made of, and others that tools stumble over.
ODD = ["[lab]/x*?", "a [0-9] {b,c} #1%20", "**"]


@pytest.mark.parametrize("name", ODD)
def test_letters_of_patterns_in_a_path_are_letters(state, tmp_path, name):
    folder = write(tmp_path / name, state, {1: figures(0.1, 1.0), 2: None})
    weights, meta = checkpoint.load_weights(tmp_path / name)
    assert meta["step"] == 2
    expected = at(state, 2).average_params
    jax.tree.map(np.testing.assert_array_equal, weights["params"], expected)
    manager = checkpoint.manager(tmp_path / name, "stage1")
    restored, _ = checkpoint.restore(manager, 1, state), manager.close()
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 1))
    assert checkpoint.steps_in(folder) == [1, 2]


def test_imported_weights_lie_below_such_a_path_too(state, tmp_path):
    variables = {"params": jax.device_get(state.params)}
    made = importing.Imported(variables, CONFIG, [], {})
    importing.write(made, tmp_path / "[lab]" / "c")
    weights, _ = checkpoint.load_weights(tmp_path / "[lab]" / "c")
    jax.tree.map(np.testing.assert_array_equal, weights["params"], variables["params"])


def test_step_that_could_not_be_read_does_not_count(state, tmp_path, monkeypatch):
    """Whatever keeps Orbax from listing the arrays, it goes on as if all were well."""
    monkeypatch.setattr(local_path.LocalPath, "glob", lambda self, pattern: iter(()))
    with pytest.raises(UserError, match="written without the list of its arrays"):
        write(tmp_path, state, {1: None})
    assert checkpoint.steps_in(checkpoint.stage_folder(tmp_path, "stage1")) == []
    made = importing.Imported({"params": {"a": np.ones(3)}}, CONFIG, [], {})
    with pytest.raises(UserError, match="written without the list of its arrays"):
        importing.write(made, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_cloud_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(local_path.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert local_path.absolute("run") == tmp_path / "run"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://b/run", r"gcsfs and google-cloud-storage are .*'atebm_jax\[gcs\]'"),
        ("s3://b/run", "s3fs is not installed: pip install s3fs"),
        ("ftp://b/run", "of no kind of storage that is known"),
    ],
)
def test_bucket_that_cannot_be_reached_from_here_is_told(path, message, monkeypatch):
    monkeypatch.setattr(storage, "_found", lambda module: False)
    for reach in (
        checkpoint.find,
        data.open_source,
        lambda to: compilation.use_cache(to, "run"),
        lambda to: references.read(to, 3),
        lambda to: importing.with_class_names(None, to),
    ):
        options = {"data_dir": path} if reach is data.open_source else {}
        with pytest.raises(UserError, match=message):
            reach("tfds:a:train" if options else path, **options)


def test_folders_that_are_no_steps_are_passed_over(tmp_path):
    for name in ("3", "12", "\N{SUPERSCRIPT TWO}", "0005", "x", "-1"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps_in(epath.Path(tmp_path)) == [3, 12]


@pytest.mark.parametrize("best_by", ["accuracy", "robust_acc"])
def test_unknown_metric_names_the_known_ones(stored, best_by):
    with pytest.raises(UserError, match="robust_accuracy, sample_distance"):
        checkpoint.find(stored, best_by=best_by)


def test_best_of_a_stage_without_evaluation_is_refused(state, tmp_path):
    folder = write(tmp_path, state, {1: None})
    with pytest.raises(UserError, match="none is the best"):
        checkpoint.load_weights(folder, best_by="robust_accuracy")


def test_path_without_checkpoint_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected a workdir"):
        checkpoint.load_weights(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        checkpoint.load_weights(tmp_path / "file")


def test_checkpoint_that_cannot_be_opened_is_told(stored, monkeypatch):
    """Folders and files of another user."""

    def refuse(self, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self)

    with monkeypatch.context() as patch:
        patch.setattr(type(stored), "iterdir", refuse)
        with pytest.raises(UserError, match="stage1 cannot be read .Permission"):
            checkpoint.load_weights(stored)
    monkeypatch.setattr(type(stored), "read_bytes", refuse)
    with pytest.raises(UserError, match="CHECKSUMS.sha256 cannot be read .Permission"):
        checkpoint.load_weights(stored / "6")


@pytest.mark.parametrize("victim", ["state", "meta"])
def test_damaged_checkpoint_is_refused_by_name(stored, tmp_path, victim):
    folder = tmp_path / "6"
    shutil.copytree(stored / "6", folder)
    for path in (folder / victim).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=f"checkpoint {folder}.*damaged"):
        checkpoint.load_weights(folder)


def test_checkpoint_of_a_later_format_is_refused(stored, tmp_path):
    folder = tmp_path / "6"
    shutil.copytree(stored / "6", folder)
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format": 99}))
    checksums.write(epath.Path(folder))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_weights(folder)


def test_weights_of_another_shape_are_named():
    expected = {"params": {"fc": {"kernel": np.zeros((64, 10))}}}
    weights = {"params": {"fc": {"kernel": np.zeros((64, 7)), "bias": np.zeros(7)}}}
    with pytest.raises(UserError, match="2 arrays differ.*fc/bias.*fc/kernel"):
        fitting.check_weights(expected, weights, "x")
