"""What a command shows while it runs."""

import io
import re

import pytest
import tiny
from rich.console import Console

from atebm_jax.progress import ProgressLine, parts, say, track

METRICS = {
    "T": 3.0,
    "auc": 0.812,
    "loss_ce": 1.5,
    "loss_bce": 0.25,
    "images_per_second": 640.0,
}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_stage_step_t_auc_losses_and_speed(terminal):
    printed = io.StringIO()
    console = Console(file=printed, width=160, force_terminal=terminal)
    line = ProgressLine(console, "stage2", 0, 100)
    line.show(40, METRICS)
    line.close()
    shown = printed.getvalue()
    for part in ("stage2", "40/100", "T 3", "AUC 0.81", "CE 1.500", "BCE 0.250"):
        assert part in shown
    assert "640 img/s" in shown


def test_every_loss_is_shown_the_cross_entropy_first():
    printed = io.StringIO()
    line = ProgressLine(Console(file=printed, width=160), "new", 0, 100)
    line.show(40, {"loss": 9.0, "loss_smooth": 2.0, **METRICS})
    expected = "T 3  AUC 0.81  CE 1.500  BCE 0.250  smooth 2.000  640 img/s"
    assert printed.getvalue() == f"new step 40/100  {expected}\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_names_are_shown_as_they_are(name, terminal):
    printed = io.StringIO()
    console = Console(file=printed, width=200, force_terminal=terminal)
    say(console, f"it is in {name}")
    line = ProgressLine(console, name, 0, 9)
    line.show(3, METRICS)
    line.note(f"moved {name}")
    line.close()
    with parts(console) as show:
        show(f"scores of {name}", 1, 2)
    shown = without_styles(printed.getvalue())
    for words in (f"it is in {name}", f"moved {name}", f"scores of {name}"):
        assert words in shown
    assert f"{name} step 3/9" in shown or f"{name} " in shown


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("terminal", [True, False])
def test_items_are_gone_through_with_a_bar_on_terminals_alone(terminal):
    printed = io.StringIO()
    console = Console(file=printed, width=80, force_terminal=terminal)
    assert list(track(iter("abc"), "letters", console, total=3)) == ["a", "b", "c"]
    assert ("letters" in printed.getvalue()) == terminal


def test_names_that_are_no_utf8_are_escaped_on_a_stream(tmp_path):
    """A stream of a notebook takes no surrogates, and has no other way for them."""
    with (tmp_path / "printed").open("w", encoding="utf-8") as file:
        say(Console(file=file, width=200), "in caf\udce9")
    assert (tmp_path / "printed").read_text() == "in caf\\xe9\n"
