"""Evaluations as one file: complete in itself, and side by side where comparable."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tiny
from etils import epath

from atebm_jax import UserError
from atebm_jax.evaluate import html, report

PICTURE = b"\x89PNG a picture"
TEST = {"source": "digits:test", "num_images": 80, "num_in_source": 359, "sha256": "5"}
TEST |= {"image_shape": [8, 8, 1], "preprocess": ""}


def content(accuracy, robust, **protocol):
    """A report with two metrics, the second one with a picture."""
    share = {"value": accuracy, "interval_95": [accuracy - 0.1, accuracy + 0.1]}
    attack = {"norm": "l2", "num_steps": 20, "notes": ["<none>"]} | protocol
    return {
        "checkpoint": {"path": "runs/<x>", "stage": "stage2", "step": 6}
        | {"averaged_weights_sha256": "0"},
        "data": {"test": TEST},
        "metrics": {
            "accuracy": {
                "protocol": {"interval": "Wilson"},
                "figures": {"clean_accuracy": share | {"count": 80}},
            },
            "pgd": {
                "protocol": attack,
                "figures": {
                    "robust_0.5": {"value": robust},
                    "robust_1": {"value": None},
                },
                "plots": ["curve.png"],
            },
        },
        "versions": {"jax": "1"},
        "seed": 0,
        "device": "1 x cpu",
        "notes": [],
    }


def written(folder, made):
    folder.mkdir(parents=True)
    (folder / "curve.png").write_bytes(PICTURE)
    report.write_figures(epath.Path(folder), made)
    return (folder / "report.html").read_text()


class Page(HTMLParser):
    """The texts and attributes of a page, in their order."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes

    def handle_data(self, text):
        self.texts.append(text)


def parsed(text):
    page = Page()
    page.feed(text)
    return page


@pytest.fixture
def runs(tmp_path):
    """Two workdirs with an evaluation each, and a folder to write to."""
    for name, made in {"a": content(0.9, 0.5), "b": content(0.8, 0.6)}.items():
        written(tmp_path / name / "evaluation", made)
    return tmp_path


def changed(folder, **fields):
    path = folder / "evaluation" / "report.json"
    made = json.loads(path.read_text())
    made["metrics"]["pgd"]["protocol"] |= fields
    path.write_text(json.dumps(made))


def only(folder, metric):
    """Leaves one metric in a report."""
    path = folder / "evaluation" / "report.json"
    made = json.loads(path.read_text())
    made["metrics"] = {metric: made["metrics"][metric]}
    path.write_text(json.dumps(made))


def test_report_is_one_file_that_loads_nothing(tmp_path):
    text = written(tmp_path / "evaluation", content(0.9, 0.5))
    page = parsed(text)
    assert {"clean_accuracy", "0.9000", "0.8000 to 1.0000", "80"} <= set(page.texts)
    assert "none" in page.texts and "<x>" not in text
    assert any("runs/<x>" in words for words in page.texts)
    (source,) = [value for name, value in page.attributes if name == "src"]
    assert source.startswith("data:image/png;base64,")
    # Nothing but the places in the page itself is linked.
    links = [value for name, value in page.attributes if name == "href"]
    assert links == ["#accuracy", "#pgd"] and "http" not in text and "url(" not in text


@pytest.mark.parametrize(
    ("clicks", "order"),
    [((1,), "bca"), ((1, 1), "acb"), ((0,), "abc"), ((0, 0), "cba")],
)
def test_click_on_a_title_sorts_its_column(tmp_path, clicks, order):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here")
    made = content(0.9, 0.5)
    values = {"b": 10.0, "a": 9.0, "c": 9.5}
    made["metrics"]["accuracy"]["figures"] = {
        k: {"value": v} for k, v in values.items()
    }
    file = tmp_path / "sorted.html"
    click = "".join(
        f"document.querySelectorAll('thead button')[{k}].click();" for k in clicks
    )
    text = written(tmp_path / "evaluation", made)
    file.write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    texts = parsed(done.stdout).texts
    assert "".join(word for word in texts if word in values) == order


def test_evaluations_stand_side_by_side(runs):
    places = [f"ours={runs / 'a'}", f"<theirs>={runs / 'b' / 'evaluation'}"]
    html.compare(places, [], epath.Path(runs / "out"))
    page = parsed((runs / "out" / "report.html").read_text())
    titles = page.texts[page.texts.index("figure") :][:3]
    assert titles == ["figure", "ours", "<theirs>"]
    row = page.texts[page.texts.index("clean_accuracy") :][:5]
    assert row[1::2] == ["0.9000", "0.8000"]
    assert sum(name == "src" for name, _ in page.attributes) == 2
    values = [float(v) for name, v in page.attributes if name == "data-value"]
    assert values == [0.9, 0.8, 0.5, 0.6]
    html.compare(places, ["accuracy"], epath.Path(runs / "out"))
    assert "robust_0.5" not in (runs / "out" / "report.html").read_text()


def test_what_measured_differently_is_refused_by_its_field(runs):
    places = [str(runs / "a"), str(runs / "b")]
    changed(runs / "b", notes=["another"])
    html.compare(places, [], epath.Path(runs / "out"))
    changed(runs / "b", num_steps=10)
    message = "b cannot be compared: pgd.num_steps is 20 and 10; evaluate both alike"
    with pytest.raises(UserError, match=message):
        html.compare(places, [], epath.Path(runs / "out"))
    html.compare(places, ["accuracy"], epath.Path(runs / "out"))
    path = runs / "b" / "evaluation" / "report.json"
    path.write_text(path.read_text().replace('"sha256": "5"', '"sha256": "6"'))
    with pytest.raises(UserError, match="data.test.sha256 is '5' and '6'"):
        html.compare(places, ["accuracy"], epath.Path(runs / "out"))


def test_every_two_are_checked_also_where_the_first_has_not_their_metric(runs):
    written(runs / "first" / "evaluation", content(0.7, 0.4))
    places = [str(runs / name) for name in ("first", "a", "b")]
    only(runs / "first", "accuracy")
    html.compare(places, [], epath.Path(runs / "out"))
    changed(runs / "b", norm="linf")
    with pytest.raises(UserError, match="a and .*b cannot be .*pgd.norm is 'l2' and"):
        html.compare(places, [], epath.Path(runs / "out"))


def test_none_stands_without_a_figure_beside_its_own(runs):
    written(runs / "c" / "evaluation", content(0.7, 0.5))
    only(runs / "a", "accuracy")
    only(runs / "b", "pgd")
    # What two have not in common, each may have in common with a third one.
    places = [str(runs / name) for name in "abc"]
    html.compare(places, [], epath.Path(runs / "out"))
    with pytest.raises(UserError, match="a has no metric in common with .*b: evaluate"):
        html.compare(places[:2], [], epath.Path(runs / "out"))


def test_names_of_models_and_folders_with_an_equals_sign_are_places(runs):
    written(runs / "lr=0.1" / "evaluation", content(0.7, 0.5))
    places = [str(runs / "lr=0.1"), f"b={runs / 'lr=0.1'}"]
    html.compare(places, [], epath.Path(runs / "out"))
    assert f"<h2>{runs}/lr=0.1</h2>" in (runs / "out" / "report.html").read_text()
    places = ["zoo:digits", "again=zoo:digits"]
    html.compare(places, ["accuracy"], epath.Path(runs / "out"))
    assert "<h2>again</h2>" in (runs / "out" / "report.html").read_text()
    with pytest.raises(
        UserError, match="hf:a/b: a name on a hub stands for weights al"
    ):
        html.compare(["hf:a/b", places[0]], [], epath.Path(runs / "out"))


@pytest.mark.parametrize(
    ("names", "metrics", "message"),
    [
        (["a"], [], "give two or more evaluations, each once"),
        (["a", "a"], [], "give two or more evaluations, each once"),
        (["a", "nowhere"], [], "nowhere/report.json cannot be read"),
        (["a", "b"], ["ood"], "has no metric 'ood': it has accuracy, pgd"),
    ],
)
def test_comparison_of_nothing_is_refused(runs, names, metrics, message):
    places = [str(runs / name) for name in names]
    with pytest.raises(UserError, match=message):
        html.compare(places, metrics, epath.Path(runs / "out"))
    assert not (runs / "out").exists()


def test_report_of_a_job_is_no_evaluation(runs):
    (runs / "job").mkdir()
    report.write_stages(epath.Path(runs / "job"), {"stages": {}})
    with pytest.raises(UserError, match="is no report of an evaluation"):
        html.compare([str(runs / "a"), str(runs / "job")], [], epath.Path(runs / "out"))


PLOTS = ["../secret.png", "/secret.png", "..", "", "secret", "a\n.png", 1]


@pytest.mark.parametrize("plot", PLOTS)
def test_report_names_no_file_but_its_own_plots(runs, plot):
    (runs / "a" / "secret.png").write_bytes(b"secret")
    folder = epath.Path(runs / "a" / "evaluation")
    made = json.loads((folder / "report.json").read_text())
    made["metrics"]["pgd"]["plots"] = [plot]
    (folder / "report.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="report.json has the plot .*: expected the na"):
        report.read_figures(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, None)
            for field in ("checkpoint", "data", "versions", "seed", "notes")
        ),
        ("metrics", []),
        ("metrics", {"pgd": {"figures": {}}}),
        ("metrics", {"pgd": {"protocol": {}, "figures": {"robust": {}}}}),
        ("metrics", {"pgd": {"protocol": {}, "figures": {"robust": {"value": "x"}}}}),
        ("metrics", {"pgd": {"protocol": {}, "figures": {}, "plots": 1}}),
        ("data", {"test": {"source": "digits:test"}}),
    ],
)
def test_report_that_is_not_whole_is_told_in_one_sentence(runs, field, value):
    folder = epath.Path(runs / "a" / "evaluation")
    made = json.loads((folder / "report.json").read_text())
    made = {k: x for k, x in made.items() if k != field}
    made |= {} if value is None else {field: value}
    (folder / "report.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="no report of an evaluation, or not whole"):
        report.read_figures(folder)


def test_what_a_report_says_is_no_markup(runs):
    """A count that is a text would end the attribute that it is sorted by."""
    made = content(0.9, 0.5)
    figure = {"value": 0.5, "count": '"><b>', "interval_95": ['"><b>', None]}
    made["metrics"]["accuracy"]["figures"] = {"clean_accuracy": figure}
    assert "<b>" not in written(runs / "c", made)


def test_sampling_is_a_models_own_choice_and_the_extractor_is_not(runs):
    for name, steps, weights in (("a", 20, "0"), ("b", 35, "0")):
        path = runs / name / "evaluation" / "report.json"
        made = json.loads(path.read_text())
        protocol = {"num_steps": steps, "extractor": {"weights_sha256": weights}}
        made["metrics"] = {"generation": {"protocol": protocol, "figures": {}}}
        path.write_text(json.dumps(made))
    places = [str(runs / "a"), str(runs / "b")]
    html.compare(places, [], epath.Path(runs / "out"))
    path.write_text(path.read_text().replace('_sha256": "0"', '_sha256": "1"'))
    message = "generation.extractor.weights_sha256"
    with pytest.raises(UserError, match=message):
        html.compare(places, [], epath.Path(runs / "out"))


@pytest.mark.parametrize("flag", ["--workdir=x", "--checkpoint=x", "--seed=1"])
def test_comparison_needs_a_place_and_no_model(flag, capsys):
    with pytest.raises(SystemExit):
        tiny.evaluate("--compare=a,b", flag)
    assert "--compare reads finished evaluations: give --out" in capsys.readouterr().err
