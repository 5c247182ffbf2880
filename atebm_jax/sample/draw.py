"""Samples into a folder: the command without a name."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from atebm_jax import data, samplers, seeds
from atebm_jax.errors import UserError
from atebm_jax.evaluate import drawing
from atebm_jax.reporting import say
from atebm_jax.sample import chunks, files, inputs, loading
from atebm_jax.sample.chunks import Recipe

# Names have six digits, and one entry each in memory.
_MOST_IMAGES = 10**6
# In the protocol: numbers of samples whose seed cannot be decoded.
_STAND_INS = "undecodable_seeds"


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
    if flags.quantise not in drawing.QUANTISE:
        raise UserError(
            f"--quantise is {flags.quantise!r}: choose one of "
            f"{', '.join(drawing.QUANTISE)}."
        )
    to_bytes = drawing.QUANTISE[flags.quantise]

    def labels_of(indices: np.ndarray) -> np.ndarray:
        return classes[indices % len(classes)]

    seeds_of, spec, stand_ins = _seeds(flags, loaded, labels_of)
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
    clash = [k for k in protocol if k not in ("checkpoint", "count")]
    content = files.claim(out, protocol, clash, keep=[_STAND_INS])
    stand_ins.update(content.get(_STAND_INS, ()))

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
        _note_stand_ins(out, content, stand_ins)
        levels = np.asarray(to_bytes(images))
        for path, image in zip(paths[number * size :], levels):
            files.write_image(path, image)
    files.finish(out, paths, labels if recipe.conditional else None, shape)
    said = "1 sample is" if flags.count == 1 else f"{flags.count} samples are"
    began = sum(index < flags.count for index in stand_ins)
    more = f"; seeds that cannot be decoded, the next one instead: {began}" * bool(
        began
    )
    say(console, f"{said} in {out}{more}")


def _note_stand_ins(out: Path, content: dict[str, Any], stand_ins: set[int]) -> None:
    """Keeps which samples began at another seed, before they are written."""
    if content.get(_STAND_INS, []) != sorted(stand_ins):
        content[_STAND_INS] = sorted(stand_ins)
        with files.told(out):
            files.write_json(out / "samples.json", content)


def _recipe(flags: argparse.Namespace, config: Any) -> Recipe:
    default = config.evaluate.samples
    recipe = Recipe(
        sampler=samplers.resolved(
            default.sampler if flags.sampler is None else flags.sampler
        ),
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


def _seeds(
    flags: argparse.Namespace,
    loaded: loading.Loaded,
    labels_of: Callable[[np.ndarray], np.ndarray],
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, str, set[int]]:
    """Image i of the seeds, over and over; their source; where another one stood in."""
    stand_ins: set[int] = set()
    config = loaded.config
    own = config.data.seeds
    spec = own if flags.seeds == "own" else flags.seeds
    if spec is None:
        spec = own if own in seeds.DRAWN else seeds.NOISE
    if spec == seeds.NOISE:
        return None, spec, stand_ins
    if spec in seeds.FITTED:
        gaussian = loaded.gaussian
        if gaussian is None or spec != own:
            raise UserError(
                f"--seeds={spec}: this checkpoint was trained from {own!r}, so that it "
                f"holds no Gaussians of that kind: choose noise, own or a data set."
            )
        return lambda i: gaussian.batch(flags.seed, i, labels_of(i)), spec, stand_ins
    source = data.open_source(spec, flags.data_dir or config.data.data_dir)
    settings = config.data

    def seed_of(index: int) -> np.ndarray:
        # The next one where an image cannot be decoded: never a black one.
        for position in range(index, index + settings.max_bad_images + 1):
            image = inputs.read_example(
                source, position % len(source), settings.preprocess_seeds, settings
            )
            if image is not None:
                if position > index:
                    stand_ins.add(index)
                return image / np.float32(255)
        raise UserError(
            f"--seeds={spec}: {source.describe(index % len(source))} and the "
            f"{settings.max_bad_images} images after it cannot be decoded: remove them."
        )

    def seeds_of(indices: np.ndarray) -> np.ndarray:
        return np.stack([seed_of(int(index)) for index in indices])

    seed_of(0)  # Seeds that do not fit are told before a folder is made.
    return seeds_of, spec, stand_ins
