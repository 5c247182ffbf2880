"""What the benchmarks share: flags, configs, statistics and JSON."""

import argparse
import ast
import json
import operator
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from atebm_jax import storage
from atebm_jax.command_line import load_config
from atebm_jax.config import check_override
from atebm_jax.errors import UserError
from atebm_jax.models import DTYPES

DEFAULT_CONFIG = str(Path(__file__).parents[1] / "configs" / "cifar10.py") + ":small"


class Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence; exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(error: object) -> NoReturn:
    """Prints a user's mistake and leaves with exit code 2."""
    text = str(error)
    print(f"error: {text}{'' if text.endswith('.') else '.'}", file=sys.stderr)
    sys.exit(2)


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values of a kind, joined by commas, for argparse."""

    def comma_separated(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]

    return comma_separated


def of_a_step(description: str) -> Parser:
    """Flags for what a stage-2 step is made of, and how it is timed."""
    flags = Parser(description=description)
    flags.add_argument(
        "--model",
        default="",
        help="DEPTH/WIDTH of a WideResNet, or an architecture: resnet50, "
        "convnext_tiny_cvst, ...",
    )
    flags.add_argument("--image_size", type=positive, help="pixels a side")
    flags.add_argument("--batch_size", type=positive, default=32)
    flags.add_argument("--steps", type=positive, default=10, help="T")
    flags.add_argument("--repeats", type=positive, default=10)
    flags.add_argument("--threads", type=positive, default=1)
    flags.add_argument("--dtype", choices=DTYPES, help="default: the config's")
    flags.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    flags.add_argument(
        "--form",
        choices=("cpu", "xla"),
        help="of our side's operations, default: the device's",
    )
    flags.add_argument("--json", default="", metavar="PATH", help="write all repeats")
    return flags


def parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The parser's own flags, and the config with its `--config.FIELD=VALUE`.

    Raises:
      UserError: an unknown flag, config file, row or field, or a value that does not
        fit.
    """
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, help="config file and row, as in training"
    )
    flags, rest = parser.parse_known_args(argv)
    config = load_config(flags.config)
    for field, value in overrides(rest):
        override(config, field, value)
    return flags, config


def overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(field, value) of every --config.FIELD=VALUE.

    Raises:
      UserError: another argument is among them.
    """
    found = []
    for argument in arguments:
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(
                f"unknown argument {argument!r}: fields of the config are written "
                "--config.FIELD=VALUE, and --help lists the rest."
            )
        found.append((field, value))
    return found


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets a field of the config, given as text, in the field's own type."""
    check_override(config, field, text)
    kind = type(operator.attrgetter(field)(config))
    convert: dict[type, Callable[[str], Any]] = {
        bool: lambda value: value.lower() in ("true", "1"),
        tuple: lambda value: tuple(ast.literal_eval(value)),
    }
    config.update_from_flattened_dict({field: convert.get(kind, kind)(text)})


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; all the same for a single value."""
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


def machine() -> dict[str, Any]:
    """The processor and Python, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        models = [line.partition(":")[2] for line in lines if "model name" in line]
        name = models[0].strip() if models else name
    return {"cpu": name, "cpus": os.cpu_count(), "python": platform.python_version()}


def command() -> str:
    """The command line as it was given."""
    return shlex.join(["python", *sys.argv])


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): mend it, or move it away to begin anew."
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path} holds a {type(record).__name__}, no record of this command: move "
            "it away to begin anew."
        )
    return record


def write_json(path: str, record: dict[str, Any]) -> None:
    """Writes the record, unless `path` is empty.

    Raises:
      UserError: the file cannot be written.
    """
    if not path:
        return
    try:
        storage.write_json(Path(path), record)
    except OSError as error:
        raise UserError(f"cannot write --json={path}: {error.strerror}.") from error
