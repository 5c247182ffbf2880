"""Logits, energy and sampler as programs that run with JAX alone.

Each is a serialised `jax.export` program for batches of any size. Weights are its first
argument, by their names in `model.safetensors`, so that they lie on the disk once. Each
platform gets the forms of operations that are fast there.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from atebm_jax import (
    ascent,
    drawing,
    energy,
    models,
    recipes,
    release_format,
    storage,
)
from atebm_jax.errors import UserError
from atebm_jax.trained import Trained

#: The folder of a release that holds them: FOLDER/KIND/NAME.jaxexport.
FOLDER = "programs"
# Platforms of each kind.
_KINDS = {"cpu": ("cpu",), "accelerator": ("cuda", "tpu")}

#: Weights by their names in the file.
Weights = Mapping[str, jax.Array]


def write(loaded: Trained, folder: epath.Path) -> None:
    """Writes every program of a model, for every kind of device.

    Raises:
      UserError: the package that writes them is not installed.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "--stablehlo needs the package flatbuffers: pip install "
            "'atebm_jax[stablehlo]'."
        )
    for kind, platforms in _KINDS.items():
        (folder / kind).mkdir(parents=True)
        for name, (function, shapes) in _functions(loaded).items():
            made = jax.export.export(jax.jit(function), platforms=platforms)
            content = made(*shapes).serialize()
            storage.replace_bytes(folder / kind / f"{name}.jaxexport", bytes(content))


def _functions(loaded: Trained) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """What is exported, with the shapes of its arguments."""

    def logits(weights: Weights, images: jax.Array) -> jax.Array:
        variables = release_format.nested(weights)
        return models.logits_fn(loaded.model, variables)(images)

    def marginal(weights: Weights, images: jax.Array) -> jax.Array:
        return energy.marginal(logits(weights, images))

    rule = ascent.rule(recipes.of_config(loaded.config.evaluate.samples).sampler)

    def sample(
        weights: Weights,
        images: jax.Array,
        labels: jax.Array,
        seed: jax.Array,
        step_size: jax.Array,
        num_steps: jax.Array,
    ) -> jax.Array:
        variables = release_format.nested(weights)
        frozen = models.freeze(loaded.model, variables, loaded.image_shape)

        def objective(x: jax.Array) -> jax.Array:
            made = frozen(x)
            of_class = energy.score(made, jnp.maximum(labels, 0))
            return jnp.where(labels < 0, energy.score(made), of_class)

        indices = jnp.arange(images.shape[0], dtype=jnp.int32)
        keys = drawing.step_keys(seed, indices)
        return ascent.climb(
            objective, images, rule, keys=keys, step_size=step_size, num_steps=num_steps
        )

    (batch,) = jax.export.symbolic_shape("batch")
    shaped = jax.ShapeDtypeStruct
    arrays = release_format.flat(loaded.variables)
    weights = {name: shaped(x.shape, jnp.float32) for name, x in arrays.items()}
    images = shaped((batch, *loaded.image_shape), jnp.float32)
    labels = shaped((batch,), jnp.int32)
    numbers = [shaped((), kind) for kind in (jnp.uint32, jnp.float32, jnp.int32)]
    return {
        "logits": (logits, (weights, images)),
        "energy": (marginal, (weights, images)),
        "sample": (sample, (weights, images, labels, *numbers)),
    }
