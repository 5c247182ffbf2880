"""Prints the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
extras = project["project"]["optional-dependencies"].values()
for line in sum(extras, project["project"]["dependencies"]):
    if match := re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)$", line):
        print(f"{match[1]}=={match[2]}")
    elif re.search("[<>=~]", line):
        raise SystemExit(f"{line!r} gives no lowest version: write NAME>=VERSION")
