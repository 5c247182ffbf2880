"""The command: `python -m atebm_jax.sample --workdir=runs/digits --out=DIR`.

Exit codes: 0 finished; 2 a mistake in flags, checkpoint or data, said in one sentence;
130 or 143 stopped by a signal. The same command then goes on.
"""

import argparse
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import track

from atebm_jax.command_line import fail, quiet_libraries
from atebm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from atebm_jax.sample.chunks import Recipe


class _Parser(argparse.ArgumentParser):
    """Says mistakes as all commands do."""

    def error(self, message: str) -> NoReturn:
        fail(UserError(f"{message}; --help lists the flags."))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m atebm_jax.sample",
        description="Draws images from a trained model by descent of its energy. Image "
        "i is the same whatever --count and the number of devices.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="workdir, or one of its checkpoints")
    add("--best_by", help="robust_accuracy or sample_distance: that checkpoint")
    add("--out", required=True, help="folder for PNG files, grid.png and samples.npz")
    add("--count", type=int, default=64, help="images, default 64")
    add("--classes", help="3,7: these classes in turn; default all")
    add("--unconditional", action="store_true", help="no class, by E(x)")
    add("--seeds", default="noise", help="noise, own (config.data.seeds) or a source")
    add("--data_dir", help="where TFDS data sets lie")
    add("--sampler", default="pgd", help="pgd, momentum, adam or sgld")
    add("--schedule", default="constant", help="constant, linear or cosine")
    add("--step_size", type=float, help="default: the config's")
    add("--num_steps", type=int, help="default: the config's")
    add("--target_energy", type=float, help="an image stops at this energy")
    add("--smooth", type=float, default=0.0, help="Gaussian blur of the seeds, pixels")
    add("--seed", type=int, default=0, help="of noise")
    add("--quantise", default="nearest", help="to bytes: nearest, or reference (down)")
    return parser


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Draws the samples that the flags describe.

    Raises:
      UserError: a flag, the checkpoint, the seeds or the folder cannot be used.
    """
    import ml_collections

    from atebm_jax import checkpoint, models
    from atebm_jax import config as configuration
    from atebm_jax.evaluate.store import weights_fingerprint
    from atebm_jax.sample import chunks, files

    flags = _parser().parse_args(arguments)
    console = console or Console()
    weights, meta = checkpoint.load_weights(flags.workdir, best_by=flags.best_by)
    config = ml_collections.ConfigDict(configuration.complete(meta["config"]))
    recipe = _recipe(flags, config)
    classes = _classes(flags, config.model.num_classes)
    if flags.count < 1:
        raise UserError(f"--count is {flags.count}: it must be positive.")
    to_bytes = _rounding(flags.quantise)
    shape: tuple[int, int, int] = tuple(config.data.image_shape)
    seeds, spec = _seeds(flags, config)
    out = Path(flags.out).expanduser()
    protocol = {
        "checkpoint": str(flags.workdir),
        "averaged_weights_sha256": weights_fingerprint(weights),
        **recipe._asdict(),
        "classes": classes.tolist() if recipe.conditional else None,
        "seeds": spec,
        "quantise": flags.quantise,
        "count": flags.count,
        "versions": {n: importlib.metadata.version(n) for n in ("atebm_jax", "jax")},
    }
    files.claim(
        out, protocol, [k for k in protocol if k not in ("checkpoint", "count")]
    )

    def labels_of(indices: "np.ndarray") -> "np.ndarray":
        return classes[indices % len(classes)]

    paths, labels = [], []
    for index in range(flags.count):
        labels.append(int(classes[index % len(classes)]))
        label = labels[-1] if recipe.conditional else None
        paths.append(files.image_path(out, index, label))
    size = chunks.CHUNK
    missing = sorted({i // size for i, path in enumerate(paths) if not path.exists()})
    drawn = chunks.draw(
        models.build(config.model), weights, recipe, shape, missing, labels_of, seeds
    )
    for number, images in track(
        drawn, "samples", total=len(missing), console=console, transient=True
    ):
        for path, image in zip(paths[number * size :], to_bytes(images)):
            files.write_image(path, image)
    files.finish(out, paths, labels if recipe.conditional else None, shape)
    console.print(
        f"{flags.count} samples are in {out}", highlight=False, soft_wrap=True
    )


def _recipe(flags: argparse.Namespace, config: Any) -> "Recipe":
    from atebm_jax.sample import chunks

    default = config.evaluate.samples
    recipe = chunks.Recipe(
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


def _classes(flags: argparse.Namespace, num_classes: int) -> "np.ndarray":
    import numpy as np

    if flags.classes is None:
        return np.arange(num_classes, dtype=np.int32)
    if flags.unconditional:
        raise UserError("--classes and --unconditional exclude each other: give one.")
    texts = [text.strip() for text in flags.classes.split(",")]
    if not all(t.isdecimal() and int(t) < num_classes for t in texts):
        raise UserError(
            f"--classes={flags.classes}: expected numbers from 0 to {num_classes - 1}, "
            "with commas."
        )
    return np.asarray([int(text) for text in texts], np.int32)


def _rounding(name: str) -> "Callable[[np.ndarray], np.ndarray]":
    import numpy as np

    choices: dict[str, Callable] = {"nearest": np.round, "reference": np.floor}
    if name not in choices:
        raise UserError(f"--quantise is {name!r}: choose nearest or reference.")
    return lambda images: choices[name](images * np.float32(255)).astype(np.uint8)


def _seeds(
    flags: argparse.Namespace, config: Any
) -> "tuple[Callable[[np.ndarray], np.ndarray] | None, str]":
    """Image i of the seeds, over and over, and the name of their source."""
    import numpy as np

    from atebm_jax import data

    spec = config.data.seeds if flags.seeds == "own" else flags.seeds
    if spec == "noise":
        return None, spec
    source = data.open_source(spec, flags.data_dir or config.data.data_dir)
    settings = config.data

    def seed_of(index: int) -> np.ndarray:
        # The next one where an image cannot be decoded: never a black one.
        for position in range(index, index + settings.max_bad_images + 1):
            with data.eval_batches(
                source,
                preprocess=settings.preprocess_seeds,
                batch_size=1,
                image_shape=tuple(settings.image_shape),
                start=position % len(source),
                num_threads=1,
                prefetch=1,
                max_bad_images=settings.max_bad_images,
            ) as batches:
                batch = next(batches)
            if batch["mask"][0]:
                return batch["images"][0] / np.float32(255)
        raise UserError(
            f"--seeds={spec}: {source.describe(index % len(source))} and the "
            f"{settings.max_bad_images} images after it cannot be decoded: remove them."
        )

    def seeds_of(indices: np.ndarray) -> np.ndarray:
        return np.stack([seed_of(int(index)) for index in indices])

    return seeds_of, spec


def cli() -> None:
    """Entry point of the command line."""
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped: the same command goes on.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    cli()
