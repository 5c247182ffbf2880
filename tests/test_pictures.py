"""Pictures are drawn, whatever is on them."""

import warnings

import numpy as np
import pytest
from etils import epath
from PIL import Image

from atebm_jax import pictures


def test_contact_sheet_fills_rows_and_leaves_the_rest_white():
    images = np.repeat(np.uint8([10, 20, 30]), 24 * 20).reshape(3, 24, 20, 1)
    sheet = pictures.contact_sheet(images)
    # Two a row, a line between them, each pixel twice as large.
    assert sheet.shape == (2 * 2 * 25, 2 * 2 * 21, 1) and sheet.dtype == np.uint8
    assert (sheet[:48, :40] == 10).all() and (sheet[:48, 42:82] == 20).all()
    assert (sheet[50:98, :40] == 30).all() and (sheet[50:, 42:] == 255).all()
    assert (sheet[48:50] == 255).all() and (sheet[:, 40:42] == 255).all()


def test_sample_grid_has_a_column_a_class_and_black_for_what_is_no_number():
    images = np.full((5, 2, 2, 3), 0.5) * np.arange(5)[:, None, None, None]
    images[2] = np.nan
    canvas = pictures._by_class(images, np.array([1, 0, 1, 7, 1]), 3, 2)
    assert canvas.shape == (6, 9, 3)
    columns = {0: (0.5, 1.0), 1: (0.0, 0.0), 2: (1.0, 1.0)}
    for column, values in columns.items():
        for row, value in enumerate(values):
            shown = canvas[3 * row : 3 * row + 2, 3 * column : 3 * column + 2]
            assert (shown == value).all()


def test_picture_that_is_not_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    pictures.curve(path, {1: 2.0, 0: 1.0}, ("steps", "distance"))
    before = path.read_bytes()
    monkeypatch.setattr(
        pictures.Figure, "savefig", lambda *a, **k: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        pictures.curve(path, {1: 2.0}, ("steps", "distance"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_names_in_plots_are_no_formulas(tmp_path):
    path = epath.Path(tmp_path) / "grid.png"
    samples_of_all = {r"$\frac$": (np.zeros((2, 8, 8, 1)), np.arange(2))}
    names = [r"$\x$", r"$y_1$"]
    pictures.sample_grid(
        path, samples_of_all, num_classes=2, num_rows=1, class_names=names
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_numbers_of_a_logarithmic_axis_are_no_formulas(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    lines = {"norm": [pictures.Line("jem", [1, 2, 3], [0.5, 20.0, 3e3], "C0")]}
    pictures.panels(epath.Path(tmp_path) / "a.png", lines, ("step", ""), ("norm",))
    (figure,) = drawn
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"0", "1", "10", "100", "1000"} <= set(shown)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_drawn_for_grey_and_colour_and_for_broken_images(tmp_path, channels):
    images = np.random.default_rng(0).random((6, 8, 8, channels))
    images[2] = np.nan
    labels = np.arange(6) % 3
    path = epath.Path(tmp_path) / "grid.png"
    pictures.sample_grid(path, {"a": (images, labels)}, num_classes=3, num_rows=2)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    names = ["caf\udce9", "$a_{$", "\u6f22 50 % \\ ^"]
    images, labels = np.zeros((3, 8, 8, 1)), np.arange(3)
    path = epath.Path(tmp_path) / "grid.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.sample_grid(
            path,
            {"a": (images, labels)},
            num_classes=3,
            num_rows=1,
            class_names=names,
        )
        pictures.image_rows(path, {"a": images}, names)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_from_one_stage_alone(tmp_path):
    path = epath.Path(tmp_path) / "curves.png"
    pictures.training_curves(path, [{"stage": "stage2", "step": 5, "loss_ce": 1.0}])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_strips_show_colour_and_change_of_any_size(tmp_path):
    image = np.random.default_rng(0).random((6, 9, 3), np.float32)
    row = pictures.Row(
        {"original": image, "result": 1 - image},
        1 - 2 * image,
        {"p(cat)": np.linspace(0, 1, 4), "p(dog)": np.linspace(1, 0, 4)},
        np.linspace(5, -3, 4),
        hole=np.ones((6, 9), bool),
    )
    for rows in ([row], [row, row._replace(change=0 * image)]):
        pictures.strip(tmp_path / "strip.png", "colour", rows)
        assert Image.open(tmp_path / "strip.png").mode == "RGBA"


def test_names_in_a_strip_are_no_formulas(tmp_path):
    image, name = np.zeros((2, 2, 1), np.float32), r"a$x_$ 猫"
    row = pictures.Row({name: image}, image, {name: np.ones(2)}, np.ones(2))
    with warnings.catch_warnings(action="error"):
        pictures.strip(tmp_path / "strip.png", name, [row])
