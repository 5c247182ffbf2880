"""Samples into a folder: the command without a name."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from atebm_jax import data, drawing, recipes, seeds, storage, trained
from atebm_jax.errors import UserError, check_choice
from atebm_jax.local_path import local
from atebm_jax.progress import say, track
from atebm_jax.sample import asked, files, records
from atebm_jax.trained import Trained
from atebm_jax.workdir_lock import held

# Names have six digits, and one entry each in memory.
_MOST_IMAGES = 10**6
# In the protocol: numbers of samples whose seed cannot be decoded.
_STAND_INS = "undecodable_seeds"
# In the protocol: what tells the images that are the seeds from others.
_SEEDS_DATA = "seeds_data"


class Start(NamedTuple):
    """What samples begin at.

    Attributes:
      seeds_of: as of `drawing.draw`.
      spec: noise, a kind of Gaussians, or a source.
      data: what tells the images of a source from others; None without one.
    """

    seeds_of: drawing.SeedsFn
    spec: str
    data: dict[str, Any] | None = None

    @property
    def stand_ins(self) -> set[int]:
        """Numbers of samples whose seed could not be decoded; grows."""
        return drawing.stand_ins(self.seeds_of)


def run(flags: argparse.Namespace, console: Console) -> None:
    """Draws the samples that the flags describe.

    Raises:
      UserError: a flag, the checkpoint, the seeds or the folder cannot be used.
    """
    loaded = trained.load(flags.workdir, best_by=flags.best_by)
    recipe = recipes.of_config(
        loaded.config.evaluate.samples,
        sampler=flags.sampler,
        schedule=flags.schedule,
        step_size=flags.step_size,
        num_steps=flags.num_steps,
        target_energy=flags.target_energy,
        smooth=flags.smooth,
        seed=flags.seed,
        conditional=not flags.unconditional,
    )
    classes = _classes(flags, loaded)
    if not 1 <= flags.count <= _MOST_IMAGES:
        raise UserError(
            f"--count is {flags.count}: expected 1 to {_MOST_IMAGES} images in one "
            "folder; for more give another --seed and --out."
        )
    check_choice("--quantise", flags.quantise, recipes.QUANTISE)
    to_bytes = recipes.QUANTISE[flags.quantise]

    def labels_of(indices: np.ndarray) -> np.ndarray:
        return classes[indices % len(classes)]

    start = _start(flags, loaded)
    out = Path(local("--out", flags.out))
    if start.spec.startswith("folder:"):
        files.check_outside(out, start.spec)
    protocol = {
        **records.described(loaded, flags.workdir),
        **recipe._asdict(),
        "classes": classes.tolist() if recipe.conditional else None,
        "seeds": start.spec,
        _SEEDS_DATA: start.data,
        "quantise": flags.quantise,
        "count": flags.count,
    }
    with held(out, "--out"):
        _draw(loaded, recipe, start, labels_of, protocol, to_bytes, out, console)


def _draw(
    loaded: Trained,
    recipe: recipes.Recipe,
    start: Start,
    labels_of: drawing.LabelsFn,
    protocol: dict[str, Any],
    to_bytes: Callable[[np.ndarray], Any],
    out: Path,
    console: Console,
) -> None:
    """Draws the samples that the folder lacks."""
    count, size = protocol["count"], drawing.CHUNK
    labels = labels_of(np.arange(count)).tolist() if recipe.conditional else None
    clash = [k for k in protocol if k not in ("checkpoint", "count", _SEEDS_DATA)]
    same = partial(_check_seeds, out, start)
    content = files.claim(out, protocol, clash, keep=[_STAND_INS], check=same)
    start.stand_ins.update(content.get(_STAND_INS, ()))
    paths = [
        files.image_path(out, index, labels[index] if labels else None)
        for index in range(count)
    ]
    missing = sorted({i // size for i, path in enumerate(paths) if not path.exists()})
    drawn = drawing.draw(
        loaded.model, loaded.variables, recipe, missing, labels_of, start.seeds_of
    )
    for number, images in track(drawn, "samples", console, len(missing)):
        if not np.isfinite(images).all():
            raise UserError(
                f"samples {number * size} and on are not finite numbers: the network "
                "has diverged; give another checkpoint as --workdir."
            )
        _note_stand_ins(out, content, start.stand_ins)
        levels = np.asarray(to_bytes(images))
        for path, image in zip(paths[number * size :], levels):
            files.write_image(path, image)
    files.finish(out, paths, labels, loaded.image_shape)
    said = "1 sample is" if count == 1 else f"{count} samples are"
    began = sum(index < count for index in start.stand_ins)
    more = f"; seeds that cannot be decoded, the next one instead: {began}" * bool(
        began
    )
    say(console, f"{said} in {out}{more}")


def _check_seeds(out: Path, start: Start, before: Mapping[str, Any]) -> None:
    """Refuses other seeds than those of the samples that are there."""
    if start.data is not None:
        data.content.check(
            f"--seeds={start.spec}",
            before.get(_SEEDS_DATA),
            start.data,
            since=f"the samples in {out} were drawn",
            remedy="give another --out",
        )


def _note_stand_ins(out: Path, content: dict[str, Any], stand_ins: set[int]) -> None:
    """Keeps which samples began at another seed, before they are written."""
    if content.get(_STAND_INS, []) != sorted(stand_ins):
        content[_STAND_INS] = sorted(stand_ins)
        with files.told(out):
            storage.write_json(out / "samples.json", content, allow_nan=False)


def _classes(flags: argparse.Namespace, loaded: Trained) -> np.ndarray:
    if flags.classes is None:
        return np.arange(loaded.num_classes, dtype=np.int32)
    if flags.unconditional:
        raise UserError("--classes and --unconditional exclude each other: give one.")
    names = asked.class_names(loaded, flags)
    return asked.parse_classes("--classes", flags.classes, names)


def _start(flags: argparse.Namespace, loaded: Trained) -> Start:
    config = loaded.config
    own = config.data.seeds
    spec = own if flags.seeds == "own" else flags.seeds
    if spec is None:
        # A job that was given its seeds in memory keeps none.
        spec = seeds.NOISE if loaded.gaussian is None else own
    if spec in seeds.FITTED and (loaded.gaussian is None or spec != own):
        raise UserError(
            f"--seeds={spec}: this checkpoint, whose config.data.seeds is {own!r}, "
            "holds no Gaussians of that kind: choose noise or a data set."
        )
    if spec in seeds.DRAWN:
        gaussian = loaded.gaussian if spec in seeds.FITTED else None
        seeds_of = drawing.seeds_fn(spec, flags.seed, config.data, gaussian=gaussian)
        return Start(seeds_of, spec)
    source = data.open_source(spec, flags.data_dir or config.data.data_dir)
    seeds_of = drawing.seeds_fn(spec, flags.seed, config.data, source=source)
    # Seeds that do not fit are told before a folder is made.
    seeds_of(np.zeros(1, np.int32), np.zeros(1, np.int32))
    return Start(seeds_of, spec, data.content.describe(source))
