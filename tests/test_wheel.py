"""What an installed package has: no clone is needed to run it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from atebm_jax import UserError, command_line

ROOT = Path(__file__).parents[1]
# Without the clone's other folders, and away from the build folder that it may have.
BUILT_FROM = (
    "atebm_jax",
    "configs",
    "launch",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_the_package_is_in_the_wheel():
    files = (ROOT / "atebm_jax").rglob("*.py")
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in files}
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({*folders, "atebm_jax.configs", "atebm_jax.launch"})


def test_version_is_said_alike():
    version = project()["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel, and none of its dependencies."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([*pip, *made, str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", f"--target={target}", str(wheel)], check=True
    )
    return target


def run(site, folder, *words):
    return subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_installed_package_runs_a_config_by_its_name(site, tmp_path):
    done = run(site, tmp_path, site / "bin/atebm-jax", "--config=digits", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    where = "import atebm_jax; print(*atebm_jax.__path__, atebm_jax.__version__)"
    said = run(site, tmp_path, sys.executable, "-c", where).stdout.split()
    assert said == [str(site / "atebm_jax"), project()["project"]["version"]]


def test_installed_package_has_what_its_pages_need(site):
    for name in ("demo/page.css", "evaluate/report.css", "evaluate/report.js"):
        assert (site / "atebm_jax" / name).read_text()


def test_installed_package_has_the_models_that_ship(site):
    folders = (ROOT / "atebm_jax", site / "atebm_jax")
    files = [
        {p.relative_to(f) for p in (f / "zoo").rglob("*") if p.is_file()}
        for f in folders
    ]
    assert files[0] == files[1] and Path("zoo/digits/model.safetensors") in files[0]


def test_installed_launcher_takes_a_config_by_its_name(site, tmp_path):
    launcher = site / "atebm_jax" / "launch" / "local.sh"
    assert os.access(launcher, os.X_OK)
    done = run(site, tmp_path, launcher, "cifar10:small", "runs/x", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "-m atebm_jax.main --config=cifar10:small --workdir=runs/x" in done.stdout
    done = run(site, tmp_path, launcher, "nothing", "runs/x", "--dry_run")
    assert done.returncode == 2 and "no config file nothing" in done.stderr


def test_name_of_a_config_gives_way_to_a_file_that_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.config_file("cifar10:small") == (
        f"{ROOT / 'configs' / 'cifar10.py'}:small"
    )
    assert command_line.load_config("digits").data.image_shape == (8, 8, 1)
    (tmp_path / "digits").write_text("")
    assert command_line.config_file("digits") == "digits"
    with pytest.raises(UserError, match="cifar10, cifar100, digits, imagenet256"):
        command_line.load_config("digit")
