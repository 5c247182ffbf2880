"""Chooses Open Images that show no class of ImageNet (method: section 4)."""

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from atebm_jax.errors import UserError
from atebm_jax.storage import replace_text

_log = logging.getLogger(__name__)


def normalise(name: str) -> str:
    """A name without case, punctuation, plural: "Bald Eagles" -> "bald eagle"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    if words and len(words[-1]) > 3:
        words[-1] = re.sub(r"(?<=[^s])s$|(?<=ch|sh|ss)es$", "", words[-1])
    return " ".join(words)


def names_of_classes(path: str) -> set[str]:
    """Normalised names of a class file: one class a line, synonyms between commas.

    A number and a WordNet identifier (n01440764) in front of the names are ignored, and
    so is punctuation: `0: 'tench, Tinca tinca',` names what `tench, Tinca tinca` does.

    Raises:
      UserError: the file cannot be read or holds no name.
    """
    names = set()
    with _opened("--imagenet_classes", path) as file:
        for line in file:
            line = re.sub(r"^\W*n\d{8}\s*[:,]?\s*", "", line.strip())
            # Without its number too; a name may begin with one.
            lines = line, re.sub(r"^\W*\d+\W+(n\d{8}\W+)?", "", line)
            names |= {normalise(part) for x in lines for part in x.split(",")} - {""}
    if not names:
        raise UserError(
            f"--imagenet_classes={path} holds no names: expected one class a line, "
            "synonyms separated by commas."
        )
    return names


def overlapping_labels(
    display_names: Mapping[str, str],
    classes: set[str],
    hierarchy: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Labels that overlap a class, with the reason.

    A label overlaps if its name is a class's, if its last word is (a "sports car" is a
    "car"), if a class's last word is its name (a class "school bus" makes "bus"
    overlap), or if it lies above or below such a label in the hierarchy.

    Args:
      display_names: label identifier -> name.
      classes: normalised class names.
      hierarchy: {"LabelName", "Subcategory": [...]} of Open Images, or None.
    """
    heads = {name.split()[-1] for name in classes}
    found: dict[str, str] = {}
    for label, display in display_names.items():
        name = normalise(display)
        if name in classes:
            found[label] = f"is the class {name}"
        elif name and name.split()[-1] in classes:
            found[label] = f"is a kind of {name.split()[-1]}"
        elif name in heads:
            found[label] = f"has kinds among the classes ({name})"
    direct = set(found)
    for path in _paths(hierarchy or {}):
        hits = [label for label in path if label in direct]
        for label in path if hits else ():
            found.setdefault(label, f"on a line with {display_names[hits[0]]}")
    return found


def select(
    labels_file: str,
    descriptions_file: str,
    classes_file: str,
    hierarchy_file: str | None,
    decisions: Path,
) -> set[str]:
    """Identifiers of images whose verified labels overlap no ImageNet class.

    Args:
      labels_file: CSV with ImageID, LabelName, Confidence; only verified positive
        labels (Confidence 1) count. An image without any is left out, and so is one
        with a label that has no name.
      descriptions_file: CSV of label identifier and name.
      classes_file: ImageNet's class names, see `names_of_classes`.
      hierarchy_file: JSON of the label hierarchy, or None.
      decisions: CSV to be written: every label, its name, and why it overlaps.

    Raises:
      UserError: a file cannot be read or has other columns.
      OSError: `decisions` cannot be written.
    """
    with _opened("--class_descriptions", descriptions_file, "table (CSV)") as file:
        rows = [row[:2] for row in csv.reader(file) if len(row) > 1]
    display = {label: name for label, name in rows if label != "LabelName"}
    if not display:
        raise UserError(
            f"--class_descriptions={descriptions_file} holds no names: expected a "
            "label and its name a line, with a comma between them."
        )
    hierarchy = _hierarchy(hierarchy_file) if hierarchy_file else None
    overlap = overlapping_labels(display, names_of_classes(classes_file), hierarchy)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["label", "name", "overlaps"])
    writer.writerows([k, name, overlap.get(k, "")] for k, name in display.items())
    replace_text(decisions, table.getvalue())
    return _without(labels_file, display, overlap)


def _hierarchy(path: str) -> Mapping[str, Any]:
    with _opened("--hierarchy", path, "JSON") as file:
        hierarchy = json.load(file)
    try:
        for line in _paths(hierarchy):
            hash(line)
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"--hierarchy={path} is no hierarchy of labels: expected "
            '{"LabelName": ..., "Subcategory": [...]}, as Open Images has it.'
        ) from error
    return hierarchy


def _without(
    labels_file: str, display: Mapping[str, str], overlap: Mapping[str, str]
) -> set[str]:
    """Images with a verified label, of which none overlaps or is without a name."""
    wanted = {"ImageID", "LabelName", "Confidence"}
    seen, refused, nameless = set(), set(), set()
    with _opened("--labels", labels_file, "table (CSV)") as file:
        reader = csv.DictReader(file)
        if not wanted <= set(reader.fieldnames or ()):
            raise UserError(
                f"--labels={labels_file} has the columns {reader.fieldnames}: expected "
                f"{', '.join(sorted(wanted))}."
            )
        for row in reader:
            if _confidence(row["Confidence"], labels_file, reader.line_num) == 1.0:
                image, label = row["ImageID"], row["LabelName"] or ""
                seen.add(image)
                if label not in display:
                    nameless.add(label)
                if label in overlap or label in nameless:
                    refused.add(image)
    if nameless:
        _log.warning(
            "--labels=%s has %d labels that --class_descriptions does not name (%r, "
            "...): nobody knows what they show, and their images are left out",
            *(labels_file, len(nameless), min(nameless)),
        )
    return seen - refused


def _confidence(text: str | None, labels_file: str, line: int) -> float:
    try:
        confidence = float(text or 0)
    except ValueError:
        confidence = math.nan
    if not 0 <= confidence <= 1:
        raise UserError(
            f"--labels={labels_file}, line {line}: Confidence is {text!r}: expected a "
            "number from 0 to 1, where 1 is a label that was verified."
        )
    return confidence


def _paths(node: Mapping[str, Any], above: tuple = ()) -> Iterator[tuple[str, ...]]:
    """Every path of labels down to a leaf, without the root, which is above all."""
    for child in node.get("Subcategory", ()):
        line = (*above, child["LabelName"])
        if child.get("Subcategory"):
            yield from _paths(child, line)
        else:
            yield line


@contextlib.contextmanager
def _opened(flag: str, path: str, kind: str = "text") -> Iterator[TextIO]:
    """Opens the file of a flag; a `UserError` takes the place of any error."""
    try:
        # utf-8-sig: skips a byte-order mark.
        local = os.path.expanduser(path)
        with open(local, encoding="utf-8-sig", newline="") as file:
            yield file
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}={path} cannot be read: {error}.") from error
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{flag}={path} is no {kind}: {error}.") from error
