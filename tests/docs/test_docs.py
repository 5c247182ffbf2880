"""README and the pages of docs/ name only what there is."""

import ast
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import atebm_jax
from atebm_jax import archs, models
from atebm_jax.command_line import load_config
from atebm_jax.config import default, flatten

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
EVERY_PAGE = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
FIELDS = dict(flatten(default()))
GROUPS = {name.rpartition(".")[0] for name in FIELDS}
# What follows "config." besides fields: files, functions, the placeholder FIELD.
OTHER_ATTRIBUTES = {"json", "py", "default", "FIELD"}
# A key in the metadata of exported files.
NO_NAMES = {"atebm_jax.mean"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )


def code_spans(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [span.replace(r"\|", "|") for span in re.findall(r"`([^`\n]+)`", prose)]


def exists(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@EVERY_PAGE
def test_names_and_paths_in_backticks_exist(page: Path) -> None:
    missing = []
    for span in set(code_spans(page)) - NO_NAMES:
        if re.fullmatch(r"atebm_jax(\.\w+)+(\(.*\))?", span):
            missing += [span] * (not exists(span.partition("(")[0]))
        elif re.fullmatch(
            r"(atebm_jax|configs|docs|benchmarks|tests|launch|notebooks)/[\w./]+", span
        ):
            missing += [span] * (not (ROOT / span).exists())
    assert not missing


@EVERY_PAGE
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [x for x in local if x and not (page.parent / x).exists()] == []


@EVERY_PAGE
def test_fields_of_the_config_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"(?<![\w/.])(?:--)?config\.((?:\w+\.)*\w+)", text)
    # Without "config." where the group says so; `data.` is also a module.
    spans = [re.match(r"((?:stage[12]|evaluate)\.[\w.]+)", s) for s in code_spans(page)]
    named += [match[1] for match in spans if match]
    own = {"width"} if page.name == "own_network.md" else set()
    fields = {name.removeprefix("model.") for name in named}
    known = FIELDS.keys() | GROUPS | own | OTHER_ATTRIBUTES
    known |= {name.removeprefix("model.") for name in FIELDS}
    assert fields - known == set()


COMMAND = re.compile(
    r"python3? -m (atebm_jax[\w.]*)"
    r"|run_module\('(atebm_jax[\w.]*)'"
    r"|((?:benchmarks|tests/faults)/\w+\.py|launch/\w+\.sh)"
)
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")


@functools.cache
def flags_of(command: str) -> set[str]:
    """Names that the source of a command has as a string or field, flags among them."""
    if command.endswith(".sh"):
        text = (ROOT / command).read_text() + (ROOT / "launch/lib.sh").read_text()
        return set(FLAG.findall(text)) | flags_of("atebm_jax.main")
    files = [ROOT / command]
    if not command.endswith(".py"):
        path = ROOT.joinpath(*command.split("."))
        files = sorted(path.glob("*.py")) or [path.with_suffix(".py")]
        files.append(ROOT / "atebm_jax" / "command_line.py")
    else:
        files.append(ROOT / "benchmarks" / "options.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    strings = [n.value for n in nodes if isinstance(n, ast.Constant)]
    # Options of the evaluation are fields with the text of their flag.
    targets = [n.target for n in nodes if isinstance(n, ast.AnnAssign)]
    fields = {target.id for target in targets if isinstance(target, ast.Name)}
    named = {s.removeprefix("--") for s in strings if isinstance(s, str)}
    return named | fields | {"help"}


def commands(page: Path) -> list[tuple[str, set[str]]]:
    """(command, its flags) of every shell block and of commands in prose."""
    found = []
    for text in [*blocks(page, "bash"), *code_spans(page)]:
        for line in re.split(r"\n| && |; | \| ", text.replace("\\\n", " ")):
            if match := COMMAND.search(line):
                name = next(group for group in match.groups() if group)
                flags = set(FLAG.findall(line[match.end() :])) - {"config"}
                found.append((name, flags))
    return found


@EVERY_PAGE
def test_commands_have_their_flags(page: Path) -> None:
    for command, flags in commands(page):
        assert flags - flags_of(command) == set(), command


@EVERY_PAGE
def test_flags_in_prose_belong_to_some_command(page: Path) -> None:
    packages = [p.parent for p in (ROOT / "atebm_jax").glob("*/__main__.py")]
    names = ["atebm_jax.main", "atebm_jax.data.prepare"]
    names += [f"atebm_jax.{package.name}" for package in packages]
    names += [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")]
    names += [f"launch/{path.name}" for path in (ROOT / "launch").glob("*.sh")]
    known = set().union(*map(flags_of, names))
    flags = {
        f for span in code_spans(page) for f in re.findall(r"^--([a-z][\w-]*)", span)
    }
    assert flags - known - {"config"} == set()


@EVERY_PAGE
def test_python_blocks_are_python_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("atebm_jax"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert [name for name in names if not exists(name)] == []


def test_every_module_stands_in_the_api_reference() -> None:
    listed = set(
        re.findall(
            r"^   (atebm_jax\.\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE
        )
    )
    modules = {m.name for m in pkgutil.iter_modules(atebm_jax.__path__, "atebm_jax.")}
    assert listed == modules


def test_the_method_page_has_the_rows_of_the_configs() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py:\w+)` .*$", page, re.MULTILINE)
    assert len(rows) == 20
    for row in rows:
        assert table_row(row) in page


def table_row(row: str) -> str:
    config = load_config(f"{ROOT}/configs/{row}")
    stage, samples = config.stage2, config.evaluate.samples
    attack = stage.adversary
    cells = [
        f"`{row}`",
        f"{stage.optimizer}, {stage.learning_rate:g}, {stage.weight_decay:g}",
        f"{stage.contrastive_step_size:g}",
        f"{stage.t_max}",
        f"{stage.auc_threshold:g}",
        f"{attack.epsilon:g}, {attack.num_steps} x {attack.step_size:g}",
        f"{samples.num_steps} x {samples.step_size:g}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_network_of_the_docs_can_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # Set, so that what the file adds is taken out again.
    monkeypatch.setitem(models.FAMILIES, "convnet", models.FAMILIES["resnet"])
    file = tmp_path / "convnet.py"
    file.write_text(blocks(ROOT / "docs" / "own_network.md", "python")[0])
    config = load_config(str(file))
    model = models.build(config.model)
    images = jnp.zeros((2, *config.data.image_shape))
    logits, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images)
    )
    assert logits.shape == (2, 10)
    assert archs.describe(config.model) == "convnet-32"


@pytest.mark.parametrize(
    ("section", "most_files", "most_lines"),
    [("One step of training", 11, 1800), ("One sample", 8, 1000)],
)
def test_map_of_the_code_counts_its_lines(section, most_files, most_lines):
    page = (ROOT / "docs" / "code.md").read_text()
    part = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", part, re.MULTILINE)
    for name, lines in rows:
        text = (ROOT / "atebm_jax" / name).read_text()
        assert text.count("\n") == int(lines), name
    total = sum(int(lines) for _, lines in rows)
    assert f"| {len(rows)} files | {total} | |" in part
    assert len(rows) <= most_files and total <= most_lines
