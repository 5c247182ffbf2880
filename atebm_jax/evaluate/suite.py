"""The evaluation of a checkpoint: every protocol asked for, then the report."""

import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import checkpoint, data, seeds, sharding, storage, trained
from atebm_jax import config as configuration
from atebm_jax.errors import UserError, check_choice
from atebm_jax.evaluate import (
    abstention,
    calibration,
    classification,
    counterfactual,
    extractors,
    generation,
    ood,
    report,
    robustness,
)
from atebm_jax.evaluate.context import Context, Extractor, Options
from atebm_jax.evaluate.store import Store
from atebm_jax.model_names import located
from atebm_jax.progress import ShowFn
from atebm_jax.trained import Trained
from atebm_jax.workdir_lock import held

_log = logging.getLogger(__name__)


class Metric(NamedTuple):
    """A protocol, and what it needs."""

    run: Callable[[Context, epath.Path], dict[str, Any]]
    #: before any metric begins, so that a mistake is told before hours of work
    check: Callable[[Context], object] = lambda context: None
    #: (config.data, options) -> data sets beside the test images: role -> its source
    sources: Callable[[ml_collections.ConfigDict, Options], dict[str, str]] = (
        lambda settings, options: {}
    )
    #: (context, what is evaluated, folder) -> the context of all metrics
    prepare: Callable[[Context, Trained, epath.Path], Context] = (
        lambda context, loaded, folder: context
    )


#: What `--metrics` may name, in the order of the report.
METRICS: dict[str, Metric] = {
    "accuracy": Metric(classification.accuracy),
    "pgd": Metric(classification.pgd, classification.check_pgd),
    "autoattack": Metric(robustness.run, robustness.plan),
    "generation": Metric(
        generation.run, generation.check, generation.sources, generation.prepare
    ),
    "calibration": Metric(
        calibration.run, sources=lambda settings, options: {"eval": settings.eval}
    ),
    "abstention": Metric(abstention.run, abstention.check),
    "ood": Metric(ood.run, ood.check, ood.sources),
    "counterfactual": Metric(counterfactual.run, counterfactual.check),
}

# Of the noise among the out-of-distribution sets, unless there are more test images.
_NOISE_IMAGES = 10_000
# Whose versions the report names.
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn", "pillow")


def evaluate(
    path: str | epath.Path,
    out: str | epath.Path,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    config: ml_collections.ConfigDict | None = None,
    best_by: str | None = None,
    data_dir: str | None = None,
    judge: str | None = None,
    classes_by_place: bool = False,
    options: Options = Options(),  # noqa: B008  (frozen)
    show: ShowFn = lambda name, done, total: None,
) -> dict[str, Any]:
    """Evaluates a checkpoint and writes `report.json`, `report.md` and plots.

    A stopped evaluation goes on where it was when it is started again with the same
    arguments, and ends with the same report.

    Args:
      path: a workdir or a checkpoint (`checkpoint.load_weights`).
      out: folder for the report and for finished work.
      metrics: keys of `METRICS`.
      config: another config's data and evaluation; its network must be the same.
      best_by: the best checkpoint instead of the last (`checkpoint.BEST_BY`).
      data_dir: instead of config.data.data_dir.
      judge: checkpoint of an independent classifier for counterfactuals, or
        "efficientnet_lite0" for models of ImageNet's classes.
      classes_by_place: class k of the data is class k of the network, whatever their
        names.
      options: sizes, seeds, sets and radii.
      show: progress.

    Returns:
      The report.

    Raises:
      UserError: what was asked for cannot be measured, or not be compared.
    """
    # An empty list is refused as an empty name.
    for name in metrics or ("",):
        check_choice("metric", name, METRICS)
    wanted = tuple(name for name in METRICS if name in metrics)
    loaded = trained.load(path, best_by=best_by)
    settings = _settings(loaded, config, data_dir)
    folder = storage.reached(out)
    _check_out(folder, located(path), checkpoint.find(path, best_by=best_by))
    context = _context(
        loaded, settings, folder, options, show, wanted, classes_by_place
    )
    if judge is not None:
        context = _with_judge(context, judge)
    if jax.process_index() == 0:
        for text in context.notes:
            _log.warning(text)
    for name in wanted:
        METRICS[name].check(context)
    with held(folder, "--out", alone=False):
        for name in wanted:
            context = METRICS[name].prepare(context, loaded, folder)
        result = _measure(context, loaded, folder, wanted, path)
        if jax.process_index() == 0:
            report.write_figures(folder, result)
    return result


def _check_out(folder: epath.Path, evaluated: epath.Path, step: epath.Path) -> None:
    """Refuses to write over a job's report, or into a step, which the job deletes."""
    if folder == evaluated or folder.is_relative_to(step):
        raise UserError(
            f"the report would be written to {folder}, among the files of what is "
            "evaluated: give --out, another folder."
        )


def _measure(
    context: Context,
    loaded: Trained,
    folder: epath.Path,
    wanted: Sequence[str],
    path: str | epath.Path,
) -> dict[str, Any]:
    """Runs the metrics that are wanted and makes the report of them."""
    results = {}
    for position, name in enumerate(wanted):
        results[name] = METRICS[name].run(context, folder)
        context.show("metrics", position + 1, len(wanted))
    return {
        "checkpoint": {
            "path": str(path),
            **{key: loaded.meta[key] for key in ("stage", "step", "T")},
            "averaged_weights_sha256": loaded.fingerprint,
        },
        "network": checkpoint.as_json(context.config.model),
        "data": {"test": context.describe_data("test")},
        "seed": context.options.seed,
        "metrics": results,
        **report.made_with(*_PACKAGES),
        "notes": _notes(context),
    }


def _settings(
    loaded: Trained, config: ml_collections.ConfigDict | None, data_dir: str | None
) -> ml_collections.ConfigDict:
    """The checkpoint's config, or the caller's with the checkpoint's network."""
    settings = loaded.config.copy_and_resolve_references()
    if config is not None:
        configuration.check_complete(config)
        _check_same_network(settings, config, loaded.meta["stage"])
        network = settings.model
        settings = ml_collections.ConfigDict(config.to_dict())
        settings.model = network
    if not settings.data.test:
        raise UserError(
            "the checkpoint names no test images, as none does that was imported: give "
            "--config, a config of the same network with its data, such as "
            "configs/cifar10.py:small."
        )
    if data_dir is not None:
        settings.data.data_dir = data_dir
    configuration.check(settings)
    return settings


def _check_same_network(
    trained: ml_collections.ConfigDict, given: ml_collections.ConfigDict, stage: str
) -> None:
    """Refuses a config whose figures would not be those of the trained network.

    The network is the checkpoint's in any case. An imported one need not have a config:
    only size, normalisation and classes of the images are compared.
    """
    configs = (checkpoint.as_json(trained), checkpoint.as_json(given))
    old, new = (dict(configuration.flatten(config)) for config in configs)
    fields = ["data.image_shape", "model.num_classes"]
    fields += ["model.mean", "model.std", "model.standardize"]
    if stage != checkpoint.IMPORTED:
        others = configuration.RUN_CONTROL | {"model.remat", "model.dtype"}
        fields += [f for f in old if f.startswith("model.") and f not in others]
    for field in fields:
        before, now = old[field], new.get(field)
        if not _same(before, now):
            raise UserError(
                f"config.{field} is {now} and the checkpoint was trained with "
                f"{before}: figures of another resolution, normalisation or network "
                "cannot be compared; give the config it was trained with."
            )


def _same(before: Any, now: Any) -> bool:
    """Equal, or equal as figures are published: a mean of 0.4914 is one of 0.49140."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-3)
    return before == now


def _context(
    loaded: Trained,
    settings: ml_collections.ConfigDict,
    out: epath.Path,
    options: Options,
    show: ShowFn,
    wanted: Sequence[str],
    by_place: bool,
) -> Context:
    # By place, as for a network that does not name its classes.
    names = None if by_place else loaded.class_names
    mesh = sharding.ordered_mesh()
    sharding.check_batch_size(
        settings.evaluate.batch_size, mesh.size, "config.evaluate.batch_size"
    )
    notes: list[str] = []
    sources = _sources(settings, options, wanted, names, notes.append)
    if by_place:
        notes.append("Classes were compared by place, not by name.")
    elif names is None and sources["test"].class_names:
        notes.append(
            "The checkpoint does not name its classes: class k of the data is taken "
            "for its class k."
        )
    context = Context(
        config=settings,
        model=loaded.model,
        variables=sharding.put_replicated(loaded.variables, mesh),
        mesh=mesh,
        sources=sources,
        store=_store(loaded, settings, options, out / "units"),
        options=options,
        show=show,
        notes=tuple(notes),
        class_names=names,
    )
    fingerprints = {role: context.fingerprint(role) for role in sources}
    return replace(context, fingerprints=fingerprints)


def _store(
    loaded: Trained,
    settings: ml_collections.ConfigDict,
    options: Options,
    folder: epath.Path,
) -> Store:
    """Finished units, apart from those of anything that would give other numbers."""
    # Units of other versions are not taken.
    programs = ("atebm_jax", "jax", "jaxlib")
    decides = {
        "weights": loaded.fingerprint,
        "network": _unusual(settings.model),
        "image_shape": list(settings.data.image_shape),
        "batch_size": settings.evaluate.batch_size,
        "num_examples": options.num_examples,
        "seed": options.seed,
        "programs": [importlib.metadata.version(name) for name in programs],
        "platform": jax.default_backend(),
    }
    return Store(folder, decides)


def _unusual(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of `config.model` that are not at their defaults.

    So a field that a later version adds tells no network from itself.
    """
    usual = checkpoint.as_json(configuration.default().model)
    fields = checkpoint.as_json(model).items()
    return {name: x for name, x in fields if name not in usual or x != usual[name]}


def _sources(
    settings: ml_collections.ConfigDict,
    options: Options,
    wanted: Sequence[str],
    names: tuple[str, ...] | None,
    note: Callable[[str], None],
) -> dict[str, data.Source]:
    """The test images and what the metrics need beside, labelled as the network is."""
    sources: dict[str, data.Source] = {}
    specs = {"test": settings.data.test}
    for name in wanted:
        specs |= METRICS[name].sources(settings.data, options)
    for role, spec in specs.items():
        if role == seeds.NOISE:
            sources[role] = _noise(settings, options, len(sources["test"]))
            continue
        source = data.open_source(spec, settings.data.data_dir)
        what = f"config.data.{role}={spec}"
        if role in ("test", "eval"):
            if source.num_classes != settings.model.num_classes:
                raise UserError(
                    f"{what} has {source.num_classes or 'no'} classes and the network "
                    f"{settings.model.num_classes}: they must be the same."
                )
            source = data.relabel.follow(source, names, what, note=note)
        sources[role] = source
    return sources


def _noise(
    settings: ml_collections.ConfigDict, options: Options, num_test: int
) -> data.Source:
    """Uniform noise, of the network's sizes so that no resizing smooths it."""
    most = max(num_test, _NOISE_IMAGES)
    number = min(options.num_examples or _NOISE_IMAGES, most)
    rng = np.random.default_rng(options.seed)
    shape = (number, *settings.data.image_shape)
    images = rng.integers(0, 256, shape, np.uint8)
    return data.ArraySource(images, spec=f"noise(seed={options.seed})")


def _with_judge(context: Context, path: str) -> Context:
    """With an independent classifier, its classes in the model's order."""
    imagenet = path == extractors.EFFICIENTNET_LITE0
    judge = (_imagenet_judge if imagenet else _trained_judge)(context, path)
    placed = sharding.put_replicated(judge.variables, context.mesh)
    outputs = None if judge.outputs is None else judge.outputs.tolist()
    store = context.store.within(judge=judge.fingerprint, outputs=outputs)
    notes = context.notes
    if context.class_names and "classes" in judge.description:
        said = f"--judge={path} does not name its classes: they were compared by place."
        notes = (*notes, said)
    judge = judge._replace(variables=placed)
    return replace(context, judge=judge, store=store, notes=notes)


def _trained_judge(context: Context, path: str) -> Extractor:
    loaded, number = trained.load(path), context.config.model.num_classes
    if (loaded.image_shape, loaded.num_classes) != (context.image_shape, number):
        raise UserError(
            f"--judge={path} takes images {loaded.image_shape} of "
            f"{loaded.num_classes} classes and this model {context.image_shape} of "
            f"{number}: an independent classifier must take the same."
        )
    judge = extractors.from_model("network", loaded.model, loaded.variables, number)
    if judge.fingerprint == trained.fingerprint(context.variables):
        raise UserError(
            f"--judge={path} has the weights of the model itself: give a classifier "
            "that was trained independently."
        )
    what = f"--judge={path}"
    return extractors.by_name(judge, loaded.class_names, context.class_names, what)


def _imagenet_judge(context: Context, path: str) -> Extractor:
    """EfficientNet-Lite0, for models of ImageNet's classes alone."""
    # A network that names no classes has those of its data, by place.
    names = context.class_names or context.sources["test"].class_names
    if extractors.imagenet_outputs(names) is None:
        raise UserError(
            f"--judge={path} knows ImageNet's 1,000 classes, by their names in WordNet "
            "(n01440764 and so on), and this model has others: give a checkpoint of a "
            "classifier of the same classes."
        )
    return extractors.from_efficientnet_lite0(names)


def _notes(context: Context) -> list[str]:
    notes = [
        "Averaged weights; images as bytes / 255; normalisation inside the network."
    ]
    if context.options.num_examples:
        size = len(context.sources["test"])
        fewer = f"; the test set has {size}" * (size < context.options.num_examples)
        notes.append(
            f"At most {context.options.num_examples} images of each set, evenly spread "
            f"over it (--num_examples{fewer})."
        )
    return [*notes, *context.notes]
