"""Edits into a folder: `python -m atebm_jax.sample edit`, and `explain`.

An explanation is an edit too: the translation of an image into one class after the
other, in one ball after the other.
"""

import argparse
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from atebm_jax import constraints, editing, metrics, pictures, recipes, trained
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.local_path import local
from atebm_jax.progress import say
from atebm_jax.sample import asked, files, inputs, process, records
from atebm_jax.sample.process import Item
from atebm_jax.trained import Trained

# Which flags a task takes, beside those of all; those that it needs come first.
_TASKS: dict[str, tuple[str, ...]] = {
    "inpaint": ("mask", "radius", "fill"),
    "translate": ("target", "radius", "mask"),
    "denoise": ("sigma", "mask", "strength"),
    "superres": ("factor",),
}
_DEFAULTS = {"fill": "mean", "strength": 0.5}
_NOTE = (
    "figures are of the results before they were rounded to bytes; paths have the "
    "start, then every step; psnr in decibels, null where an image is its truth"
)


class Problem(NamedTuple):
    """What is asked of every image, in V variants.

    Attributes:
      shape: (H, W, C) of the images that are given.
      degrade: those images [B, H, W, C] uint8 -> what the edit is given, float32 in
        [0, 1]; the same where the given ones are not the truth.
      constraint: (what the edit is given, variants [B]) -> constraint.
      labels: of the variants, [V] int32 or `editing.GUESS`; None for no class.
      files: what the result of each variant is called.
      compare: (problem, item, edited, number of the variant) -> pictures of the strip
        by title, and what the record of the result has beside.
      settings: for the protocol.
      summary: what is said of all results at the end.
      hole: [H, W] bool, or None.
      degraded: whether the given images are the truth.
      truths: other ones, [H, W, C] uint8 by the picture's name.
    """

    shape: tuple[int, int, int]
    degrade: Callable[[np.ndarray], np.ndarray]
    constraint: Callable[[np.ndarray, np.ndarray], Any]
    labels: np.ndarray | None
    files: Sequence[str]
    compare: Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]
    settings: dict[str, Any]
    summary: Callable[[Sequence[dict[str, Any]]], str]
    hole: np.ndarray | None = None
    degraded: bool = False
    truths: Mapping[str, np.ndarray] = MappingProxyType({})


def run(command: str, given: argparse.Namespace, console: Console) -> None:
    """Edits or explains the images that the flags name.

    Args:
      command: "edit" or "explain".
      given: its flags.
      console: where to show progress and result.

    Raises:
      UserError: a flag, the checkpoint, an image or the folder cannot be used.
    """
    loaded = trained.load(given.workdir, best_by=given.best_by)
    names = asked.class_names(loaded, given)
    if command == "edit":
        given = _checked(given)
        problem = _edit(given, loaded, names)
    else:
        problem = _explanation(given, loaded, names)
    out = Path(local("--out", given.out))
    for named in given.images:
        files.check_outside(out, named)
    prepare = partial(_prepare, given, loaded, problem)
    variants = np.arange(len(problem.files))
    # All flags are looked at before an image is.
    black = np.zeros((len(variants), *problem.shape), np.uint8)
    rows, recipe = prepare(black, variants)
    originals = inputs.pictures(
        given.images,
        given.index,
        loaded.config,
        data_dir=given.data_dir,
        resize=given.resize,
        class_names=loaded.class_names,
        by_place=given.classes_by_place,
    )
    if command == "edit":
        problem = problem._replace(truths=_references(given, originals, loaded))
    sizes = records.reading(rows.step_sizes.tolist())
    task = process.Task(
        shape=problem.shape,
        variants=len(variants),
        rows=lambda images, variants: prepare(images, variants)[0],
        recipe=recipe,
        write=partial(_write, out, problem, names),
        protocol=records.described(loaded, given.workdir)
        | problem.settings
        | {
            "norm": given.norm,
            "sampler": recipe.sampler,
            "schedule": recipe.schedule,
            "step_size": sizes[0] if len(sizes) == 1 else sizes,
            "num_steps": recipe.num_steps,
            "seed": recipe.seed,
            "references": {n: inputs.fingerprint(x) for n, x in problem.truths.items()},
            "inputs": inputs.described(loaded.config, given.resize),
            "note": _NOTE,
        },
        json=f"{command}.json",
    )
    results = process.run(loaded, originals, task, out, console)
    say(console, f"{len(results)} images are in {out}{problem.summary(results)}")


def _prepare(
    given: argparse.Namespace,
    loaded: Trained,
    problem: Problem,
    images: np.ndarray,
    variants: np.ndarray,
) -> tuple[editing.Rows, recipes.Recipe]:
    """Images [B, H, W, C] uint8 in variants [B] as rows to edit, and how."""
    labels = problem.labels
    return editing.prepare(
        problem.constraint(problem.degrade(images), variants),
        None if labels is None else labels[variants],
        loaded.config.evaluate.samples,
        step_size=given.step_size,
        num_steps=given.num_steps,
        sampler=given.sampler,
        schedule=given.schedule,
        seed=given.seed,
    )


def _write(
    out: Path,
    problem: Problem,
    names: Sequence[str],
    item: Item,
    edited: editing.Edited,
) -> list[dict[str, Any]]:
    """Pictures and records of one image's variants."""
    results, rows = [], []
    for number, part in enumerate(problem.files):
        shown, more = problem.compare(problem, names, item, edited, number)
        file = f"{item.picture.name}_{part}.png"
        files.write_image(out / file, files.as_bytes(edited.images[number]))
        later = number // pictures.ROWS
        strip = f"{item.picture.name}_strip{f'_{later + 1}' if later else ''}.png"
        record = records.of_image(item, edited, number, names) | more
        results.append(record | {"files": {"result": file, "strip": strip}})
        rows.append(_row(edited, number, shown, names, problem.hole))
    for first in range(0, len(rows), pictures.ROWS):
        strip = out / results[first]["files"]["strip"]
        shown_rows = rows[first : first + pictures.ROWS]
        pictures.strip(strip, item.picture.name, shown_rows)
    return results


def _row(
    edited: editing.Edited,
    number: int,
    shown: dict[str, np.ndarray],
    names: Sequence[str],
    hole: np.ndarray | None,
) -> pictures.Row:
    """One row of a strip: pictures, what changed, and the way there."""
    path = edited.path
    original, target = (names[k[number]] for k in (edited.originals, edited.targets))
    curves = {f"p({target})": path.target_confidence[number]}
    if original != target:
        curves[f"p({original})"] = path.original_confidence[number]
    change = edited.images[number] - edited.start[number]
    return pictures.Row(shown, change, curves, path.energy[number], hole)


def _explanation(
    given: argparse.Namespace, loaded: Trained, names: Sequence[str]
) -> Problem:
    """Translation into every target, in a ball of every radius."""
    targets = asked.parse_classes("--target", given.target, names).tolist()
    radii = asked.parse_radii(given.radius)
    pairs = [(target, radius) for target in dict.fromkeys(targets) for radius in radii]
    length = np.asarray([radius for _, radius in pairs])

    def compare(
        problem: Problem,
        names: Sequence[str],
        item: Item,
        edited: editing.Edited,
        number: int,
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        target, radius = pairs[number]
        before = float(edited.path.original_confidence[number, 0])
        after = float(edited.path.target_confidence[number, -1])
        original = names[edited.originals[number]]
        title = f"as {names[target]}, {given.norm.capitalize()} radius {radius:g}"
        shown = {
            f"original\np({original}) = {before:.3g}": edited.start[number],
            f"{title}\np({names[target]}) = {after:.3g}": edited.images[number],
        }
        reached = int(edited.path.predicted[number, -1]) == target
        return shown, {"radius": radius, "norm": given.norm, "reached": reached}

    def reached(results: Sequence[dict[str, Any]]) -> str:
        return f"; of their target to the model: {sum(r['reached'] for r in results)}"

    return Problem(
        shape=loaded.image_shape,
        degrade=constraints.as_images,
        constraint=lambda x, variants: constraints.ball(
            x, length[variants], given.norm
        ),
        labels=np.asarray([target for target, _ in pairs], np.int32),
        files=[f"target{target}_radius{radius:g}" for target, radius in pairs],
        compare=compare,
        settings={
            "asked": [
                {"target": records.named(target, names), "radius": radius}
                for target, radius in pairs
            ]
        },
        summary=reached,
    )


def _edit(given: argparse.Namespace, loaded: Trained, names: Sequence[str]) -> Problem:
    height, width, channels = shape = loaded.image_shape
    hole = None
    if given.mask is not None:
        path = Path(os.path.expanduser(given.mask))
        hole = inputs.read_mask(path, shape, loaded.config, given.resize)
    degrade: Callable[[np.ndarray], np.ndarray] = constraints.as_images
    if hole is not None and given.degrade:
        degrade = partial(_blacken, hole)
    if given.task == "superres":
        factor = given.factor
        if factor < 2 or height % factor or width % factor:
            raise UserError(
                f"--factor={factor}: expected a whole number from 2 on that divides "
                f"the sides of the model's images, {width} x {height}."
            )
        if given.degrade:
            degrade = partial(_shrink, factor)
        else:
            shape = (height // factor, width // factor, channels)
    if given.task == "denoise" and given.degrade:
        degrade = partial(_add_noise, given.sigma, given.seed)
    wanted = {name: getattr(given, name) for name in _TASKS[given.task]}
    settings = {k: v for k, v in wanted.items() if k not in ("mask", "target")}
    settings |= {"degrade": given.degrade}
    settings |= {"task": given.task, "target": given.target or "any"}
    if hole is not None:
        settings |= {"mask_sha256": inputs.fingerprint(hole)}
    label = _label(given, names)
    return Problem(
        shape=shape,
        degrade=degrade,
        constraint=lambda x, variants: _constraint(given, hole, x),
        labels=None if label is None else np.asarray([label], np.int32),
        files=[given.task],
        compare=_compare,
        settings=settings,
        summary=_mean_gain,
        hole=hole,
        degraded=given.degrade,
    )


def _checked(given: argparse.Namespace) -> argparse.Namespace:
    """The flags with the task's defaults; refuses those that it would not heed."""
    if given.task not in _TASKS:
        raise UserError(f"--task is {given.task!r}: choose one of {', '.join(_TASKS)}.")
    needed, *_ = taken = _TASKS[given.task]
    if getattr(given, needed) is None:
        raise UserError(f"--task={given.task} needs --{needed}; see docs/edit.md.")
    for name in ("mask", "radius", "sigma", "strength", "factor", "fill"):
        if name not in taken and getattr(given, name) is not None:
            raise UserError(f"--task={given.task} takes no --{name}: leave it out.")
    if given.norm != "l2" and given.task != "translate" and given.radius is None:
        raise UserError(
            f"--norm={given.norm} is of the ball of --task=translate, or of "
            "--task=inpaint with --radius; this task has none: leave it out."
        )
    if given.degrade and given.task == "translate":
        raise UserError("--task=translate has no truth: leave out --degrade.")
    if given.degrade and given.reference:
        raise UserError(
            "with --degrade the images are the truth: leave out --reference."
        )
    # What is made of the images first takes these as they are.
    recipes.check_seed(given.seed)
    if given.task == "denoise":
        constraints.check_noise(given.sigma)
    missing = {k: v for k, v in _DEFAULTS.items() if getattr(given, k) is None}
    return argparse.Namespace(**vars(given) | missing)


def _constraint(
    given: argparse.Namespace, hole: np.ndarray | None, images: np.ndarray
) -> Any:
    if given.task == "superres":
        return constraints.superres(images, given.factor)
    parts: list[Any] = []
    if hole is not None:
        fill = given.fill if given.task == "inpaint" else "image"
        parts.append(constraints.inpaint(images, hole, fill=fill, seed=given.seed))
    if given.task == "denoise":
        parts.append(constraints.denoise(images, given.sigma, strength=given.strength))
    elif given.radius is not None or given.task == "translate":
        origin = parts[0].start if parts else images
        radius = 4.0 if given.radius is None else given.radius
        parts.append(constraints.ball(origin, radius, given.norm))
    return parts[0] if len(parts) == 1 else constraints.together(*parts)


def _blacken(hole: np.ndarray, images: np.ndarray) -> np.ndarray:
    return np.where(hole[..., None], np.float32(0), constraints.as_images(images))


def _shrink(factor: int, images: np.ndarray) -> np.ndarray:
    """The truth's box averages, not rounded."""
    number, height, width, channels = images.shape
    split = (number, height // factor, factor, width // factor, factor, channels)
    return constraints.as_images(images).reshape(split).mean((2, 4))


def _add_noise(sigma: float, seed: int, images: np.ndarray) -> np.ndarray:
    """White noise that belongs to the image, whatever stands beside it; clipped."""
    noise = [
        np.random.default_rng([seed, zlib.crc32(image.tobytes())]).standard_normal(
            image.shape, np.float32
        )
        for image in images
    ]
    noisy = constraints.as_images(images) + np.float32(sigma) * np.stack(noise)
    return np.clip(noisy, 0, 1)


def _label(given: argparse.Namespace, names: Sequence[str]) -> int | None:
    if given.target in ("any", "guess"):
        classes.check_keyword("--target", given.target, names)
    if given.target in (None, "any"):
        if given.task == "translate":
            raise UserError("--task=translate needs a class: give --target=3, say.")
        return None
    if given.target == "guess" and given.task != "translate":
        return editing.GUESS
    found = asked.parse_classes("--target", given.target, names)
    if len(found) != 1:
        others = "" if given.task == "translate" else ", or guess or any"
        raise UserError(f"--target={given.target}: give one class{others}.")
    return int(found[0])


def _references(
    given: argparse.Namespace, originals: Sequence[inputs.Picture], loaded: Trained
) -> dict[str, np.ndarray]:
    """Truth [H, W, C] uint8 by the picture's name, as far as it is given."""
    if given.reference and len(given.reference) != len(originals):
        raise UserError(
            f"there are {len(originals)} images and {len(given.reference)} "
            "--reference: give one for each image, in their order."
        )
    found = {}
    for text, picture in zip(given.reference, originals):
        path = Path(os.path.expanduser(text))
        if not os.path.isfile(path):
            raise UserError(f"there is no reference {text!r}: give an image file.")
        found[picture.name] = inputs.read_file(
            path, loaded.image_shape, loaded.config, given.resize
        )
    return found


def _compare(
    problem: Problem,
    names: Sequence[str],
    item: Item,
    edited: editing.Edited,
    number: int,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Input, result and, where it is known, the truth."""
    del names
    more: dict[str, Any] = {}
    if problem.labels is None:
        more = {"target": None, "target_confidence": None}
    result, start = edited.images[number], edited.start[number]
    shown = {"input": problem.degrade(item.image[None])[0]}
    given = item.image if problem.degraded else None
    truth = problem.truths.get(item.picture.name, given)
    if truth is None:
        return shown | {"result": result}, more
    true = constraints.as_images(truth)[0]
    more["psnr"] = _psnr(true, start, result, problem.hole)
    psnr = more["psnr"]["result"]
    ratio = math.inf if psnr is None else psnr
    return shown | {f"result, PSNR {ratio:.1f} dB": result, "truth": true}, more


def _psnr(
    truth: np.ndarray, start: np.ndarray, result: np.ndarray, hole: np.ndarray | None
) -> dict[str, float | None]:
    """Of the start and the result; of the hole alone too, where there is one."""
    whole = np.ones(truth.shape[:2], bool)
    regions = {"": whole} | ({} if hole is None else {"_in_hole": hole})
    values = {}
    for region, pixels in regions.items():
        for name, image in {"start": start, "result": result}.items():
            value = float(metrics.psnr(image[pixels][None], truth[pixels][None])[0])
            finite = math.isfinite(value)
            values[name + region] = records.reading(value) if finite else None
    return values


def _mean_gain(results: Sequence[dict[str, Any]]) -> str:
    """What the truth says about all results together."""
    pairs = [(r["psnr"]["start"], r["psnr"]["result"]) for r in results if "psnr" in r]
    if not pairs or None in {value for pair in pairs for value in pair}:
        return ""
    start, result = np.mean(pairs, axis=0)
    return f"; mean PSNR {result:.2f} dB, at the start {start:.2f} dB"
