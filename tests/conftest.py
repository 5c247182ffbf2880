"""Set-up of every test: eight virtual devices, no implicit promotion, golden files."""

import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

# The compilers of other machines may be installed: no test looks for their devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
# Before JAX is first used: the number of devices cannot change afterwards.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Most of the tests' time goes to compiling: half of it, for programs half as fast.
# Here and in processes that tests start; `optimized` is for those that need speed.
_QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault(_QUICKLY, "1")
jax.config.update(_QUICKLY.lower(), os.environ[_QUICKLY] == "1")


def pytest_configure(config: pytest.Config) -> None:
    """Programs are compiled once for all tests, their workers and their processes."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="atebm_jax_tests_")
        config.add_cleanup(functools.partial(shutil.rmtree, folder, True))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", folder)
    seconds = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one worker, so that each fixture is made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    # In the order of collection, not of the files' numbers of tests.
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


# Files that take a minute of CPU time or near: begun first, workers end together.
_LONGEST = ("test_notebooks", "test_signals", "test_train", "test_job")
_LONGEST += ("test_evaluate_command", "test_suite", "test_micro_batches")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def _lenient(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            result = function(*args, **kwargs)
        return _lenient(result) if callable(result) else result

    return call


def _lenient_adam(make: Callable) -> Callable:
    @functools.wraps(make)
    def scale_by_adam(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        adam = make(*args, **kwargs)
        return optax.GradientTransformation(adam.init, _lenient(adam.update))

    return scale_by_adam


# Optax mixes integer counts with floats in these three. Only they are let off, so that
# our own code stays under the strict rule in whole jobs too.
optax.cosine_decay_schedule = _lenient(optax.cosine_decay_schedule)
optax.piecewise_constant_schedule = _lenient(optax.piecewise_constant_schedule)
optax.scale_by_adam = _lenient_adam(optax.scale_by_adam)

_TESTS = Path(__file__).parent
_GOLDEN = (_TESTS / "golden", _TESTS.parents[1] / "shared" / "golden")


@pytest.fixture
def optimized():
    """Compiles as users do: for tests that run longer than they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_QUICKLY, "0")
        before = jax.config.read(_QUICKLY.lower())
        jax.config.update(_QUICKLY.lower(), False)
        yield
        jax.config.update(_QUICKLY.lower(), before)


@pytest.fixture(scope="module")
def one_program_an_attack():
    """AutoAttack fills its last batches up to whole ones: nothing else to compile."""
    from atebm_jax.autoattack import ensemble

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "_PARTS", (1,))
        yield


@pytest.fixture(scope="module")
def two_devices():
    """Samples are drawn on two: each device compiles its own, and eight say no more."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.local_devices()[:2]
        patch.setattr(jax, "local_devices", lambda: devices)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir after four steps of stage 1, to be read only; one for all workers."""
    import tiny

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    workdir = folder / "trained" / "digits"
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "report.json").exists():
            tiny.run(tiny.config(stages="stage1", **{"stage1.num_steps": 4}), workdir)
    return workdir


@pytest.fixture(scope="session")
def tfds_dir():
    """The folder of prepared photographs; skips where they are not at hand."""
    beside = _TESTS.parents[1] / "shared" / "tfds"
    for folder in (os.environ.get("TFDS_DATA_DIR") or beside, beside):
        if Path(folder, "cifar10").is_dir():
            return str(folder)
    pytest.skip("no prepared CIFAR-10: TFDS_DATA_DIR names the folder it is in")


@functools.cache
def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden():
    """Loads reference outputs by name; skips where only the small ones are at hand."""

    def load(name: str) -> dict[str, np.ndarray]:
        for folder in _GOLDEN:
            if (folder / f"{name}.npz").exists():
                return _load(folder / f"{name}.npz")
        pytest.skip(f"reference outputs are not here ({name}.npz)")

    return load


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system; its size or mode can be changed."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")

    def remount(option):
        subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", str(folder)], check=True)
