"""What the commands share: config files, overrides, quiet libraries, exit code 2."""

import argparse
import contextlib
import inspect
import io
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from atebm_jax.config import check_override, default, flatten, nearest
from atebm_jax.errors import UserError
from atebm_jax.models import BUILT_IN
from atebm_jax.names import printable

# --config=FILE, --config.FIELD=VALUE, --noconfig.FIELD.
_CONFIG_FLAG = re.compile(r"--?(no(?=config\.))?(config(?:\..*)?)")


def checked_arguments(arguments: Sequence[str], *, needed: bool = True) -> list[str]:
    """The arguments with one --config and one override of each field, all checked.

    Of a flag that is given twice the last one counts. (ml_collections would refuse a
    second file, and append the second value of a tuple to the first.) --config is then
    the path of a file, as of `config_file`.

    Args:
      arguments: of the command, as absl takes them.
      needed: whether --config must be there even without an override.

    Raises:
      UserError: no --config, one that cannot be used, or an override that does not fit.
    """
    rest = list(arguments)
    made: dict[str, str] = {}
    values: dict[str, str] = {}
    while rest:
        # By a key of its own, so that all other arguments stay.
        key, argument = f"{len(rest)} left", rest.pop(0)
        name, equals, value = argument.partition("=")
        if match := _CONFIG_FLAG.fullmatch(name):
            key = match[2]
            if not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)
            value = config_file(value) if key == "config" else value
            values[key] = "false" if match[1] else value if equals else "true"
            argument = f"{name}{equals}{value}"
        made[key] = argument
    if values or needed:
        if "config" not in values:
            raise UserError(
                "--config is missing: give a config file, --config=configs/digits.py, "
                "or the name of one that comes with the package, --config=digits."
            )
        config = load_config(values.pop("config"))
        for name, value in values.items():
            check_override(config, name.removeprefix("config."), value)
    return list(made.values())


# The package's own config files: inside it, or beside it in a clone.
_INSTALLED = Path(__file__).parent / "configs"
_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def config_file(path_and_row: str) -> str:
    """The path of a config file, `~` replaced and the row kept.

    A name without a folder and an ending, `cifar10:small`, is that of a file that comes
    with the package, unless such a file is here.
    """
    path, colon, row = os.path.expanduser(path_and_row).partition(":")
    own = _CONFIGS / f"{path}.py"
    if re.fullmatch(r"\w+", path) and not os.path.exists(path) and own.exists():
        path = os.fspath(own)
    return f"{path}{colon}{row}"


def load_config(path_and_row: str) -> ConfigDict:
    """Loads a config file as of `config_file`: `configs/cifar10.py:small` with its row.

    Raises:
      UserError: no such file or row, one that fails, or one without a `get_config` that
        returns a config.
    """
    path, _, row = config_file(path_and_row).partition(":")
    if not os.path.isfile(path):
        own = ", ".join(sorted(file.stem for file in _CONFIGS.glob("*.py")))
        raise UserError(
            f"there is no config file {path!r}: expected a .py file, or the name of "
            f"one that comes with the package: {own}."
        )
    spec = util.spec_from_file_location("atebm_jax_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path!r} is no Python file (.py).")
    module = util.module_from_spec(spec)
    with _running(path):
        spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"config file {path!r} has no function get_config.")
    if row and not inspect.signature(get_config).parameters:
        raise UserError(f"config file {path!r} has no rows: leave out {':' + row!r}.")
    with _running(path):
        config = get_config(row) if row else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of config file {path!r} returns a {type(config).__name__}: "
            "expected atebm_jax.config.default() with values of its own."
        )
    _check_names(path, config)
    return config


def _check_names(path: str, config: ConfigDict) -> None:
    """Refuses a field that nothing reads."""
    fields = [name for name, _ in flatten(default())]
    others = [name for name, _ in flatten(config) if name not in fields]
    of_model = [name for name in others if name.startswith("model.")]
    # A family of the user's own may read more than it declares.
    if of_model and config.model.get("name") not in BUILT_IN:
        others = [name for name in others if name not in of_model]
    if others:
        near = nearest(others[0], fields) or sorted(default())
        raise UserError(
            f"config file {path!r} sets {others[0]}, which nothing reads: the nearest "
            f"valid names are {', '.join(near)}."
        )


@contextlib.contextmanager
def _running(path: str) -> Iterator[None]:
    """Says in one sentence what fails in a config file: a misspelt field, say."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"config file {path!r} cannot be run: {type(error).__name__}: {error}."
        ) from error


# Where a machine shows its NVIDIA GPUs. Without any of these JAX looks for none.
_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def quiet_libraries() -> None:
    """Shows errors of the libraries and warnings of this package, and nothing else."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Do not end because of a name that the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger().setLevel(logging.WARNING)
    # tensorboardX warns of each value that is no number; the job itself tells of them.
    for library in ("absl", "tensorboardX"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # An error in a saving thread of Orbax is raised again where the job waits for it.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # A failed save or read leaves coroutines behind, with a traceback for each array:
    # the sentence that the command ends with says it all.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    if not any(map(os.path.exists, _NVIDIA)):
        # Installed as a compiler, the plugin for CUDA misses what only a GPU needs.
        jax_log = logging.getLogger("jax._src.xla_bridge")
        jax_log.addFilter(lambda record: "xla_cuda" not in record.getMessage())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Python warns when it frees, at exit, the shared memory of batches made ahead.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in code.co_filename
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


# Variables that make JAX insist on a platform.
_PLATFORM_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")


def check_platform() -> None:
    """Refuses a platform that the environment asks for and this machine lacks.

    Call it after the processes of a job were joined: it looks at the devices.

    Raises:
      UserError: names the platforms that are there.
    """
    import jax

    asked = [f"{k}={os.environ[k]}" for k in _PLATFORM_VARIABLES if os.environ.get(k)]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without its plugin
        if not asked:
            raise
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())
        raise UserError(
            f"{' and '.join(asked)}: JAX cannot use that here"
            f"{f' ({reason[:300]})' if reason else ''}; available: "
            f"{', '.join(_platforms())}. Set JAX_PLATFORMS to one of these, leave it "
            "out, or install the package's extra for the hardware: "
            "pip install 'atebm_jax[cuda]' or 'atebm_jax[tpu]'."
        ) from error


def _platforms() -> list[str]:
    """The platforms that JAX finds by itself; leaves JAX as it was."""
    import jax
    from jax.extend import backend

    asked = getattr(jax.config, "jax_platforms")  # noqa: B009  (no field for mypy)
    jax.config.update("jax_platforms", None)
    try:
        return sorted(backend.backends())
    finally:
        backend.clear_backends()
        jax.config.update("jax_platforms", asked)


def positive_numbers(flag: str, words: Sequence[str]) -> list[float]:
    """The numbers of a flag.

    Raises:
      UserError: a word is no number above zero, or infinite.
    """
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(
            f"{flag}={','.join(words)}: expected positive numbers with commas, such as "
            "1,2,4."
        )
    return numbers


def fail(error: Exception) -> NoReturn:
    """Ends the process with the one sentence and exit code 2."""
    # Names in the message may hold control characters of the terminal.
    lines = [printable(line) for line in str(error).split("\n")]
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Reports mistakes in flags as all commands do."""

    def error(self, message: str) -> NoReturn:
        fail(UserError(f"{message}; --help lists the flags."))


def run(main: Callable[[Sequence[str]], None], stopped: str) -> None:
    """Runs a command to the exit code of its process.

    Args:
      main: takes the arguments without the program's name.
      stopped: what is said if a signal stops it.
    """
    # An exception, so that a stopped command removes what it has begun.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"stopped: {stopped}.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
