"""Edits into a folder: `python -m atebm_jax.sample edit`."""

import argparse
import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from atebm_jax import constraints, metrics, pictures, sampling
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.local_path import local
from atebm_jax.progress import say
from atebm_jax.sample import chunks, edits, files, inputs, loading, process, records
from atebm_jax.sample.loading import Loaded
from atebm_jax.sample.process import Item

_JSON = "edit.json"
# Which flags a task takes, beside those of all; those that it needs come first.
_TASKS: dict[str, tuple[str, ...]] = {
    "inpaint": ("mask", "radius", "fill"),
    "translate": ("target", "radius", "mask"),
    "denoise": ("sigma", "mask", "strength"),
    "superres": ("factor",),
}
_DEFAULTS = {"fill": "mean", "strength": 0.5}


class Problem(NamedTuple):
    """A task with its settings.

    Attributes:
      task: its name.
      shape: (H, W, C) of the images that are given.
      degrade: those images [B, H, W, C] uint8 -> what the edit is given, float32 in
        [0, 1]; the same where the given ones are not the truth.
      constraint: what the edit is given -> constraint.
      hole: [H, W] bool, or None.
      settings: for the protocol.
    """

    task: str
    shape: tuple[int, int, int]
    degrade: Callable[[np.ndarray], np.ndarray]
    constraint: Callable[[np.ndarray], Any]
    hole: np.ndarray | None
    settings: dict[str, Any]


def run(given: argparse.Namespace, console: Console) -> None:
    """Edits the images that the flags name.

    Raises:
      UserError: a flag, the checkpoint, an image or the folder cannot be used.
    """
    given = _checked(given)
    loaded = loading.load(given)
    names = loading.class_names(loaded, given)
    problem = _problem(given, loaded)
    label = _label(given, names)
    out = Path(local("--out", given.out))
    for named in given.images:
        files.check_outside(out, named)

    def prepare(images: np.ndarray) -> tuple[edits.Rows, edits.Recipe]:
        labels = None if label is None else np.full(len(images), label, np.int32)
        return edits.prepare(
            problem.constraint(problem.degrade(images)),
            labels,
            loaded.config.evaluate.samples,
            step_size=given.step_size,
            num_steps=given.num_steps,
            sampler=given.sampler,
            schedule=given.schedule,
            seed=given.seed,
        )

    # All flags are looked at before an image is.
    rows, recipe = prepare(np.zeros((1, *problem.shape), np.uint8))
    originals = inputs.pictures(
        given.images,
        given.index,
        loaded.config,
        data_dir=given.data_dir,
        resize=given.resize,
        class_names=loaded.class_names,
        by_place=given.classes_by_place,
    )
    references = _references(given, originals, loaded)
    task = process.Task(
        shape=problem.shape,
        variants=1,
        rows=lambda images, variants: prepare(images)[0],
        recipe=recipe,
        write=partial(_write, out, problem, references, names, label is None),
        protocol=loaded.described
        | {"task": given.task, "target": given.target or "any"}
        | problem.settings
        | recipe._asdict()
        | {
            "step_size": records.reading(rows.step_sizes[0]),
            "references": {
                name: inputs.fingerprint(image) for name, image in references.items()
            },
            "inputs": inputs.described(loaded.config, given.resize),
            "note": "figures are of the results before they were rounded to bytes; "
            "paths have the start, then every step; psnr in decibels, null where "
            "an image is its truth",
        },
        json=_JSON,
    )
    results = process.run(loaded, originals, task, out, console)
    say(console, f"{len(results)} images are in {out}{_mean_gain(results)}")


def _problem(given: argparse.Namespace, loaded: Loaded) -> Problem:
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
    settings |= {"norm": given.norm, "degrade": given.degrade}
    if hole is not None:
        settings |= {"mask_sha256": inputs.fingerprint(hole)}
    constraint = partial(_constraint, given, hole)
    return Problem(given.task, shape, degrade, constraint, hole, settings)


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
    chunks.check_seed(given.seed)
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
        return sampling.GUESS
    found = loading.parse_classes("--target", given.target, names)
    if len(found) != 1:
        others = "" if given.task == "translate" else ", or guess or any"
        raise UserError(f"--target={given.target}: give one class{others}.")
    return int(found[0])


def _references(
    given: argparse.Namespace, originals: Sequence[inputs.Picture], loaded: Loaded
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


def _write(
    out: Path,
    problem: Problem,
    references: dict[str, np.ndarray],
    names: Sequence[str],
    free: bool,
    item: Item,
    edited: sampling.Edited,
) -> list[dict[str, Any]]:
    """Pictures and record of one edit."""
    name = item.picture.name
    file, strip = f"{name}_{problem.task}.png", f"{name}_strip.png"
    result, start = edited.images[0], edited.start[0]
    files.write_image(out / file, files.as_bytes(result))
    record = records.of_image(item, edited, 0, names)
    record["files"] = {"result": file, "strip": strip}
    if free:
        record |= {"target": None, "target_confidence": None}
    truth = references.get(name, item.image if problem.settings["degrade"] else None)
    shown = {"input": problem.degrade(item.image[None])[0]}
    if truth is None:
        shown["result"] = result
    else:
        true = constraints.as_images(truth)[0]
        record["psnr"] = _psnr(true, start, result, problem.hole)
        psnr = record["psnr"]["result"]
        ratio = math.inf if psnr is None else psnr
        shown |= {f"result, PSNR {ratio:.1f} dB": result, "truth": true}
    pictures.strip(out / strip, name, [_row(edited, shown, names, problem.hole)])
    return [record]


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


def _row(
    edited: sampling.Edited,
    shown: dict[str, np.ndarray],
    names: Sequence[str],
    hole: np.ndarray | None,
) -> pictures.Row:
    path = edited.path
    original, target = (names[k[0]] for k in (edited.originals, edited.targets))
    curves = {f"p({target})": path.target_confidence[0]}
    if original != target:
        curves[f"p({original})"] = path.original_confidence[0]
    change = edited.images[0] - edited.start[0]
    return pictures.Row(shown, change, curves, path.energy[0], hole)


def _mean_gain(results: Sequence[dict[str, Any]]) -> str:
    """What the truth says about all results together."""
    pairs = [(r["psnr"]["start"], r["psnr"]["result"]) for r in results if "psnr" in r]
    if not pairs or None in {value for pair in pairs for value in pair}:
        return ""
    start, result = np.mean(pairs, axis=0)
    return f"; mean PSNR {result:.2f} dB, at the start {start:.2f} dB"
