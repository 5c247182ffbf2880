"""What every protocol of the evaluation is given, and how it runs over images."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from atebm_jax import data, models, sharding
from atebm_jax.evaluate.store import Arrays, Store


class Network(NamedTuple):
    """The network with its weights: images [B, H, W, C] to logits or features."""

    logits: models.LogitsFn
    features: models.LogitsFn


# (network, images [B, H, W, C] float32 in [0, 1], labels [B]) -> arrays [B, ...].
ImageFn = Callable[[Network, jax.Array, jax.Array], dict[str, jax.Array]]
# The same with more arguments, or compiled.
RowsFn = Callable[..., dict[str, jax.Array]]
# Shows the progress of a part: (name, batches done, batches in all).
ShowFn = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for beside the config.

    Attributes:
      num_examples: images of each data set; 0 for all.
      num_samples: generated images.
      seed: of noise, attacks and resampling.
      epsilons: radii of the curve of robust accuracy; () for those around the config's.
      ood: sources of out-of-distribution images, "noise" among them.
      radii: of counterfactuals, L2 pixels.
      target: of counterfactuals: "next", "runner_up" or a class number.
      num_resamples: of each bootstrap interval.
      norm, epsilon: threat of AutoAttack; None for that of config.evaluate.attack.
      version: of AutoAttack.
      save_adversarial: write AutoAttack's images.
      feature_extractor: "inception", "model" or a checkpoint; "" for Inception where
        its weights are given, else the model.
      inception_weights: path of Inception's weights.
      reference_statistics: an `.npz` with `mu` and `sigma` instead of `data.train`.
      num_reference: images of data.train for the statistics; 0 for all.
      num_pairs: images of each side where pairs are compared.
      sweep: numbers of sampling steps to try below and above the config's; 0 for none.
      sweep_samples: images for that.
      quantise: a key of `drawing.QUANTISE`.
      score_protocol: one of `metrics.SCORE_PROTOCOLS`.
      cache_dir: of statistics of data sets; None for the user's cache.
    """

    num_examples: int = 1000
    num_samples: int = 1000
    seed: int = 0
    epsilons: Sequence[float] = ()
    ood: Sequence[str] = ("noise",)
    radii: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    target: str = "next"
    num_resamples: int = 200
    norm: str | None = None
    epsilon: float | None = None
    version: str = "standard"
    save_adversarial: bool = False
    feature_extractor: str = ""
    inception_weights: str | None = None
    reference_statistics: str | None = None
    num_reference: int = 0
    num_pairs: int = 5000
    sweep: int = 3
    sweep_samples: int = 2560
    quantise: str = "reference"
    score_protocol: str = "reference"
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """A model, its data, and where finished work is kept.

    Attributes:
      config: complete config of the checkpoint, its data and evaluation perhaps the
        caller's.
      model: the network.
      variables: its averaged weights, on every device.
      mesh: the devices.
      sources: "train", "eval", "test" and what `Options.ood` names.
      store: finished units.
      options: of the command line.
      show: progress.
      judge: an independent classifier (LogitsFn), or None.
    """

    config: ml_collections.ConfigDict
    model: nn.Module
    variables: Any
    mesh: Mesh
    sources: Mapping[str, data.Source]
    store: Store
    options: Options
    show: ShowFn = lambda name, done, total: None
    judge: models.LogitsFn | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.config.data.image_shape)

    def map_images(
        self,
        name: str,
        role: str,
        function: RowsFn,
        *rest: Any,
        **settings: Any,
    ) -> Arrays:
        """Applies a function to the images of a source, batch by batch.

        Finished batches are read from the store. The function is compiled once.

        Args:
          name: of the part, for progress and store.
          role: key of `sources`.
          function: network, images and labels to arrays of one row an image;
            unlabelled images have the label -1.
          rest: what the function takes after the labels, weights of another network.
          settings: everything else that decides the result.

        Returns:
          The arrays over all images that could be decoded, with "labels" [N].
        """
        source = self.sources[role]
        preprocess = self.preprocess(role)
        store = self.store.within(
            part=name, role=role, source=source.spec, preprocess=preprocess, **settings
        )
        limit = min(self.options.num_examples or len(source), len(source))
        total = -(-limit // self.config.evaluate.batch_size)
        parts: list[Arrays] = []
        while len(parts) < total:
            unit = store.load(f"{len(parts):06d}")
            if unit is None:
                break
            parts.append(unit)
        self.show(name, len(parts), total)
        if len(parts) < total:
            compiled = self.compiled(function)
            for batch in self.batches(role, limit, len(parts)):
                unit = self.rows(compiled, batch, *rest)
                store.save(f"{len(parts):06d}", unit)
                parts.append(unit)
                self.show(name, len(parts), total)
        return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}

    def compiled(self, function: RowsFn) -> RowsFn:
        """Compiles an `ImageFn`; what it takes beside the images comes after them."""

        def apply(
            variables: Any, batch: Mapping[str, jax.Array], *rest: Any
        ) -> dict[str, jax.Array]:
            images = batch["images"].astype(jnp.float32) / 255.0

            def features(x: jax.Array) -> jax.Array:
                pooled = self.model.apply(variables, x, features=True)
                assert isinstance(pooled, jax.Array)
                return pooled

            network = Network(models.logits_fn(self.model, variables), features)
            rows = function(network, images, batch["labels"], *rest)
            return rows | {"labels": batch["labels"], "mask": batch["mask"]}

        return jax.jit(apply, out_shardings=sharding.replicated(self.mesh))

    def rows(
        self,
        compiled: RowsFn,
        batch: Mapping[str, Any],
        *rest: Any,
    ) -> Arrays:
        """What a compiled function makes of a batch's decoded images."""
        placed = sharding.put_batch(batch, self.mesh)
        rows = {
            k: np.asarray(v) for k, v in compiled(self.variables, placed, *rest).items()
        }
        mask = rows.pop("mask")
        return {key: value[mask] for key, value in rows.items()}

    def preprocess(self, role: str) -> str:
        """How images of a source come to the network's size."""
        settings = self.config.data
        labelled = role in ("train", "eval", "test")
        return settings.preprocess if labelled else settings.preprocess_seeds

    def batches(self, role: str, limit: int, start: int) -> Iterator[dict[str, Any]]:
        """Batches of at most so many images spread over a source, from one on."""
        settings = self.config.data
        with data.eval_batches(
            self.sources[role],
            preprocess=self.preprocess(role),
            batch_size=self.config.evaluate.batch_size,
            image_shape=self.image_shape,
            limit=limit,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=settings.num_threads,
            max_bad_images=settings.max_bad_images,
        ) as batches:
            yield from batches

    def images(self, role: str) -> Arrays:
        """Images of a source as the model sees them: "bytes" [N, H, W, C]; "labels"."""
        return self.map_images("images", role, lambda network, x, y: {"bytes": _u8(x)})

    def describe_data(self, role: str) -> dict[str, Any]:
        """Which images a part saw: source, count, size, preprocessing and SHA-256."""
        rows = self.images(role)
        digest = hashlib.sha256(rows["bytes"].tobytes())
        digest.update(rows["labels"].astype(np.int32).tobytes())
        return {
            "source": self.sources[role].spec,
            "num_images": len(rows["labels"]),
            "image_shape": list(self.image_shape),
            "preprocess": self.preprocess(role),
            "sha256": digest.hexdigest(),
        }


def _u8(images: jax.Array) -> jax.Array:
    return jnp.round(images * 255.0).astype(jnp.uint8)


def figure(
    value: float, interval: tuple[float, float] | None = None, count: int | None = None
) -> dict[str, Any]:
    """One number of the report, with its 95 % interval and the number of images."""
    result: dict[str, Any] = {"value": float(value)}
    if interval is not None:
        result["interval_95"] = [float(bound) for bound in interval]
    if count is not None:
        result["count"] = int(count)
    return result
