"""Samples into a folder: the command without a name."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from atebm_jax import ascent, data, seeds, storage
from atebm_jax.errors import UserError
from atebm_jax.evaluate import drawing
from atebm_jax.local_path import local
from atebm_jax.progress import say, track
from atebm_jax.sample import chunks, files, inputs, loading
from atebm_jax.sample.chunks import Recipe
from atebm_jax.workdir_lock import held

# Names have six digits, and one entry each in memory.
_MOST_IMAGES = 10**6
# In the protocol: numbers of samples whose seed cannot be decoded.
_STAND_INS = "undecodable_seeds"
# In the protocol: what tells the images that are the seeds from others.
_SEEDS_DATA = "seeds_data"


class Seeds(NamedTuple):
    """What samples begin at.

    Attributes:
      of: indices [B] -> seeds [B, H, W, C] float32; None for uniform noise.
      spec: noise, a kind of Gaussians, or a source.
      labels_of: indices [B] -> classes [B] int32.
      stand_ins: numbers of samples whose seed could not be decoded; grows.
      data: what tells the images of a source from others; None without one.
    """

    of: Callable[[np.ndarray], np.ndarray] | None
    spec: str
    labels_of: Callable[[np.ndarray], np.ndarray]
    stand_ins: set[int]
    data: dict[str, Any] | None = None


def run(flags: argparse.Namespace, console: Console) -> None:
    """Draws the samples that the flags describe.

    Raises:
      UserError: a flag, the checkpoint, the seeds or the folder cannot be used.
    """
    loaded = loading.load(flags)
    recipe = _recipe(flags, loaded.config)
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

    drawn_from = _seeds(flags, loaded, labels_of)
    out = Path(local("--out", flags.out))
    if drawn_from.spec.startswith("folder:"):
        files.check_outside(out, drawn_from.spec)
    protocol = {
        **loaded.described,
        **recipe._asdict(),
        "classes": classes.tolist() if recipe.conditional else None,
        "seeds": drawn_from.spec,
        _SEEDS_DATA: drawn_from.data,
        "quantise": flags.quantise,
        "count": flags.count,
    }
    labels = labels_of(np.arange(flags.count)).tolist()
    with held(out, "--out"):
        _draw(loaded, recipe, drawn_from, labels, protocol, to_bytes, out, console)


def _draw(
    loaded: loading.Loaded,
    recipe: Recipe,
    drawn_from: Seeds,
    labels: list[int],
    protocol: dict[str, Any],
    to_bytes: Callable[[np.ndarray], Any],
    out: Path,
    console: Console,
) -> None:
    """Draws the samples that the folder lacks."""
    conditional, count, size = recipe.conditional, len(labels), chunks.CHUNK
    clash = [k for k in protocol if k not in ("checkpoint", "count", _SEEDS_DATA)]
    same = partial(_check_seeds, out, drawn_from)
    content = files.claim(out, protocol, clash, keep=[_STAND_INS], check=same)
    drawn_from.stand_ins.update(content.get(_STAND_INS, ()))
    paths = [
        files.image_path(out, index, label if conditional else None)
        for index, label in enumerate(labels)
    ]
    missing = sorted({i // size for i, path in enumerate(paths) if not path.exists()})
    drawn = chunks.draw(
        loaded.model,
        loaded.variables,
        recipe,
        loaded.image_shape,
        missing,
        drawn_from.labels_of,
        drawn_from.of,
    )
    for number, images in track(drawn, "samples", console, len(missing)):
        if not np.isfinite(images).all():
            raise UserError(
                f"samples {number * size} and on are not finite numbers: the network "
                "has diverged; give another checkpoint as --workdir."
            )
        _note_stand_ins(out, content, drawn_from.stand_ins)
        levels = np.asarray(to_bytes(images))
        for path, image in zip(paths[number * size :], levels):
            files.write_image(path, image)
    files.finish(out, paths, labels if conditional else None, loaded.image_shape)
    said = "1 sample is" if count == 1 else f"{count} samples are"
    began = sum(index < count for index in drawn_from.stand_ins)
    more = f"; seeds that cannot be decoded, the next one instead: {began}" * bool(
        began
    )
    say(console, f"{said} in {out}{more}")


def _check_seeds(out: Path, drawn_from: Seeds, before: Mapping[str, Any]) -> None:
    """Refuses other seeds than those of the samples that are there."""
    if drawn_from.data is not None:
        data.content.check(
            f"--seeds={drawn_from.spec}",
            before.get(_SEEDS_DATA),
            drawn_from.data,
            since=f"the samples in {out} were drawn",
            remedy="give another --out",
        )


def _note_stand_ins(out: Path, content: dict[str, Any], stand_ins: set[int]) -> None:
    """Keeps which samples began at another seed, before they are written."""
    if content.get(_STAND_INS, []) != sorted(stand_ins):
        content[_STAND_INS] = sorted(stand_ins)
        with files.told(out):
            storage.write_json(out / "samples.json", content, allow_nan=False)


def _recipe(flags: argparse.Namespace, config: Any) -> Recipe:
    default = config.evaluate.samples
    recipe = Recipe(
        sampler=ascent.resolved(
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
) -> Seeds:
    config = loaded.config
    own = config.data.seeds
    spec = own if flags.seeds == "own" else flags.seeds
    if spec is None:
        spec = own if own in seeds.DRAWN else seeds.NOISE
    if spec == seeds.NOISE:
        return Seeds(None, spec, labels_of, set())
    if spec not in seeds.FITTED:
        source = data.open_source(spec, flags.data_dir or config.data.data_dir)
        return _read_seeds(source, spec, config.data, labels_of)
    gaussian = loaded.gaussian
    if gaussian is None or spec != own:
        raise UserError(
            f"--seeds={spec}: this checkpoint was trained from {own!r}, so that it "
            f"holds no Gaussians of that kind: choose noise, own or a data set."
        )

    def drawn(indices: np.ndarray) -> np.ndarray:
        return gaussian.batch(flags.seed, indices, labels_of(indices))

    return Seeds(drawn, spec, labels_of, set())


def _read_seeds(
    source: data.Source,
    spec: str,
    settings: Any,
    labels_of: Callable[[np.ndarray], np.ndarray],
) -> Seeds:
    """Image i of a source, over and over, `settings` being config.data."""
    stand_ins: set[int] = set()

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
    described = data.content.describe(source)
    return Seeds(seeds_of, spec, labels_of, stand_ins, described)
