"""The page of claims: which runs there are, what they say, and what is written."""

import json
import sys
from pathlib import Path

import pytest
import tiny
from ml_collections import ConfigDict

from atebm_jax import UserError, autoattack, command_line

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims


def flags(workdir, *more):
    wanted = [f"--workdir={workdir}", f"--config={tiny.DIGITS}", *more]
    return claims._flags(wanted)


def test_interval_of_three_seeds_is_worked_by_hand():
    """Student's quantile of two degrees of freedom is 4.3027; deviation 1."""
    mean, reach = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and reach == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert claims.interval([1.0, 2.0, 3.0]).text(1) == "2.0 ± 2.5"
    assert claims.interval([0.5]).text(2) == "0.50"


@pytest.mark.parametrize(
    ("gains", "slack", "said"),
    [
        ([1.0, 1.1, 0.9], 0.0, "holds"),
        ([-1.0, -1.1, -0.9], 0.0, "does not hold"),
        ([1.0, -1.0, 0.1], 0.0, "not decided by these seeds"),
        ([-0.01, -0.011, -0.009], 0.02, "holds"),
        ([1.0], 0.0, "not decided: fewer than two seeds"),
        ([], 0.0, "not decided: fewer than two seeds"),
    ],
)
def test_claim_holds_where_its_whole_interval_says_so(gains, slack, said):
    assert claims.verdict(gains, slack) == said


def finish(folder, records, **report):
    """What a job leaves behind that the page is made of."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"stage": "stage2", **record}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    stages = {"stages": {"stage2": {"step": 2}}}
    (folder / "report.json").write_text(json.dumps(stages | report))


def steps(loss=1.0, clean=0.9):
    shown = {"score_real": 2.0, "score_contrastive": 1.0, "gradient_norm": 3.0}
    first = {"step": 1, "eval_clean_accuracy": 0.9}
    first |= {"eval_robust_accuracy": 0.5, "eval_sample_distance": 4.0}
    last = first | {"step": 2, "eval_clean_accuracy": clean}
    return [{"step": 1, "loss": loss, "auc": 0.8, **shown}, first, last]


@pytest.mark.parametrize(
    ("records", "report", "said"),
    [
        (steps(), {}, None),
        (steps(loss=-2e8), {}, "step 1: loss -2e+08"),
        (steps(clean=0.1), {}, "accuracy lost: 0.10 after 0.90"),
        (steps(), {"diverged": {"step": 7, "seen": "NaN"}}, "step 7: NaN"),
    ],
)
def test_divergence_is_found_in_what_a_run_leaves(tmp_path, records, report, said):
    finish(tmp_path / "run", records, **report)
    folder = claims.Run("run", 0).folder(tmp_path).parent
    assert claims.divergence(folder) == said


def test_second_stages_start_from_the_first_of_their_seed(tmp_path):
    chosen, overrides = flags(
        tmp_path, "--rows=dat,jem", "--seeds=3", "--config.stage2.batch_size=32"
    )
    runs = claims.all_runs(chosen)
    judge, first = claims.Run("at", claims.JUDGE_SEED), claims.Run("at", 3)
    # `at` is trained although nobody asked for it.
    assert runs[:2] == [judge, first] and len(runs) == 4 + 2 * 2
    config = claims.settings(claims.Run("dat", 3, 0.1), chosen, overrides)
    assert config.stages == "stage2" and config.seed == 3
    assert config.init_from == str(first.folder(tmp_path))
    assert config.stage2.learning_rate == pytest.approx(0.1 * 0.01)
    assert config.stage2.batch_size == 32 and config.on_dying == "report"
    own = command_line.load_config(f"{tiny.DIGITS}:jem")
    config = claims.settings(claims.Run("jem", 3), chosen, [])
    assert config.stages == "jem" and config.init_from == ""
    assert config.jem == own.jem
    scratch = claims.settings(claims.Run("dat_one_stage", 3), chosen, [])
    assert scratch.init_from == "random"


def test_page_says_claim_by_claim_what_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_draw_samples", lambda *_: None)
    page, workdir = tmp_path / "docs" / "claims.md", tmp_path / "runs"
    chosen, _ = flags(
        workdir, "--rows=dat,jem", "--seeds=0,1", "--factors=10", f"--out={page}"
    )
    runs = claims.all_runs(chosen)[1:]
    distances = {"at": 9.0, "dat": 5.0, "jem": 6.0}
    for run in runs:
        died = run.row == "jem" and run.factor == 10
        distance = distances[run.row] + 0.1 * run.seed * (run.row != "jem")
        robust = 0.6 + 0.002 * run.seed * (run.row == "dat")
        end = {"robust_accuracy": robust + 0.1, "sample_distance": distance}
        ended = {"stages": {"stage1": {}, "stage2": end}}
        if died:
            # Its last checkpoint has figures, which are not shown.
            ended |= {"diverged": {"step": 2, "seen": "energies run away"}}
        finish(run.folder(workdir), steps(), **ended)
        figures = {"job": {"sample_distance": distance}}
        figures["autoattack"] = {"accuracy_after_square": robust}
        if run.factor == 1:
            (run.folder(workdir) / "figures.json").write_text(json.dumps(figures))
    drawn = {}
    panels = claims.pictures.panels

    def draw(path, lines, *named):
        drawn[path.name] = lines
        panels(path, lines, *named)

    monkeypatch.setattr(claims.pictures, "panels", draw)
    claims.write_page(chosen, [], runs)
    text = page.read_text()
    assert text.startswith("# The paper's claims on the digits\n")
    assert "## Noise told from digits, AUROC" in text
    assert "**Holds**: 2 runs of JEM and 0 of ours diverged" in text
    assert "| jem | 10 x | 2 | 2 |  |  |" in text
    assert "| dat | 1 x | 2 | 0 | 0.701 ± 0.013 | 5.05 ± 0.64 |" in text
    assert "* jem, 10 x, seed 1: step 2: energies run away" in text
    same = "**Holds**: distance of `dat` less that of `at` is -4.00 ± 0.00 (2 seeds)."
    assert same in text
    assert "`dat` less that of `at` is 0.001 ± 0.013 (2 seeds); 0.02 worse" in text
    assert "**Holds**: distance of `dat` less that of `jem`" in text
    assert "**Not decided by these seeds**: AutoAttack of `dat` less that of" in text
    assert "**Not decided: fewer than two seeds**." in text  # RATIO was not run
    assert "| dat | 5.05 ± 0.64 |" in text
    for name in ("curves", "trade"):
        assert f"(images/claims_{name}.png)" in text
        assert (page.parent / "images" / f"claims_{name}.png").stat().st_size > 1000
    # All of JEM's runs at the other rate diverged: there is nothing better to tell.
    assert "is better at" not in text
    looks = {
        (line.label, line.style, line.crossed)
        for line in drawn["claims_curves.png"]["AUC"]
    }
    assert looks == {
        ("jem, 1 x", "-", False),
        ("jem, 10 x", ":", True),
        ("dat, 1 x", "-", False),
        ("dat, 10 x", ":", False),
    }


def test_page_says_where_jem_is_better_at_another_rate(tmp_path):
    runs = []
    for seed in range(4):
        runs += [claims.Run("dat", seed), claims.Run("jem", seed)]
        runs.append(claims.Run("jem", seed, 10.0))
        for run, robust, distance in zip(
            runs[-3:], (0.8, 0.5, 0.7), (0.4, 0.6 + seed, 0.5 + seed % 2)
        ):
            end = {"robust_accuracy": robust, "sample_distance": distance}
            ended = {"diverged": {"step": 3, "seen": "nan"}} if seed == 3 else {}
            died = ended if run.factor == 10 else {}
            finish(run.folder(tmp_path), steps(), stages={"jem": end}, **died)
    robust, distance, other = (
        next(claim for claim in claims.CLAIMS if claim.title == title)
        for title in (
            "More robust than JEM",
            "Better samples than JEM's",
            "R1 does not replace it",
        )
    )
    (said,) = claims._at_another_rate(robust, runs, str(tmp_path))
    assert said.strip() == (
        "`jem` is better at 10 times its learning rate (1 of its runs diverged): "
        "PGD 0.700 ± 0.000, at its own 0.500 ± 0.000; `dat` at its own 0.800 ± 0.000."
    )
    # Better on average, but not by what the seeds show.
    assert list(claims._at_another_rate(distance, runs, str(tmp_path))) == []
    assert list(claims._at_another_rate(other, runs, str(tmp_path))) == []


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("digits:train", "digits"),
        ("tfds:cifar10:train[:45000]", "cifar10"),
        ("folder:/photographs/train", "/photographs/train"),
    ],
)
def test_page_is_named_after_the_data(train, name):
    assert claims._data_name(ConfigDict({"data": {"train": train}})) == name


def test_mistakes_are_told_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="unknown row 'dta'.*Did you mean 'dat'"):
        flags(tmp_path, "--rows=dta")
    with pytest.raises(UserError, match="unknown argument '--sedes=1'"):
        flags(tmp_path, "--sedes=1")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seeds=one", "'one' is no seed"),
        ("--seeds=", "'' is no seed"),
        ("--seeds=1,1", "'1,1' has a value twice"),
        ("--seeds=1000", "1000, the seed of the run whose features score"),
        ("--factors=0", "'0' is no other rate"),
        ("--factors=ten", "'ten' is no other rate"),
        ("--factors=1", "but 1, which every row has"),
        ("--factors=10,10.0", "has a value twice"),
        ("--rows=jem,jem", "has a value twice"),
        ("--rows=", "a row has no name"),
    ],
)
def test_seeds_rates_and_rows_that_make_no_sense_are_one_sentence(
    flag, said, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        flags(tmp_path, flag)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert flag.partition("=")[0] in error and said in error


@pytest.mark.parametrize(
    ("override", "said", "begun"),
    [
        ("--config.stage1.num_steps=0", "row at: .*stage1", False),
        ("--config.jem.fresh_share=1.5", "row jem: .*jem.fresh_share is 1.5", False),
        ("--config.data.train=folder:/absent", "/absent", True),
    ],
)
def test_run_that_cannot_be_trained_ends_the_command_and_leaves_the_page(
    override, said, begun, tmp_path, capsys
):
    page = tmp_path / "claims.md"
    page.write_text("as it was")
    arguments = [f"--workdir={tmp_path / 'runs'}", f"--config={tiny.DIGITS}"]
    arguments += ["--rows=at,jem", "--seeds=0", f"--out={page}", override]
    with pytest.raises(UserError, match=said):
        claims.main(arguments)
    assert ("run 1 of" in capsys.readouterr().out) == begun
    assert page.read_text() == "as it was"


@pytest.mark.slow
def test_runs_are_trained_evaluated_and_not_again(tmp_path, monkeypatch, capsys):
    few = {"num_steps": 3, "num_queries": 5, "targets": 2, "fab_targets": 2}
    run = autoattack.run
    monkeypatch.setattr(autoattack, "run", lambda *a, **k: run(*a, settings=few, **k))
    page = tmp_path / "claims.md"
    blocks = {
        "stage1": {},
        "stage2": {"warmup_steps": 0},
        "jem": {"warmup_steps": 0, "buffer_size": 32},
    }
    overrides = {"model": {"name": "small"}, "evaluate": tiny.config().evaluate}
    for name, more in blocks.items():
        overrides[name] = {"batch_size": 16, "num_steps": 4, "eval_every_steps": 2}
        overrides[name] |= {"checkpoint_every_steps": 2, **more}
    given = [
        f"--config.{field}={value}"
        for field, value in claims.configuration.flatten(ConfigDict(overrides))
    ]
    arguments = [f"--workdir={tmp_path / 'runs'}", f"--config={tiny.DIGITS}"]
    arguments += ["--rows=dat,jem", "--seeds=0", "--factors=", "--num_examples=40"]
    arguments += ["--num_samples=40", f"--out={page}", *given]
    claims.main(arguments)
    assert "run 4 of 4: jem, seed 0" in capsys.readouterr().out
    text = page.read_text()
    assert "| jem | 1 x | 1 | 0 |" in text
    assert (tmp_path / "images" / "claims_samples.png").exists()
    together = (tmp_path / "runs" / "report.html").read_text()
    assert all(row in together for row in ("at", "dat", "jem"))
    # Every cell of the three rows is filled.
    assert " - |" not in text.partition("## Classification")[2]
    claims.main(arguments)
    assert "run " not in capsys.readouterr().out
    assert page.read_text() == text
