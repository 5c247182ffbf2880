"""Who may import whom, and which rooms touch nothing but arrays."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "atebm_jax"

# From what knows nothing to what knows everything: a room imports earlier ones only.
ORDER = (
    "errors",
    "names",
    "calls",
    "local_path",
    "energy",
    "losses",
    "ascent",
    "attacks",
    "metrics",
    "models",
    "curriculum",
    "optim",
    "health",
    "stages",
    "train_step",
    "constraints",
    "autoattack",
    "sharding",
    "storage",
    "progress",
    "metric_writer",
    "workdir_lock",
    "config",
    "command_line",
    "data",
    "preemption",
    "seeds",
    "checksums",
    "fitting",
    "release_format",
    "model_names",
    "checkpoint",
    "trained",
    "compilation",
    "intact",
    "archs",
    "convert",
    "presets",
    "recipes",
    "drawing",
    "editing",
    "reachability",
    "pictures",
    "evaluate",
    "sample",
    "release",
    "train",
    "hlo",
    "targets",
    "dry_run",
    "target_costs",
    "target_programs",
    "target_run",
    "job",
    "main",
    "api",
    "demo",
    "__init__",
)

# Rooms that may know less than their place in the order allows.
FREE = ("energy", "metrics", "models", "curriculum", "optim")
FREE += ("calls", "health", "hlo", "targets")
FREE += ("data", "sharding", "config", "preemption", "storage", "progress")
FREE += ("checksums", "fitting")
KNOWS: dict[str, set[str]] = {name: set() for name in FREE} | {
    "data": {"names", "calls", "local_path", "storage", "progress", "workdir_lock"}
    | {"command_line"},
    "storage": {"local_path", "names"},
    "progress": {"names"},
    "sharding": {"names"},
    "losses": {"energy"},
    "ascent": {"calls"},
    "attacks": {"ascent", "losses"},
    "stages": {"energy", "losses", "ascent", "attacks", "metrics", "models"}
    | {"curriculum"},
    "config": {"stages", "models"},
    "train_step": {"stages", "optim"},
    "fitting": {"models"},
    "constraints": {"ascent"},
    "autoattack": {"energy", "losses", "attacks"},
    "metric_writer": {"storage"},
    "workdir_lock": {"sharding", "storage"},
    "intact": {"checkpoint", "train_step"},
    "compilation": {"names", "storage"},
    "pictures": {"names", "metrics", "data", "storage", "progress"},
    "reachability": {"data", "metrics", "recipes", "seeds"},
    "convert": {"models", "archs", "checkpoint", "checksums", "command_line", "config"}
    | {"names", "local_path", "storage", "progress"},
}

# No file, no clock, no log, no process: nothing but what these offer.
PURE = ("ascent", "attacks", "curriculum", "energy", "losses", "metrics", "models")
PURE += ("constraints", "health")
PURE_IMPORTS = {"atebm_jax", "collections", "contextlib", "dataclasses", "flax", "jax"}
PURE_IMPORTS |= {"functools", "inspect", "itertools", "math", "numpy", "scipy"}
PURE_IMPORTS |= {"typing"}
IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval", "__import__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of the modules and objects that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def rooms_known(path):
    """Other rooms that a file imports."""
    parts = [name.split(".") for name in imports(path)]
    known = {part[1] for part in parts if part[0] == "atebm_jax"}
    return known - {room(path), "errors"}


def files_of(*rooms):
    return [path for path in FILES if room(path) in rooms]


def name_of(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upwards_only(path):
    assert room(path) in ORDER, f"give {room(path)} a place in the order"
    earlier = set(ORDER[: ORDER.index(room(path))])
    assert rooms_known(path) <= KNOWS.get(room(path), earlier) & earlier


@pytest.mark.parametrize("path", files_of(*PURE), ids=name_of)
def test_pure_rooms_touch_no_file_no_clock_and_no_log(path):
    allowed = set(PURE_IMPORTS)
    allowed |= {"models": {"ml_collections", "re"}, "metrics": {"sklearn"}}.get(
        room(path), set()
    )
    assert {name.split(".")[0] for name in imports(path)} <= allowed
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & IMPURE_BUILTINS


@pytest.mark.parametrize("path", files_of("models"), ids=name_of)
def test_only_the_builders_of_networks_read_a_config(path):
    """A network is a function of its attributes; `build` fills them in."""
    tree = ast.parse(path.read_text())
    allowed = [n for n in tree.body if isinstance(n, ast.AnnAssign)]
    named = [(n, getattr(n, "name", "")) for n in tree.body]
    allowed += [n for n, name in named if name.startswith("build")]

    def uses(node):
        return sum(
            isinstance(x, ast.Name) and x.id in ("ml_collections", "config")
            for x in ast.walk(node)
        )

    assert uses(tree) == sum(uses(node) for node in allowed)


@pytest.mark.parametrize("path", files_of(*PURE, "stages"), ids=name_of)
def test_energies_are_formed_in_one_room(path):
    """The sign of an energy is written once: others ask for a score."""
    names = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert ("logsumexp" in names) == (room(path) == "energy")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_texts_are_never_parsed_as_markup(path):
    """rich takes "[bold]" in a plain string for a style, also in a user's path."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        function = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if function == "print" and isinstance(call.func, ast.Attribute):
            shown = ast.unparse(call.args[0])
            assert shown.startswith(("Text(", "table", "_table(")), shown
        if function == "TextColumn":
            assert any(ast.unparse(k) == "markup=False" for k in call.keywords)


def test_networks_know_nothing_of_the_forms_for_cpus():
    users = {
        name_of(path)
        for path in FILES
        if any(f"{name}.".startswith("atebm_jax.models.cpu.") for name in imports(path))
    }
    inside = {name for name in users if name.startswith("models/cpu/")}
    assert users - inside == {"models/layers.py"}


def test_guard_sees_lazy_imports_and_names_of_packages(tmp_path):
    """What the tests above rest on."""
    path = tmp_path / "x.py"
    path.write_text(
        "import os.path\nfrom atebm_jax import data\n"
        "def f():\n    from atebm_jax.train import Job\n"
    )
    assert list(imports(path)) == ["os.path", "atebm_jax.data", "atebm_jax.train.Job"]
