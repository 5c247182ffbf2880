"""Samples into a folder: the command without a name."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from atebm_jax import data, seeds
from atebm_jax.errors import UserError
from atebm_jax.reporting import say
from atebm_jax.sample import chunks, files, inputs, loading
from atebm_jax.sample.chunks import Recipe

# Names have six digits, and one entry each in memory.
_MOST_IMAGES = 10**6


def run(flags: argparse.Namespace, console: Console) -> None:
    """Draws the samples that the flags describe.

    Raises:
      UserError: a flag, the checkpoint, the seeds or the folder cannot be used.
    """
    loaded = loading.load(flags)
    config, shape = loaded.config, loaded.image_shape
    recipe = _recipe(flags, config)
    classes = _classes(flags, loaded)
    if not 1 <= flags.count <= _MOST_IMAGES:
        raise UserError(
            f"--count is {flags.count}: expected 1 to {_MOST_IMAGES} images in one "
            "folder; for more give another --seed and --out."
        )
    to_bytes = _rounding(flags.quantise)

    def labels_of(indices: np.ndarray) -> np.ndarray:
        return classes[indices % len(classes)]

    seeds_of, spec = _seeds(flags, loaded, labels_of)
    out = Path(flags.out).expanduser()
    if spec.startswith("folder:"):
        files.check_outside(out, spec)
    protocol = {
        **loaded.described,
        **recipe._asdict(),
        "classes": classes.tolist() if recipe.conditional else None,
        "seeds": spec,
        "quantise": flags.quantise,
        "count": flags.count,
    }
    files.claim(
        out, protocol, [k for k in protocol if k not in ("checkpoint", "count")]
    )

    paths, labels = [], []
    for index in range(flags.count):
        labels.append(int(classes[index % len(classes)]))
        label = labels[-1] if recipe.conditional else None
        paths.append(files.image_path(out, index, label))
    size = chunks.CHUNK
    missing = sorted({i // size for i, path in enumerate(paths) if not path.exists()})
    drawn = chunks.draw(
        loaded.model, loaded.variables, recipe, shape, missing, labels_of, seeds_of
    )
    for number, images in track(
        drawn,
        "samples",
        total=len(missing),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        if not np.isfinite(images).all():
            raise UserError(
                f"samples {number * size} and on are not finite numbers: the network "
                "has diverged; give another checkpoint as --workdir."
            )
        for path, image in zip(paths[number * size :], to_bytes(images)):
            files.write_image(path, image)
    files.finish(out, paths, labels if recipe.conditional else None, shape)
    said = "1 sample is" if flags.count == 1 else f"{flags.count} samples are"
    say(console, f"{said} in {out}")


def _recipe(flags: argparse.Namespace, config: Any) -> Recipe:
    default = config.evaluate.samples
    recipe = Recipe(
        sampler=flags.sampler,
        schedule=flags.schedule,
        step_size=default.step_size if flags.step_size is None else flags.step_size,
        num_steps=default.num_steps if flags.num_steps is None else flags.num_steps,
        target_energy=flags.target_energy,
        smooth=flags.smooth,
        seed=flags.seed,
        conditional=not flags.unconditional,
    )
    chunks.check(recipe)
    return recipe


def _classes(flags: argparse.Namespace, loaded: loading.Loaded) -> np.ndarray:
    if flags.classes is None:
        return np.arange(loaded.num_classes, dtype=np.int32)
    if flags.unconditional:
        raise UserError("--classes and --unconditional exclude each other: give one.")
    names = loading.class_names(loaded, flags)
    return loading.parse_classes("--classes", flags.classes, names)


def _rounding(name: str) -> Callable[[np.ndarray], np.ndarray]:
    choices: dict[str, Callable] = {"nearest": np.round, "reference": np.floor}
    if name not in choices:
        raise UserError(f"--quantise is {name!r}: choose nearest or reference.")
    return lambda images: choices[name](images * np.float32(255)).astype(np.uint8)


def _seeds(
    flags: argparse.Namespace,
    loaded: loading.Loaded,
    labels_of: Callable[[np.ndarray], np.ndarray],
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, str]:
    """Image i of the seeds, over and over, and the name of their source."""
    config = loaded.config
    own = config.data.seeds
    spec = own if flags.seeds == "own" else flags.seeds
    if spec is None:
        spec = own if own in seeds.DRAWN else seeds.NOISE
    if spec == seeds.NOISE:
        return None, spec
    if spec in seeds.FITTED:
        gaussian = loaded.gaussian
        if gaussian is None or spec != own:
            raise UserError(
                f"--seeds={spec}: this checkpoint was trained from {own!r}, so that it "
                f"holds no Gaussians of that kind: choose noise, own or a data set."
            )
        return lambda i: gaussian.batch(flags.seed, i, labels_of(i)), spec
    source = data.open_source(spec, flags.data_dir or config.data.data_dir)
    settings = config.data

    def seed_of(index: int) -> np.ndarray:
        # The next one where an image cannot be decoded: never a black one.
        for position in range(index, index + settings.max_bad_images + 1):
            image = inputs.read_example(
                source, position % len(source), settings.preprocess_seeds, settings
            )
            if image is not None:
                return image / np.float32(255)
        raise UserError(
            f"--seeds={spec}: {source.describe(index % len(source))} and the "
            f"{settings.max_bad_images} images after it cannot be decoded: remove them."
        )

    def seeds_of(indices: np.ndarray) -> np.ndarray:
        return np.stack([seed_of(int(index)) for index in indices])

    seed_of(0)  # Seeds that do not fit are told before a folder is made.
    return seeds_of, spec
