"""Draws quality against the number of network evaluations, sampler by sampler.

    python benchmarks/samplers.py --workdir=runs/digits --png=samplers.png

An evaluation is a forward and backward pass of the network, one a step. Quality is the
Frechet distance to training images, on the principal components of pixels
(`evaluate.pixel_scores`) and on the model's own features, and the share of samples that
the config's judge calls by the class asked for. All settings start from the same seeds.
"""

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from options import Parser, command, fail, machine, positive, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atebm_jax import ascent, constraints, data, drawing, metrics, recipes, trained
from atebm_jax.errors import UserError
from atebm_jax.evaluate import pixel_scores
from atebm_jax.evaluate.extractors import from_model
from atebm_jax.sample import records
from atebm_jax.seeds import seeds_fn
from atebm_jax.trained import Trained

# Multiples of the config's step size; SGLD's multiplies the gradient itself.
_DEFAULTS = (
    *(("pgd", factor, "constant") for factor in (1 / 3, 1.0, 2.0)),
    ("pgd", 1.0, "linear"),
    ("pgd", 2.0, "cosine"),
    *(("momentum", factor, "constant") for factor in (1 / 3, 1.0)),
    ("momentum", 1.0, "cosine"),
    *(("adam", factor, "constant") for factor in (1 / 3, 1.0)),
    ("adam", 1.0, "cosine"),
)
_SGLD = (0.03, 0.1, 0.3)
_QUALITIES = {
    "sample_distance": "Frechet distance, pixel components",
    "feature_distance": "Frechet distance, the model's features",
    "sample_agreement": "share called by their class by the judge",
}


class Setting(NamedTuple):
    """A sampler with its step size and schedule."""

    sampler: str
    step_size: float
    schedule: str = "constant"

    @property
    def name(self) -> str:
        """As --setting takes it."""
        return f"{self.sampler}:{self.step_size:.3g}:{self.schedule}"


class Judges(NamedTuple):
    """What samples are compared with.

    Attributes:
      pixels: as of `pixel_scores.make_reference`.
      features: images [N, H, W, C] in [0, 1] -> [N, D].
      mean, covariance: of the training images' features.
    """

    pixels: pixel_scores.Reference
    features: Any
    mean: np.ndarray
    covariance: np.ndarray

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The three qualities of samples, the last one where there is a judge."""
        statistics = metrics.feature_statistics(self.features(images))
        distance = metrics.frechet_distance(*statistics, self.mean, self.covariance)
        scores = pixel_scores.score(self.pixels, images, labels)
        return scores | {"feature_distance": distance}


def main(argv: Sequence[str]) -> None:
    """Runs the comparison that the flags describe."""
    parser = _parser()
    flags = parser.parse_args(argv)
    console = Console()
    loaded = trained.load(flags.workdir, best_by=flags.best_by)
    settings = [_setting(text) for text in flags.setting] or _defaults(loaded.config)
    counts = _whole_numbers("--evaluations", flags.evaluations)
    seeds = _whole_numbers("--seeds", flags.seeds)
    wanted = {
        (setting, count, seed): recipes.Recipe(
            setting.sampler, setting.schedule, setting.step_size, count, seed=seed
        )
        for setting in settings
        for count in counts
        for seed in seeds
    }
    for recipe in wanted.values():
        recipes.check(recipe)
    judges, real = _judges(loaded, flags.num)
    scores: dict[str, dict[int, list[dict[str, float]]]] = {}
    for (setting, count, seed), recipe in track(
        wanted.items(),
        "samplers",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        made = _draw(loaded, recipe, flags.num)
        row = scores.setdefault(setting.name, {}).setdefault(count, [])
        row.append(judges.score(made, np.arange(flags.num) % loaded.num_classes))
    summary = {
        name: {count: _mean(found) for count, found in row.items()}
        for name, row in scores.items()
    }
    for quality, title in _QUALITIES.items():
        if quality in real:
            console.print(_table(title, quality, summary, counts, real[quality]))
    if flags.png:
        _plot(Path(flags.png), summary, real)
    write_json(
        flags.json,
        {
            "command": command(),
            "machine": machine(),
            "versions": {
                n: importlib.metadata.version(n) for n in ("jax", "atebm_jax")
            },
            "model": records.described(loaded, flags.workdir),
            "samples": flags.num,
            "seeds": seeds,
            "real_test": real,
            "scores": scores,
        },
    )


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", required=True, help="workdir, or one of its checkpoints")
    add("--best_by", help="robust_accuracy or sample_distance: that checkpoint")
    add(
        "--setting",
        action="append",
        default=[],
        metavar="SAMPLER:STEP_SIZE[:SCHEDULE]",
        help="repeat it; default: several around the config's step size",
    )
    add("--evaluations", default="5,10,20,40,80", help="numbers of steps")
    add("--num", type=positive, default=400, help="samples of each setting and seed")
    add("--seeds", default="0,1,2", help="of the noise; the table has their mean")
    add("--json", default="", help="write every score to this file")
    add("--png", default="", help="write the plot to this file")
    return parser


def _setting(text: str) -> Setting:
    sampler, _, rest = text.partition(":")
    size, _, schedule = rest.partition(":")
    try:
        return Setting(sampler, float(size), schedule or "constant")
    except ValueError:
        raise UserError(
            f"--setting={text}: expected SAMPLER:STEP_SIZE[:SCHEDULE], such as "
            "pgd:0.3 or adam:0.1:cosine."
        ) from None


def _defaults(config: Any) -> list[Setting]:
    base = config.evaluate.samples.step_size
    scaled = [
        Setting(sampler, factor * base, schedule)
        for sampler, factor, schedule in _DEFAULTS
    ]
    return scaled + [Setting("sgld", size) for size in _SGLD]


def _whole_numbers(flag: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{flag}={text}: expected whole numbers with commas.")
    return [int(word) for word in words]


def _judges(loaded: Trained, num: int) -> tuple[Judges, dict[str, float]]:
    """What samples are compared with, and how as many real test images score."""
    config, settings = loaded.config, loaded.config.evaluate.samples
    images, labels = _images(config, config.data.train, settings.num_reference)
    pixels = pixel_scores.make_reference(images, labels, settings)
    extractor = from_model("model", loaded.model, loaded.variables, loaded.num_classes)
    pooled = jax.jit(lambda variables, x: extractor.apply(variables, x)[0])

    def features(images: np.ndarray) -> np.ndarray:
        size = config.evaluate.batch_size
        found = []
        for first in range(0, len(images), size):
            part = constraints.as_images(images[first : first + size])
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(pooled(loaded.variables, padded))[: len(part)])
        return np.concatenate(found)

    judges = Judges(pixels, features, *metrics.feature_statistics(features(images)))
    return judges, judges.score(*_images(config, config.data.test, num))


def _images(config: Any, spec: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    return data.materialise(
        data.open_source(spec, config.data.data_dir),
        config.data.preprocess,
        tuple(config.data.image_shape),
        limit,
        config.data.max_bad_images,
    )


def _draw(loaded: Trained, recipe: recipes.Recipe, num: int) -> np.ndarray:
    settings = loaded.config.data
    return drawing.images(
        loaded.model,
        loaded.variables,
        recipe,
        num,
        drawing.cyclic_labels(loaded.num_classes),
        seeds_fn("noise", recipe.seed, settings),
    )


def _mean(found: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds."""
    return {
        quality: (
            float(np.mean([scores[quality] for scores in found])),
            float(np.std([scores[quality] for scores in found])),
        )
        for quality in found[0]
    }


def _table(
    title: str,
    quality: str,
    summary: Mapping[str, Mapping[int, dict[str, tuple[float, float]]]],
    counts: Sequence[int],
    real: float,
) -> Table:
    spread = max(row[count][quality][1] for row in summary.values() for count in counts)
    table = Table(
        title=f"{title} ({real:.3g} of real test images)",
        caption=f"means over seeds; standard deviations at most {spread:.2g}",
    )
    table.add_column("setting / evaluations", no_wrap=True)
    for count in counts:
        table.add_column(f"{count}", justify="right", no_wrap=True)
    for name, row in summary.items():
        table.add_row(name, *(f"{row[count][quality][0]:.3f}" for count in counts))
    return table


def _plot(
    path: Path,
    summary: Mapping[str, Mapping[int, dict[str, tuple[float, float]]]],
    real: Mapping[str, float],
) -> None:
    shown = [quality for quality in _QUALITIES if quality in real]
    figure = Figure(figsize=(4.6 * len(shown) + 1.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    colours = {name: f"C{k}" for k, name in enumerate(ascent.RULES)}
    lines = {"constant": "-", "linear": "--", "cosine": ":"}
    markers: dict[str, int] = {}
    for name, row in summary.items():
        sampler, _, schedule = name.split(":")
        sampler = sampler.partition("(")[0].strip()
        # Step sizes and settings of one sampler are told apart by their markers.
        marker = "os^Dv*"[markers.setdefault(sampler, 0) % 6]
        markers[sampler] += 1
        for axis, quality in zip(axes, shown, strict=True):
            axis.errorbar(
                list(row),
                [scores[quality][0] for scores in row.values()],
                [scores[quality][1] for scores in row.values()],
                color=colours[sampler],
                linestyle=lines[schedule],
                marker=marker,
                markersize=4,
                linewidth=1.2,
                label=name,
            )
    for axis, quality in zip(axes, shown, strict=True):
        axis.axhline(real[quality], color="grey", linewidth=0.8)
        axis.set_xscale("log")
        counts = list(next(iter(summary.values())))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        if "distance" in quality:
            axis.set_yscale("log")
        axis.set_title(_QUALITIES[quality] + "\n(grey: real test images)", fontsize=9)
        axis.set_xlabel("network evaluations", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8
    )
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise UserError(f"cannot write --png={path}: {error.strerror}.") from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
