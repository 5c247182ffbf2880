"""The training loop keeps the devices busy: late metrics, early batches, no compiling.

Each test runs the real loop on a digits job of a few steps.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
import tiny

from atebm_jax import checkpoint, compilation, sharding, train
from atebm_jax.metric_writer import read_metrics

ROOT = Path(__file__).parents[1]
COMPILED = "/jax/core/compile/backend_compile_duration"


def settings(**overrides):
    """One stage that only saves and evaluates at its end."""
    chosen = {"stages": "stage1", "log_every_steps": 1, "stage1.eval_every_steps": 0}
    chosen |= {"stage1.checkpoint_every_steps": 0, "evaluate.samples.num_test": 10}
    return tiny.config(**chosen | overrides)


class Late:
    """A metric that notes when it is fetched."""

    def __init__(self, value, note):
        self._value, self._note = value, note

    def __array__(self, *arguments, **options):
        self._note()
        return np.asarray(self._value)

    def __int__(self):
        return int(np.asarray(self))


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A stage of six steps under a transfer guard: its workdir, and what it did when.

    ("put", n), ("dispatch", n) and ("fetch", n) in the order of the loop.
    """
    noted = []
    put, jit_step, advance = sharding.put_batch, train.jit_step, train._advance

    def put_noted(batch, mesh):
        noted.append(("put", 1 + sum(kind == "put" for kind, _ in noted)))
        with jax.transfer_guard("allow"):
            return put(batch, mesh)

    def jit_noted(*arguments):
        step = jit_step(*arguments)

        def dispatch(state, batch):
            number = 1 + sum(kind == "dispatch" for kind, _ in noted)
            noted.append(("dispatch", number))
            state, metrics = step(state, batch)

            def fetched():
                noted.append(("fetch", number))

            return state, {name: Late(x, fetched) for name, x in metrics.items()}

        return dispatch

    def guarded(*arguments):
        with (
            jax.transfer_guard_host_to_device("disallow_explicit"),
            jax.transfer_guard_device_to_host("disallow"),
        ):
            return advance(*arguments)

    workdir = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "put_batch", put_noted)
        patch.setattr(train, "jit_step", jit_noted)
        patch.setattr(train, "_advance", guarded)
        tiny.only_the_loop(patch)
        tiny.run(settings(), workdir)
    return workdir, list(dict.fromkeys(noted))


def test_metrics_of_a_step_are_fetched_while_the_next_one_runs(loop):
    workdir, order = loop
    for number in range(1, 6):
        fetched = order.index(("fetch", number))
        assert order.index(("dispatch", number + 1)) < fetched
    assert ("fetch", 6) in order
    steps = [r["step"] for r in read_metrics(workdir) if "loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_next_batch_is_on_the_devices_before_a_step_begins(loop):
    _, order = loop
    for number in range(1, 6):
        put = order.index(("put", number + 1))
        assert put < order.index(("dispatch", number))
        # Not sooner either: two batches are all the memory that it takes.
        if number > 1:
            assert put > order.index(("dispatch", number - 1))
    assert ("put", 7) not in order


def test_loop_transfers_nothing_but_its_batches(loop):
    """The guard would have ended the job; here it is shown to be one."""
    assert ("dispatch", 6) in loop[1]
    add = jax.jit(lambda x: x + 1)
    for slipped in (lambda: add(np.ones(8)), lambda: jax.device_put(np.ones(8))):
        with (
            jax.transfer_guard_host_to_device("disallow_explicit"),
            pytest.raises(Exception, match="Disallowed host-to-device transfer"),
        ):
            slipped()


def test_prefetched_batches_are_those_of_the_iterator():
    mesh = sharding.make_mesh()
    batches = [{"y": np.full(8, n, np.int32)} for n in range(5)]
    placed = list(sharding.prefetch(iter(batches), mesh))
    assert [int(batch["y"][0]) for batch in placed] == [0, 1, 2, 3, 4]
    assert list(sharding.prefetch(iter([]), mesh)) == []


@contextlib.contextmanager
def compilations():
    """The number of programs that are compiled, as a list that grows."""
    seen = []

    def note(event, duration, **_):
        if event == COMPILED:
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_whole_curriculum_is_one_program(loop, monkeypatch, tmp_path):
    """T = 0 to 20, raised by the loop itself; nothing compiles after the first step."""
    curriculum = {"stages": "stage2", "stage2.num_steps": 22, "stage2.t_max": 20}
    curriculum |= {"stage2.auc_threshold": 0.0, "stage2.auc_window_images": 16}
    curriculum |= {"stage2.eval_every_steps": 0, "stage2.checkpoint_every_steps": 5}
    tiny.only_the_loop(monkeypatch)
    counts, jit_step = [], train.jit_step

    def jit_counted(*arguments):
        step = jit_step(*arguments)

        def dispatch(*inputs):
            counts.append(len(seen))
            return step(*inputs)

        return dispatch

    monkeypatch.setattr(train, "jit_step", jit_counted)
    with compilations() as seen:
        tiny.run(settings(**curriculum, init_from=str(loop[0])), tmp_path)
    records = [r for r in read_metrics(tmp_path) if "T" in r]
    assert [r["T"] for r in records] == [*range(21), 20]
    # One for the step; saving may bring one of its own, at the first time.
    assert counts[1] > counts[0]
    assert counts[7] == counts[-1] == counts[21]
    assert counts[1] == counts[5]


# Counts programs that were compiled, and those loaded instead. The report is left out:
# its programs are as any others.
_COUNTING = """
import atexit, jax.monitoring, sys
counts = {f"/jax/compilation_cache/cache_{name}": 0 for name in ("misses", "hits")}
def note(event, **_):
    if event in counts:
        counts[event] += 1
jax.monitoring.register_event_listener(note)
atexit.register(lambda: print("counted", *counts.values()))
from atebm_jax import main
from atebm_jax.evaluate.evaluation import Evaluation
Evaluation.final = lambda *_: {}
main.cli()
"""


def start(workdir, *flags):
    """Runs the command; returns (programs compiled, programs loaded)."""
    environment = tiny.environment()
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    made = subprocess.run(
        [sys.executable, "-c", _COUNTING, "--config=tests/small.py"]
        + [f"--workdir={workdir}", "--config.stages=stage1", *flags]
        + ["--config.stage1.schedule=constant", "--config.evaluate.samples.num=10"]
        + ["--config.evaluate.samples.num_test=10", "--config.evaluate.num_examples=50"]
        + ["--config.evaluate.num_test_examples=50", "--allow_config_change"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return tuple(map(int, made.stdout.split("counted")[1].split()))


@pytest.mark.jobs
def test_second_start_compiles_nothing(tmp_path):
    """A job that goes on finds every program of the first start in its workdir."""
    misses, _ = start(tmp_path / "run", "--config.stage1.num_steps=2")
    assert misses > 0
    assert list((tmp_path / "run" / "compilation_cache").iterdir())
    # A restored state comes from no program, so that there are fewer than before.
    misses, hits = start(tmp_path / "run", "--config.stage1.num_steps=4")
    assert misses == 0 and hits > 0
    folder = checkpoint.stage_folder(tmp_path / "run", "stage1")
    assert checkpoint.steps_in(folder)[-1] == 4


@pytest.mark.parametrize(
    ("choice", "variable", "folder"),
    [
        ("workdir", None, "run/compilation_cache"),
        ("workdir", "mine", None),
        ("off", None, None),
        ("shared", None, "shared"),
    ],
)
def test_cache_is_where_it_was_asked_for(
    choice, variable, folder, monkeypatch, tmp_path
):
    set_ = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.config, "update", set_.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if variable:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    compilation.use_cache(choice, "run")
    expected = str(tmp_path / folder) if folder else None
    assert set_.get("jax_compilation_cache_dir") == expected
    assert ("jax_enable_compilation_cache" in set_) == (choice == "off")
    assert not list(tmp_path.iterdir())
