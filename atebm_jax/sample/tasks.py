"""What `edit` and `explain` ask of every image: start, constraint, class, comparison.

An explanation is an edit too: the translation of an image into one class after the
other, in one ball after the other.
"""

import argparse
import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atebm_jax import constraints, editing, metrics, recipes
from atebm_jax.command_line import positive_numbers
from atebm_jax.data import classes
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError, check_choice
from atebm_jax.sample import asked, inputs, records
from atebm_jax.trained import Trained

# Which flags a task takes, beside those of all; the first is the one that it needs.
_TASKS: dict[str, tuple[str, ...]] = {
    "inpaint": ("mask", "radius", "fill"),
    "translate": ("target", "radius", "mask"),
    "denoise": ("sigma", "mask", "strength"),
    "superres": ("factor",),
}
_DEFAULTS = {"fill": "mean", "strength": 0.5}

#: Pictures of a strip by title, and what the record of the result has beside.
Comparison = tuple[dict[str, np.ndarray], dict[str, Any]]


class Problem(NamedTuple):
    """What is asked of every image, in V variants."""

    names: Sequence[str]  #: of the classes
    shape: tuple[int, int, int]  #: (H, W, C) of the images that are given
    #: (images [B, H, W, C] uint8, variants [B]) -> rows to edit, and how
    rows: Callable[[np.ndarray, np.ndarray], tuple[editing.Rows, recipes.Recipe]]
    files: Sequence[str]  #: what the result of each variant is called
    #: (variant, its result, the given image [H, W, C] uint8, another one that is its
    #: truth or None) -> comparison
    compare: Callable[[int, Edited, np.ndarray, np.ndarray | None], Comparison]
    settings: dict[str, Any]  #: for the protocol
    hole: np.ndarray | None = None  #: [H, W] bool, or None


def _rows(
    given: argparse.Namespace,
    loaded: Trained,
    constraint: Callable[[np.ndarray, np.ndarray], Any],
    labels: np.ndarray | None,
    images: np.ndarray,
    variants: np.ndarray,
) -> tuple[editing.Rows, recipes.Recipe]:
    """`rows` of a problem; labels [V] int32 or `editing.GUESS`, None for no class."""
    return editing.prepare(
        constraint(images, variants),
        None if labels is None else labels[variants],
        loaded.config.evaluate.samples,
        **asked.of_recipe(given),
    )


# --- Explanations ---


def explanation(
    given: argparse.Namespace, loaded: Trained, names: Sequence[str]
) -> Problem:
    """Translation into every target, in a ball of every radius."""
    targets = asked.parse_classes("--target", given.target, names).tolist()
    radii = positive_numbers("--radius", given.radius.split(","))
    # Files are named by the radius: two radii of one name are one.
    radii = list({f"{radius:g}": radius for radius in radii}.values())
    pairs = [(target, radius) for target in dict.fromkeys(targets) for radius in radii]
    length = np.asarray([radius for _, radius in pairs])

    def compare(
        variant: int, edited: Edited, image: np.ndarray, truth: np.ndarray | None
    ) -> Comparison:
        del image, truth
        target, radius = pairs[variant]
        before = float(edited.path.original_confidence[0])
        after = float(edited.path.target_confidence[-1])
        title = f"as {names[target]}, {given.norm.capitalize()} radius {radius:g}"
        shown = {
            f"original\np({names[edited.originals]}) = {before:.3g}": edited.start,
            f"{title}\np({names[target]}) = {after:.3g}": edited.images,
        }
        reached = int(edited.path.predicted[-1]) == target
        return shown, {"radius": radius, "norm": given.norm, "reached": reached}

    def constraint(images: np.ndarray, variants: np.ndarray) -> constraints.Ball:
        return constraints.ball(images, length[variants], given.norm)

    labels = np.asarray([target for target, _ in pairs], np.int32)
    return Problem(
        names=names,
        shape=loaded.image_shape,
        rows=partial(_rows, given, loaded, constraint, labels),
        files=[f"target{target}_radius{radius:g}" for target, radius in pairs],
        compare=compare,
        settings={
            "asked": [
                {"target": records.named(target, names), "radius": radius}
                for target, radius in pairs
            ]
        },
    )


# --- Edits ---


def edit(given: argparse.Namespace, loaded: Trained, names: Sequence[str]) -> Problem:
    """The task that --task names."""
    given = _checked(given)
    hole = None
    if given.mask is not None:
        path = Path(os.path.expanduser(given.mask))
        hole = inputs.read_mask(path, loaded.image_shape, loaded.config, given.resize)
    own = [name for name in _TASKS[given.task] if name not in ("mask", "target")]
    settings = {name: getattr(given, name) for name in (*own, "degrade", "task")}
    settings["target"] = given.target or "any"
    if hole is not None:
        settings["mask_sha256"] = inputs.fingerprint(hole)
    shape, degrade = _given_images(given, loaded.image_shape, hole)
    label = _label(given, names)

    def compare(
        variant: int, edited: Edited, image: np.ndarray, truth: np.ndarray | None
    ) -> Comparison:
        """Input, result and, where it is known, the truth."""
        more: dict[str, Any] = {}
        if label is None:
            more = {"target": None, "target_confidence": None}
        shown = {"input": degrade(image[None])[0]}
        truth = image if given.degrade else truth
        if truth is None:
            return shown | {"result": edited.images}, more
        true = constraints.as_images(truth)[0]
        more["psnr"] = _psnr(true, edited, hole)
        psnr = more["psnr"]["result"]
        title = f"result, PSNR {math.inf if psnr is None else psnr:.1f} dB"
        return shown | {title: edited.images, "truth": true}, more

    def constraint(images: np.ndarray, variants: np.ndarray) -> Any:
        return _constraint(given, hole, degrade(images))

    labels = None if label is None else np.asarray([label], np.int32)
    return Problem(
        names=names,
        shape=shape,
        rows=partial(_rows, given, loaded, constraint, labels),
        files=[given.task],
        compare=compare,
        settings=settings,
        hole=hole,
    )


def _checked(given: argparse.Namespace) -> argparse.Namespace:
    """The flags with the task's defaults; refuses those that it would not heed."""
    check_choice("--task", given.task, _TASKS)
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


def _given_images(
    given: argparse.Namespace, shape: tuple[int, int, int], hole: np.ndarray | None
) -> tuple[tuple[int, int, int], Callable[[np.ndarray], np.ndarray]]:
    """Shape of the given images; given ones, uint8 -> what the edit is given.

    The latter are float32 in [0, 1]. `shape` is that of the model's images.
    """
    height, width, channels = shape
    degrade: Callable[[np.ndarray], np.ndarray] = constraints.as_images
    if hole is not None and given.degrade:
        black, kept = np.float32(0), ~hole[..., None]
        degrade = lambda images: np.where(kept, constraints.as_images(images), black)
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
    return shape, degrade


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


def references(
    given: argparse.Namespace, found: Sequence[inputs.Picture], loaded: Trained
) -> dict[str, np.ndarray]:
    """Truth [H, W, C] uint8 by the picture's name, as far as it is given."""
    if given.reference and len(given.reference) != len(found):
        raise UserError(
            f"there are {len(found)} images and {len(given.reference)} --reference: "
            "give one for each image, in their order."
        )
    truths = {}
    for text, picture in zip(given.reference, found):
        path = Path(os.path.expanduser(text))
        if not os.path.isfile(path):
            raise UserError(f"there is no reference {text!r}: give an image file.")
        truths[picture.name] = inputs.read_file(
            path, loaded.image_shape, loaded.config, given.resize
        )
    return truths


def _psnr(
    truth: np.ndarray, edited: Edited, hole: np.ndarray | None
) -> dict[str, float | None]:
    """Of the start and the result; of the hole alone too, where there is one."""
    regions = {"": np.ones(truth.shape[:2], bool)}
    if hole is not None:
        regions["_in_hole"] = hole
    values = {}
    for region, pixels in regions.items():
        for name, image in {"start": edited.start, "result": edited.images}.items():
            value = float(metrics.psnr(image[pixels][None], truth[pixels][None])[0])
            finite = math.isfinite(value)
            values[name + region] = records.reading(value) if finite else None
    return values


def summary(results: Sequence[dict[str, Any]]) -> str:
    """What is said of all results at the end."""
    if any("reached" in result for result in results):
        return f"; of their target to the model: {sum(r['reached'] for r in results)}"
    pairs = [(r["psnr"]["start"], r["psnr"]["result"]) for r in results if "psnr" in r]
    if not pairs or None in {value for pair in pairs for value in pair}:
        return ""
    start, result = np.mean(pairs, axis=0)
    return f"; mean PSNR {result:.2f} dB, at the start {start:.2f} dB"
