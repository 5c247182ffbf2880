"""A job from config to report, resumed, refused and stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
import tiny
from etils import epath

import atebm_jax
from atebm_jax import UserError, checkpoint, checksums, data, job, models
from atebm_jax.config import flatten
from atebm_jax.evaluate.context import Context
from atebm_jax.metric_writer import MetricWriter, read_metrics
from atebm_jax.preemption import Interrupted

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny job: (workdir, report, what it printed)."""
    workdir = tmp_path_factory.mktemp("job") / "digits"
    return workdir, *tiny.run(tiny.config(), workdir)


def averages(workdir, stage):
    return checkpoint.load_weights(workdir / "checkpoints" / stage)[0]


def without_times(workdir):
    """The metrics of a workdir without those that measure time."""
    timed = "images_per_second"
    return [{k: v for k, v in r.items() if k != timed} for r in read_metrics(workdir)]


def assert_equal_bits(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_job_leaves_report_pictures_metrics_events_and_checkpoints(finished):
    workdir, report, _ = finished
    assert json.loads((workdir / "report.json").read_text()) == report
    for name in ("samples.png", "curves.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "events" / "stage2").glob("events.*"))
    assert {"stage1_00000003.png", "stage2_00000006.png"} <= {
        p.name for p in (workdir / "samples").iterdir()
    }
    for stage in ("stage1", "stage2"):
        assert (workdir / "checkpoints" / stage / "6").is_dir()


def test_report_gives_figures_after_both_stages_and_says_what_they_mean(finished):
    _, report, printed = finished
    for stage in ("stage1", "stage2"):
        figures = report["stages"][stage]
        assert figures["step"] == 6 and figures["num_examples"] == 60
        for name in ("clean_accuracy", "robust_accuracy", "sample_agreement"):
            assert 0 <= figures[name] <= 1
        assert figures["robust_accuracy"] <= figures["clean_accuracy"]
        assert figures["sample_distance"] > 0
        assert f"{figures['clean_accuracy']:.4f}" in printed
    assert (
        report["stages"]["stage2"]["T"] >= 0 and "T" not in report["stages"]["stage1"]
    )
    assert "part of its gain over stage 1 comes from that" in " ".join(printed.split())


def test_job_says_ahead_what_its_evaluation_costs_and_shows_its_progress(finished):
    ahead, _, rest = finished[2].partition("stage1 step")
    # 60 images in two batches of 40, two steps each; 50 samples in two chunks of 32,
    # three steps each.
    passes = 2 * (80 * (2 + 2 * 2) + 64 * 3 * 2)
    assert "60 images under 2 steps of attack and 50 samples of 3 steps" in ahead
    assert f"{passes:,} passes of an image" in ahead
    assert "warning: 2 evaluations on the way take" in ahead
    assert f"{passes:,} passes of an image" in rest
    assert "(estimated from training's speed)" in rest
    assert "stage1 accuracy 0/2" in rest


def test_job_says_before_its_first_step_how_far_seeds_can_go(finished):
    ahead = finished[2].partition("stage1 step")[0]
    found = finished[1]["reachability"]
    assert "reachability (L2): a seed lies" in ahead
    assert f"{found['distance']:.3g} from a training image" in ahead
    assert found["farthest_contrastive"] == pytest.approx(9)
    assert found["farthest_sampling"] == pytest.approx(0.9)
    assert f"warning: {found['sentence']}" in ahead
    assert "samples go no farther than 0.9" in ahead


def test_metrics_hold_what_a_user_watches(finished):
    records = read_metrics(finished[0])
    step = next(r for r in records if r["stage"] == "stage2" and "auc" in r)
    watched = (
        "loss loss_ce loss_bce auc auc_seeds T score_real score_seeds "
        "score_contrastive gradient_norm travel images_per_second learning_rate "
        "accuracy_adv logit_spread skipped health_signs"
    )
    assert set(watched.split()) <= step.keys()
    assert {r["health_signs"] for r in records if "loss" in r} == {0}
    held_out = next(r for r in records if "eval_sample_distance" in r)
    assert {"eval_clean_accuracy", "eval_robust_accuracy"} <= held_out.keys()


def test_same_command_on_a_finished_workdir_only_shows_the_report(finished):
    workdir, report, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    again, printed = tiny.run(tiny.config(), workdir)
    assert again == report
    assert "after" in printed
    assert (workdir / "metrics.jsonl").read_text() == before


def test_report_says_how_samples_were_drawn(finished):
    settings, notes = finished[1]["evaluate"], " ".join(finished[1]["notes"])
    assert settings["samples"]["sampler"] == "pgd"
    assert "3 steps of 0.3 by pgd from" in notes


def test_wrong_sampler_is_told_before_the_first_step(tmp_path):
    settings = tiny.config(**{"evaluate.samples.sampler": "sgld(nois=1)"})
    with pytest.raises(UserError, match=r"samples\.sampler: .*no setting 'nois'"):
        tiny.run(settings, tmp_path / "digits")


def test_workdir_of_another_config_is_refused_by_name(finished):
    with pytest.raises(UserError, match=r"stage2\.t_max: 30 before, 31 now"):
        tiny.run(tiny.config(**{"stage2.t_max": 31}), finished[0])


def test_another_config_is_taken_when_told_so(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    settings = tiny.config(**{"evaluate.samples.grid_rows": 3})
    tiny.run(settings, workdir, allow_config_change=True)
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["evaluate"]["samples"]["grid_rows"] == 3


def digits(split, number, names="0123456789"):
    """The first digits of a split, as if their folder held no more."""
    source = data.open_source(f"digits:{split}")
    examples = [source[index] for index in range(number)]
    return data.ArraySource(
        np.stack([example["image"] for example in examples]),
        [example["label"] for example in examples],
        class_names=list(names),
        spec=f"digits:{split}",
    )


@pytest.mark.parametrize("role", ["train", "test"])
def test_workdir_is_not_gone_on_with_on_other_images(finished, role):
    before = (finished[0] / "data.json").read_text()
    then = len(data.open_source(f"digits:{role}"))
    message = (
        rf"config\.data\.{role}=digits:{role} has changed since workdir .* was begun: "
        rf"{then} images then, {then - 1} now.*--allow_config_change"
    )
    with pytest.raises(UserError, match=message):
        tiny.run(tiny.config(), finished[0], sources={role: digits(role, then - 1)})
    assert (finished[0] / "data.json").read_text() == before


def test_other_images_are_taken_when_told_so(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    few = {"sources": {"train": digits("train", 900)}}
    tiny.run(tiny.config(), workdir, allow_config_change=True, **few)
    stored = json.loads((workdir / "data.json").read_text())
    assert stored["train"]["num_images"] == 900
    tiny.run(tiny.config(), workdir, **few)
    with pytest.raises(UserError, match="900 images then"):
        tiny.run(tiny.config(), workdir)


def test_workdir_of_an_earlier_version_has_no_images_to_compare(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    before = (workdir / "data.json").read_text()
    (workdir / "data.json").unlink()
    _, printed = tiny.run(tiny.config(), workdir)
    assert (workdir / "data.json").read_text() == before
    assert "changed" not in printed


def test_classes_by_place_may_be_renamed_in_a_workdir(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    sizes = {
        role: len(data.open_source(f"digits:{role}")) for role in ("train", "test")
    }
    train, test = (digits(role, n, "abcdefghij") for role, n in sizes.items())
    given = {"train": train, "eval": test, "test": test}
    tiny.run(tiny.config(), workdir, sources=given, classes_by_place=True)


def test_each_stage_alone_ends_like_both_together(finished, tmp_path):
    workdir = tmp_path / "apart"
    tiny.run(tiny.config(stages="stage1"), workdir)
    assert not (workdir / "checkpoints" / "stage2").exists()
    tiny.run(tiny.config(stages="stage2"), workdir)
    for stage in ("stage1", "stage2"):
        assert_equal_bits(averages(workdir, stage), averages(finished[0], stage))


def test_stage2_starts_from_a_checkpoint_of_another_workdir(finished, tmp_path):
    source = finished[0] / "checkpoints" / "stage1"
    report, _ = tiny.run(tiny.config(init_from=str(source)), tmp_path / "from")
    assert list(report["stages"]) == ["stage2"]
    assert_equal_bits(
        averages(tmp_path / "from", "stage2"), averages(finished[0], "stage2")
    )


def test_stage2_is_refused_on_an_unfinished_stage1(tmp_path):
    tiny.run(tiny.config(stages="stage1", **{"stage1.num_steps": 2}), tmp_path)
    settings = tiny.config(stages="stage2")
    with pytest.raises(UserError, match="at step 2 of 6"):
        tiny.run(settings, tmp_path, allow_config_change=True)
    assert not (tmp_path / "checkpoints" / "stage2").exists()


def test_source_of_the_weights_may_go_once_the_stage_has_begun(finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished[0] / "checkpoints" / "stage1", source)
    settings = tiny.config(init_from=str(source))
    tiny.run(settings, tmp_path / "new")
    shutil.rmtree(source)
    report, _ = tiny.run(settings, tmp_path / "new")
    assert list(report["stages"]) == ["stage2"]


def test_change_that_the_checkpoints_do_not_bear_leaves_the_workdir_alone(finished):
    before = (finished[0] / "config.json").read_text()
    settings = tiny.config(**{"model.widen_factor": 2})
    with pytest.raises(UserError, match="do not fit config.model"):
        tiny.run(settings, finished[0], allow_config_change=True)
    assert (finished[0] / "config.json").read_text() == before


def test_report_follows_a_change_of_the_evaluation(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    settings = tiny.config(**{"evaluate.samples.num_steps": 2})
    report, printed = tiny.run(settings, workdir, allow_config_change=True)
    assert report["evaluate"]["samples"]["num_steps"] == 2
    assert "2 steps of 0.3" in " ".join(printed.split())


@pytest.mark.parametrize("text", ["{", "[]", "null", "\udcff"])
def test_damaged_config_of_a_workdir_is_named(finished, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="config.json.*--allow_config_change"):
        tiny.run(tiny.config(), tmp_path)


def test_damaged_report_is_measured_again(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "report.json").write_text("{}")
    assert tiny.run(tiny.config(), workdir)[0]["stages"] == finished[1]["stages"]


@pytest.mark.parametrize("name", ["checkpoints", "events"])
def test_file_in_the_way_is_named_and_nothing_is_written(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="cannot be written"):
        tiny.run(tiny.config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_images_in_memory_are_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
    source = data.ArraySource(images, np.arange(60) % 10)
    roles = dict.fromkeys(("train", "eval", "test"), source)
    settings = tiny.config(stages="stage1", **{"data.train": "mine"})
    report, _ = tiny.run(settings, tmp_path, sources=roles)
    assert report["stages"]["stage1"]["num_examples"] == 60


def test_test_set_with_other_class_names_is_refused(tmp_path):
    images = np.zeros((10, 8, 8, 1), np.uint8)
    names = [f"class {k}" for k in range(10)]
    other = data.ArraySource(images, np.arange(10), class_names=names)
    with pytest.raises(UserError, match="'0' and 'class 0'"):
        tiny.run(tiny.config(), tmp_path / "new", sources={"test": other})


def renamed(split, names):
    """The digits with other names, sorted as folders are."""
    source = data.open_source(f"digits:{split}")
    images, labels = data.materialise(source, "", (8, 8, 1), 200)
    places = {name: k for k, name in enumerate(sorted(names))}
    moved = np.array([places[names[label]] for label in labels])
    return data.ArraySource(images, moved, class_names=sorted(names))


def test_classes_are_known_by_name_whatever_goes_on(tmp_path):
    """A resume, stage 2 from stage 1, other weights: labels follow the names."""
    letters = [f"digit {9 - k}" for k in range(10)]
    roles = {role: renamed("train", letters) for role in ("train", "eval", "test")}
    few = {"stage1.num_steps": 2, "stage2.num_steps": 2, "data.train": "mine"}
    settings = tiny.config(stages="stage1", **few)
    tiny.run(settings, tmp_path / "one", sources=roles)
    stage1 = tmp_path / "one" / "checkpoints" / "stage1"
    assert checkpoint.load_weights(stage1)[1]["class_names"] == sorted(letters)
    images, labels = data.materialise(roles["train"], "", (8, 8, 1))
    turned = data.ArraySource(images, 9 - labels, class_names=sorted(letters)[::-1])
    both, weights = tiny.config(**few), []
    for name, train in (("same", roles["train"]), ("turned", turned)):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        given = roles | {"train": train}
        # The data count as changed; what is asked here is what becomes of the labels.
        _, printed = tiny.run(
            both, tmp_path / name, sources=given, allow_config_change=True
        )
        assert ("its labels follow the names" in printed) == (name == "turned")
        found, meta = checkpoint.load_weights(tmp_path / name)
        assert meta["stage"] == "stage2" and meta["class_names"] == sorted(letters)
        weights.append(found)
    assert_equal_bits(*weights)
    other = renamed("train", ["two", *letters[1:]])
    from_it = tiny.config(init_from=str(stage1), **few)
    for folder, changed in (("same", both), ("new", from_it)):
        options = {"sources": roles | {"train": other}, "allow_config_change": True}
        with pytest.raises(UserError, match="'digit 9' and 'two' say.*_by_place"):
            tiny.run(changed, tmp_path / folder, **options)
    assert not (tmp_path / "new").exists()
    given = dict.fromkeys(("train", "eval", "test"), other)
    tiny.run(from_it, tmp_path / "new", sources=given, classes_by_place=True)
    meta = checkpoint.load_weights(tmp_path / "new")[1]
    assert meta["class_names"] == list(other.class_names)


def test_checkpoint_of_an_earlier_version_names_no_classes_and_that_is_said(
    finished, tmp_path
):
    workdir = tmp_path / "old"
    shutil.copytree(finished[0], workdir)
    for meta in workdir.rglob("meta/metadata"):
        content = json.loads(meta.read_text())
        assert content.pop("class_names") == [str(k) for k in range(10)]
        meta.write_text(json.dumps(content))
        (meta.parents[1] / checksums.FILE).unlink()
    _, printed = tiny.run(tiny.config(), workdir)
    assert printed.count("do not name their classes") == 1


def test_relative_paths_of_workdir_and_checkpoint_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.run(tiny.config(stages="stage1"), "runs/one")
    tiny.run(tiny.config(init_from="runs/one"), "runs/two")
    steps = checkpoint.steps_in(checkpoint.stage_folder("runs/two", "stage2"))
    assert steps[-1] == 6
    assert atebm_jax.load("runs/two").logits(np.zeros((8, 8, 1))).shape == (1, 10)


def test_stage2_without_any_stage1_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="init_from"):
        tiny.run(tiny.config(stages="stage2"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_of_another_network_are_refused_by_name(finished, tmp_path):
    settings = tiny.config(init_from=str(finished[0]), **{"model.widen_factor": 2})
    with pytest.raises(UserError, match="bn0"):
        tiny.run(settings, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_from_before_a_field_have_its_default(monkeypatch, tmp_path):
    settings = tiny.config(init_from="runs/older", stages="stage2")
    settings.model.standardize = True
    model = models.build(settings.model)
    shapes = models.variable_shapes(model, settings.data.image_shape)
    stored = settings.model.to_dict()
    del stored["standardize"]
    found = (shapes, {"config": {"model": stored}})
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_, **__: found)
    with pytest.raises(
        UserError, match="init_from: .*--config.model.standardize=False"
    ):
        job._origins(settings, epath.Path(tmp_path), model, shapes, 100)


def test_number_of_classes_must_be_that_of_the_data(tmp_path):
    with pytest.raises(UserError, match="num_classes"):
        tiny.run(tiny.config(**{"model.num_classes": 7}), tmp_path / "new")


@pytest.mark.parametrize("field", ["augment_gen", "augment_cls", "preprocess"])
def test_images_of_another_size_are_refused_and_nothing_is_written(tmp_path, field):
    settings = tiny.config(**{f"data.{field}": "center_crop(4)"})
    with pytest.raises(UserError, match=rf"config\.data\.{field}='center_crop\(4\)'"):
        tiny.run(settings, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_batch_that_does_not_split_over_the_devices_is_refused(tmp_path):
    if jax.device_count() == 1:
        pytest.skip("one device divides every batch")
    with pytest.raises(UserError, match=r"config\.stage1\.batch_size is 17"):
        tiny.run(tiny.config(**{"stage1.batch_size": 17}), tmp_path / "new")


@pytest.fixture
def stopped_job(monkeypatch):
    """Runs a tiny job that gets a signal once a given step was written."""

    def run(workdir, number, stage, step):
        write = MetricWriter.write

        def write_and_signal(self, of_stage, at_step, metrics):
            write(self, of_stage, at_step, metrics)
            if (of_stage, at_step) == (stage, step):
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(MetricWriter, "write", write_and_signal)
            with pytest.raises(Interrupted) as stopped:
                tiny.run(tiny.config(), workdir)
        return stopped.value

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_ends_bit_identically(
    finished, tmp_path, stopped_job, number
):
    before = signal.getsignal(number)
    assert stopped_job(tmp_path, number, "stage2", 4).signal_number == number
    assert signal.getsignal(number) == before
    steps = checkpoint.steps_in(checkpoint.stage_folder(tmp_path, "stage2"))
    assert 4 <= steps[-1] < 6
    tiny.run(tiny.config(), tmp_path)
    assert_equal_bits(averages(tmp_path, "stage2"), averages(finished[0], "stage2"))
    assert without_times(tmp_path) == without_times(finished[0])


def test_signal_in_an_evaluation_saves_and_the_evaluation_is_done_later(
    finished, tmp_path, monkeypatch
):
    rows = Context.rows

    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return rows(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "rows", signalled)
        with pytest.raises(Interrupted):
            tiny.run(tiny.config(), tmp_path)
    folder = checkpoint.stage_folder(tmp_path, "stage1")
    assert checkpoint.steps_in(folder)[-1] == 3
    assert not (folder / "3" / "metrics").exists()
    tiny.run(tiny.config(), tmp_path)
    assert_equal_bits(averages(tmp_path, "stage2"), averages(finished[0], "stage2"))
    assert without_times(tmp_path) == without_times(finished[0])


@pytest.mark.jobs
def test_two_processes_train_like_one(tmp_path):
    """Each process reads its own part of every batch; figures and files are one."""
    settings = tiny.config(stages="stage1", seed=3, **{"stage1.num_steps": 3})
    defaults = dict(flatten(small.get_config()))
    flags = [
        f"--config.{name}={value}"
        for name, value in flatten(settings)
        if value != defaults[name]
    ]
    command = [sys.executable, "-m", "atebm_jax.main", "--config=tests/small.py"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = tiny.environment()
    port = 20_000 + os.getpid() % 20_000
    together = [
        subprocess.Popen(
            [*command, *flags, f"--workdir={tmp_path / 'two'}"]
            + [f"--coordinator=localhost:{port}", "--num_processes=2"]
            + [f"--process_id={rank}"],
            cwd=ROOT,
            env=environment,
            **quiet,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=300)[0] for process in together]
    assert [process.returncode for process in together] == [0, 0], printed
    tiny.run(settings, tmp_path / "one")
    one, two = (
        averages(tmp_path / "one", "stage1"),
        averages(tmp_path / "two", "stage1"),
    )
    # Rows lie on other devices, so sums over the batch round differently; three steps
    # of a learning rate of 0.1 leave that below 1e-4 on weights of about 0.1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)
