"""Notebooks: they run from top to bottom, and are stored as they ran."""

import importlib.metadata
import importlib.util
import runpy
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "energy_landscape", "import_and_sample")
# `tests/test_demo.py` runs this one: it opens a page.
ALL = (*NAMES, "demo")
LARGEST_BYTES = 300_000


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def setup_cell():
    return code_cells(read("quickstart"))[0].source


def number_of_pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.jobs
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_shows_its_pictures_and_leaves_nothing(
    name, tmp_path, monkeypatch
):
    home, scratch, here = (tmp_path / part for part in ("jupyter", "tmp", "here"))
    for folder in (home, scratch, here):
        folder.mkdir()
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("TMPDIR", str(scratch))
    notebook = read(name)
    pictures = number_of_pictures(notebook)
    resources = {"metadata": {"path": str(here)}}
    # Its own assertions are the test; the first that fails stops it.
    NotebookClient(notebook, timeout=900, resources=resources).execute()
    assert number_of_pictures(notebook) == pictures > 0
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_one_run_without_errors(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST_BYTES


def test_all_notebooks_begin_with_the_same_setup():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(ALL)
    assert {code_cells(read(name))[0].source for name in ALL} == {setup_cell()}


@pytest.fixture
def installs(monkeypatch, tmp_path):
    """Runs the setup cell on a machine without the package; what pip would get."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    commands = []
    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command)
    )
    monkeypatch.chdir(tmp_path)

    def run(folder=tmp_path, repository="", programs=(), plugins=()):
        monkeypatch.setattr(shutil, "which", {p: p for p in programs}.get)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name if name in plugins else None
        )
        monkeypatch.chdir(folder)
        source = setup_cell()
        assert source.count('REPOSITORY = ""') == 1
        cell = tmp_path / "setup.py"
        cell.write_text(source.replace('""', f'"{repository}"', 1))
        runpy.run_path(str(cell))
        [command] = commands
        return command[command.index("-q") + 1 :]

    return run


URL = "https://example.org/atebm.git"


def test_setup_installs_from_the_repository_for_a_gpu(installs):
    made = installs(repository=URL, programs=["nvidia-smi"])
    assert made == [f"atebm_jax[cuda] @ git+{URL}"]


def test_setup_keeps_the_cuda_that_is_there(installs):
    here = {"programs": ["nvidia-smi"], "plugins": ["jax_cuda12_plugin"]}
    made = installs(repository=URL, **here)
    assert made == [f"atebm_jax @ git+{URL}", "jax[cuda12]"]


def test_setup_installs_the_clone_that_it_lies_in(installs):
    [made] = installs(folder=FOLDER, repository=URL)
    assert made.endswith(f"] @ {FOLDER.parent.as_uri()}")


def test_setup_says_that_the_repository_must_be_given(installs):
    with pytest.raises(SystemExit, match="Set REPOSITORY above"):
        installs()
