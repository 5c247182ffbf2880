"""Samples into a folder: the command without a name."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from atebm_jax import data, drawing, pictures, recipes, seeds, storage, trained
from atebm_jax.data.folder import check_outside
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


def run(flags: argparse.Namespace, console: Console) -> None:
    """Draws the samples that the flags describe.

    Raises:
      UserError: a flag, the checkpoint, the seeds or the folder cannot be used.
    """
    loaded = trained.load(flags.workdir, best_by=flags.best_by)
    recipe = recipes.of_config(
        loaded.config.evaluate.samples,
        conditional=not flags.unconditional,
        **asked.of_recipe(flags),
    )
    classes = _classes(flags, loaded)
    if not 1 <= flags.count <= _MOST_IMAGES:
        raise UserError(
            f"--count is {flags.count}: expected 1 to {_MOST_IMAGES} images in one "
            "folder; for more give another --seed and --out."
        )
    check_choice("--quantise", flags.quantise, recipes.QUANTISE)
    spec, seeds_of, seeds_data = _seeds(flags, loaded)
    out = Path(local("--out", flags.out))
    if spec.startswith("folder:"):
        check_outside("--out", out, spec)
    protocol = {
        **records.described(loaded, flags.workdir),
        **recipe._asdict(),
        "classes": classes.tolist() if recipe.conditional else None,
        "seeds": spec,
        _SEEDS_DATA: seeds_data,
        "quantise": flags.quantise,
        "count": flags.count,
    }

    def check_seeds(before: Mapping[str, Any]) -> None:
        """Refuses other seeds than those of the samples that are there."""
        if seeds_data is not None:
            data.content.check(
                f"--seeds={spec}",
                before.get(_SEEDS_DATA),
                seeds_data,
                since=f"the samples in {out} were drawn",
                remedy="give another --out",
            )

    with held(out, "--out"):
        content = files.claim(
            out / "samples.json",
            protocol,
            free=("checkpoint", "count", _SEEDS_DATA),
            keep=_STAND_INS,
            what="samples",
            check=check_seeds,
        )
        _draw(loaded, recipe, classes, seeds_of, content, out, console)


def _draw(
    loaded: Trained,
    recipe: recipes.Recipe,
    classes: np.ndarray,
    seeds_of: seeds.SeedsFn,
    content: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    """Draws the samples that the folder lacks; `content` is that of its JSON file."""

    def labels_of(indices: np.ndarray) -> np.ndarray:
        return classes[indices % len(classes)]

    count, size = content["count"], drawing.CHUNK
    labels = labels_of(np.arange(count)).tolist() if recipe.conditional else None
    names = [
        f"{k:06d}" + (f"_class{labels[k]}" if labels else "") for k in range(count)
    ]
    paths = [out / f"{name}.png" for name in names]
    missing = sorted({i // size for i, path in enumerate(paths) if not path.exists()})
    stand_ins = seeds.stand_ins(seeds_of)
    stand_ins.update(content.get(_STAND_INS, ()))
    drawn = drawing.draw(
        loaded.model, loaded.variables, recipe, missing, labels_of, seeds_of
    )
    for number, images in track(drawn, "samples", console, len(missing)):
        if not np.isfinite(images).all():
            raise UserError(
                f"samples {number * size} and on are not finite numbers: the network "
                "has diverged; give another checkpoint as --workdir."
            )
        levels = np.asarray(recipes.QUANTISE[content["quantise"]](images))
        with files.told(out):
            # First: a command that is stopped between the two loses nothing.
            if content.get(_STAND_INS, []) != sorted(stand_ins):
                content[_STAND_INS] = sorted(stand_ins)
                storage.write_json(out / "samples.json", content, allow_nan=False)
            for path, image in zip(paths[number * size :], levels):
                storage.replace_bytes(path, pictures.png(image))
    files.finish(out, paths, labels, loaded.image_shape)
    said = "1 sample is" if count == 1 else f"{count} samples are"
    began = sum(index < count for index in stand_ins)
    more = f"; seeds that cannot be decoded, the next one instead: {began}"
    say(console, f"{said} in {out}{more if began else ''}")


def _classes(flags: argparse.Namespace, loaded: Trained) -> np.ndarray:
    """The classes that are drawn in turn, int32."""
    if flags.classes is None:
        return np.arange(loaded.num_classes, dtype=np.int32)
    if flags.unconditional:
        raise UserError("--classes and --unconditional exclude each other: give one.")
    names = asked.class_names(loaded, flags)
    return asked.parse_classes("--classes", flags.classes, names)


def _seeds(
    flags: argparse.Namespace, loaded: Trained
) -> tuple[str, seeds.SeedsFn, dict[str, Any] | None]:
    """What samples begin at: its name, the seeds, the description of a source."""
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
        made = seeds.seeds_fn(spec, flags.seed, config.data, gaussian=gaussian)
        return spec, made, None
    source = data.open_source(spec, flags.data_dir or config.data.data_dir)
    made = seeds.seeds_fn(spec, flags.seed, config.data, source=source)
    # Refuses seeds that do not fit, before a folder is made.
    made(np.zeros(1, np.int32), np.zeros(1, np.int32))
    return spec, made, data.content.describe(source)
