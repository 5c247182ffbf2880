"""Imports a PyTorch checkpoint: what `--from` and `--to` do."""

import collections
import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from atebm_jax import archs, checkpoint, checksums, models, storage
from atebm_jax import config as configuration
from atebm_jax.convert import layouts, names, normalization
from atebm_jax.convert.files import Source, open_source, refusal
from atebm_jax.convert.normalization import Normalization
from atebm_jax.errors import UserError, check_choice
from atebm_jax.models.family import Shapes
from atebm_jax.models.layers import ACTIVATIONS
from atebm_jax.names import of_class


class Imported(NamedTuple):
    """What was read, before it is written."""

    variables: dict[str, Any]  # {"params": ..., "batch_stats": ...}, float32
    config: ml_collections.ConfigDict  # complete; its model computes what theirs did
    matches: list[names.Match]  # every parameter with its name there and here
    record: dict[str, Any]  # what `import.json` says
    class_names: tuple[str, ...] | None = None  # of the outputs, where somebody says


def read(
    path: str | os.PathLike,
    *,
    arch: str = "auto",
    entry: str | None = None,
    asked: Normalization | None = None,
    activation: str | None = None,
    image_size: int | None = None,
) -> Imported:
    """Reads a checkpoint and recognises its network.

    Args:
      path: `.pt`, `.pth`, `.ckpt`, `.tar` or `.safetensors`.
      arch: a key of `archs.ARCHS`, or "auto" to tell from names and shapes.
      entry: which of several networks in the file.
      asked: input normalisation, where the file does not say.
      activation: of a family that has several, as no file says it: "relu", "swish" (or
        "silu", which is the same) or "gelu"; None for the family's usual one, or what
        an export of this project wrote.
      image_size: side of the images in pixels; None for the architecture's usual one.

    Raises:
      UserError: the file cannot be read, or does not fit the network.
    """
    source = open_source(path)
    weights = layouts.find(source, entry)
    arrays = names.settled(layouts.read_arrays(source, weights))
    shapes = {name: array.shape for name, array in arrays.items()}
    family, fields = _architecture(source.path, arch, shapes)
    fields, assumed = _unsaid(source, family, fields, arch, activation)
    config = _config(source.path, fields, shapes, image_size)
    model, shape = config.model, config.data.image_shape
    name = archs.name_of(model) or family
    called = name if arch == "auto" else f"--arch={arch}"
    arrays, unused = names.without_unused(family, arrays)
    weights.steps.extend(unused)
    found = _compare(arrays, config)
    _check_fit(source.path, found, called, weights.others)
    # After the match: that a file does not fit is the more important message.
    declared = normalization.declared(source.tree, source.read, weights.constants)
    by_image = source.metadata.get("atebm_jax.standardize") == "True"
    declared = declared._replace(by_image=by_image)
    chosen = normalization.decide(asked, declared, model, shape[-1], source.path)
    model.mean, model.std = chosen.mean, chosen.std
    model.standardize = chosen.by_image
    if chosen.assumed:
        assumed.insert(0, normalization.assumption(chosen))
    logits = probe_logits(models.build(model), found.variables, shape)
    if not np.isfinite(logits).all():
        raise UserError(
            f"{source.path} makes NaN or Inf of an image: its weights have diverged or "
            "are damaged, or the numbers of --std are too small."
        )
    record = {
        "source": os.path.basename(source.path),
        "sha256": source.sha256,
        "arch": name,
        "model": checkpoint.as_json(config)["model"],
        "unwrapped": weights.steps,
        "normalization": {
            "inside_the_network": bool(chosen.mean) or chosen.by_image,
            "by_image": chosen.by_image,
            "mean": list(chosen.mean),
            "std": list(chosen.std),
            "origin": chosen.origin,
        },
        "assumed": assumed,
        "arrays_matched": len(found.matches),
        "numbers_matched": sum(math.prod(m.shape) for m in found.matches),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("atebm_jax", "jax", "flax", "numpy")
        },
        "probe": {"image_shape": shape, "logits": [float(x) for x in logits]},
    }
    classes = _exported_names(source, model)
    return Imported(found.variables, config, found.matches, record, classes)


def _check_fit(
    path: str, found: names.Comparison, called: str, others: Sequence[str]
) -> None:
    """Refuses differences, and says how to take one of the file's other networks."""
    if found.differences:
        flags = " or ".join(f"--entry={other}" for other in others[:4])
        part = f"; one part of the file alone is taken with {flags}" if flags else ""
        raise refusal(f"{path} does not fit {called}: {found.differences}{part}.")


def _compare(
    arrays: dict[str, np.ndarray], config: ml_collections.ConfigDict
) -> names.Comparison:
    """The arrays beside those of the network that a config describes."""
    network = models.build(config.model)
    expected = models.variable_shapes(network, config.data.image_shape)
    return names.compare(config.model.name, arrays, expected)


# The names of PyTorch and of this project for one function.
_ACTIVATIONS = {"silu": "swish"} | {name: name for name in ACTIVATIONS}


def _unsaid(
    source: Source,
    family: str,
    fields: dict[str, Any],
    arch: str,
    activation: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """The fields with those that no array shows, and a sentence for each guess.

    They are what an export of this project wrote; a network that the user names says
    all but the activation.

    Raises:
      UserError: an activation that is unknown, or another than a family's only one;
        what was written is of another type.
    """
    torch, only = names.known(family), models.FAMILIES[family].activation
    found, sentences = fields | {"activation": torch.activation}, []
    unsaid: dict[str, str] = {}
    if activation is not None:
        check_choice("--activation", activation, _ACTIVATIONS)
        if only is None:
            found["activation"] = _ACTIVATIONS[activation]
        elif _ACTIVATIONS[activation] != only:
            raise UserError(
                f"--activation={activation}: a {family} has {only}, whatever its "
                "weights: leave the flag out."
            )
    elif only is None:
        unsaid["activation"] = "--activation gives another"
    if arch == "auto":
        unsaid |= torch.unsaid(fields)
    for field, remedy in unsaid.items():
        written = source.metadata.get(f"atebm_jax.{field}")
        if written is None:
            sentences.append(f"{field}: {found[field]} (no file says it): {remedy}")
            continue
        try:
            found[field] = type(found[field])(written)
        except ValueError as error:
            raise refusal(
                f"{source.path}: its metadata has the {field} {written!r}: expected a "
                "number."
            ) from error
    return found, sentences


def _exported_names(
    source: Source, model: ml_collections.ConfigDict
) -> tuple[str, ...] | None:
    """Names of the classes that an export of this project wrote."""
    try:
        names = json.loads(source.metadata.get("atebm_jax.class_names", "null"))
    except ValueError:
        return None
    whole = isinstance(names, list) and len(names) == model.num_classes
    return tuple(of_class(str(name)) for name in names) if whole else None


# Ends a sentence about a network that is not built here.
_ELSEWHERE = (
    "--list prints the networks that are, and docs/convert.md says under 'Another "
    "network' how to read its arrays"
)


def _architecture(path: str, arch: str, shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Family and fields of `config.model`: what was asked for, else what fits."""
    family, other = names.recognise(shapes)
    if other is not None:
        raise refusal(f"{path} is {other}; {_ELSEWHERE}.")
    if arch != "auto":
        values = archs.arch(arch)
        if family not in (None, values["name"]):
            name = next(iter(shapes))
            raise refusal(
                f"{path} does not fit --arch={arch}, which is a {values['name']}: it "
                f"has {name} {shapes[name]} and is a {family}; leave --arch out, or "
                "give the right one."
            )
        return values["name"], _with_own(values, shapes)
    fields = names.fields(family, shapes) if family else {}
    if family and set(models.FAMILIES[family].sized_by) <= fields.keys():
        return family, fields
    what = f"a {family} of a size that is not" if family else "no network that is"
    like = _nearest(path, family or names.nearest(shapes), shapes)
    raise refusal(f"{path} is {what} built here; {like}; {_ELSEWHERE}.")


def _with_own(values: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """An architecture's fields, with the file's where they do not size the network."""
    found = names.fields(values["name"], shapes)
    sized_by = models.FAMILIES[values["name"]].sized_by
    return values | {f: x for f, x in found.items() if f not in sized_by}


def _nearest(path: str, family: str | None, shapes: Shapes) -> str:
    """Which network of a family has most of these arrays, and what differs."""
    if family is None:
        some = ", ".join(sorted(shapes)[:4])
        return (
            f"its names ({some}, ...) are like those of none: --entry=PREFIX takes a "
            "wrapper off"
        )
    arrays, compared = names.like(shapes), {}
    for name, values in models.FAMILIES[family].archs.items():
        fields = _with_own({"name": family, **values}, shapes)
        compared[name] = _compare(arrays, _config(path, fields, shapes, None))
    if not compared:
        return f"it is most like a {family}"
    name, nearest = max(compared.items(), key=lambda item: len(item[1].matches))
    fit = f"{len(nearest.matches)} of its {len(shapes)} arrays fit"
    return f"it is most like {name}: {fit}; {nearest.differences}"


def _config(
    path: str, fields: dict[str, Any], shapes: Shapes, image_size: int | None
) -> ml_collections.ConfigDict:
    """A config for an imported network: its model, images, and ways to use it."""
    channels = names.channels(fields["name"], shapes)
    if channels not in (1, 3):
        raise refusal(
            f"{path} is a network for images of {channels} channels: expected 1 (grey) "
            "or 3 (colour)."
        )
    config = configuration.default()
    config.model.update(fields)
    config.model.mean, config.model.std = (), ()
    side = image_size or names.known(fields["name"]).side(config.model)
    config.data.image_shape = (side, side, channels)
    if side >= 64:
        # ImageNet's budgets (method: sections 4 and 5).
        config.evaluate.attack = configuration.adversary(
            epsilon=3.0, step_size=1.0, num_steps=10
        )
        config.evaluate.samples.step_size = 8.0
        config.evaluate.samples.num_steps = 14
    return config


def probe_image(shape: tuple[int, int, int]) -> np.ndarray:
    """The fixed image of a shape (H, W, C): [H, W, C] float32 in [0, 1]."""
    i, j, c = np.indices(shape)
    return np.asarray((3 * i + 5 * j + 7 * c) % 32 / 31, np.float32)


def probe_logits(
    model: nn.Module, variables: Any, shape: tuple[int, int, int]
) -> np.ndarray:
    """Logits of the fixed image, [K] float32, to compare with the original's.

    At full precision of the matrices.
    """
    with jax.default_matmul_precision("float32"):
        run = jax.jit(lambda weights, x: models.logits_fn(model, weights)(x))
        return np.asarray(run(variables, probe_image(shape)[None])[0])


def with_class_names(imported: Imported, path: str | os.PathLike) -> Imported:
    """Adds the names of the classes from a file, one a line, by number.

    Raises:
      UserError: it cannot be read, or does not name each class once.
    """
    try:
        text = storage.reached(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes_file={path} cannot be read: {error}.") from error
    names = [of_class(line.strip()) for line in text.strip().splitlines()]
    number = imported.config.model.num_classes
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if len(names) != number or twice or "" in names:
        found = f"{twice[0]!r} twice" if twice else f"{len(names)} lines"
        raise UserError(
            f"--classes_file={path} has {found}: expected the names of the network's "
            f"{number} classes, one a line, in their order."
        )
    return imported._replace(class_names=tuple(names))


def write(imported: Imported, to: str | os.PathLike) -> None:
    """Writes a folder that looks like a workdir, complete or not at all.

    Raises:
      UserError: something is there, or it cannot be written.
    """
    storage.check_new_folder("--to", to)
    config = checkpoint.as_json(imported.config)
    with storage.appears_whole(to) as made:
        folder = epath.Path(made)
        folder.mkdir()
        _save_weights(folder, imported, config)
        storage.write_json(folder / "config.json", config)
        storage.write_json(folder / "import.json", imported.record)


def _save_weights(
    folder: epath.Path, imported: Imported, config: dict[str, Any]
) -> None:
    """One step with the averaged weights alone: all that other commands read."""
    meta = {
        "format": checkpoint.FORMAT,
        "stage": checkpoint.IMPORTED,
        "step": 0,
        "T": 0,
        "config": config,
        "import": imported.record,
        "class_names": imported.class_names,
    }
    state = {
        "average_params": imported.variables["params"],
        "average_batch_stats": imported.variables.get("batch_stats", {}),
    }
    path = checkpoint.stage_folder(folder, checkpoint.IMPORTED)
    path.mkdir(parents=True)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    with ocp.CheckpointManager(path, item_names=("state", "meta")) as manager:
        manager.save(0, args=items)
    checkpoint.check_complete(path / "0")
    checksums.write(path / "0")
