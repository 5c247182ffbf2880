"""What every protocol of the evaluation is given, and how it runs over images."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from atebm_jax import data, metrics, models, pictures, seeds, sharding
from atebm_jax.errors import UserError
from atebm_jax.evaluate.options import Options
from atebm_jax.evaluate.store import Arrays, Store
from atebm_jax.progress import ShowFn


class Extractor(NamedTuple):
    """A network that scores images, or judges counterfactuals."""

    #: "inception", "efficientnet_lite0", "model" (the evaluated one) or "network"
    name: str
    fingerprint: str  #: SHA-256 of its weights
    variables: Any  #: its weights, an argument of `apply`
    #: (variables, images [B, H, W, C] float32 in [0, 1]) -> features [B, D], logits
    #: [B, K]
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    description: dict[str, Any]  #: for the report
    #: (variables, inputs as of `score_inputs`) -> logits [B, 1008], of Inception alone
    apply_inputs: Callable[[Any, jax.Array], jax.Array] | None = None
    #: [K] int: the output for each class of the evaluated model; None if it has none
    outputs: np.ndarray | None = None

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Logits [B, K] of the evaluated model's classes, where `outputs` has them."""
        return self.apply(variables, images)[1][:, self.outputs]

    def features(
        self, logits_fn: Any, images: Any, labels: Any, variables: Any
    ) -> dict[str, jax.Array]:
        """A `RowsFn` of the features alone."""
        del logits_fn, labels
        return {"features": self.apply(variables, images)[0]}

    def sizes(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """D and K, without a run of the network."""
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        features, logits = jax.eval_shape(self.apply, self.variables, images)
        return features.shape[1], logits.shape[1]


# (logits_fn, images [B, H, W, C] float32 in [0, 1], labels [B] or -1, more) -> arrays
# [B, ...]; or what is compiled of it.
Rows = dict[str, jax.Array]
RowsFn = Callable[..., Rows]
# Images that tell one data set from another at every start.
_FINGERPRINT_IMAGES = 256
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Context:
    """A model, its data, and where finished work is kept."""

    #: complete config of the checkpoint; data and evaluation may be the caller's
    config: ml_collections.ConfigDict
    model: nn.Module
    variables: Any  #: averaged weights, on every device
    mesh: Mesh
    #: "train", "eval", "test", "seeds" where they are read, those of Options.ood
    sources: Mapping[str, data.Source]
    #: of the sources, as of `fingerprint`
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    store: Store = dataclasses.field(default_factory=lambda: Store(None, {}))
    options: Options = dataclasses.field(default_factory=Options)
    show: ShowFn = lambda name, done, total: None
    judge: Extractor | None = None  #: an independent classifier
    #: of the seeds; None where they are noise or read
    gaussian: seeds.Gaussian | None = None
    notes: tuple[str, ...] = ()  #: what the report says about the data
    #: of the network; None where its classes are compared by place
    class_names: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.config.data.image_shape)

    # Images of a source.

    def limit(self, role: str) -> int:
        """How many images of a source are looked at."""
        size = len(self.sources[role])
        return min(self.options.num_examples or size, size)

    def preprocess(self, role: str) -> str:
        """The operations for labelled images, or those for all others."""
        settings = self.config.data
        labelled = role in ("train", "eval", "test")
        return settings.preprocess if labelled else settings.preprocess_seeds

    def images(self, role: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W, C] uint8 spread over a source and labels [N] int32.

        They are as the model sees them, the same in every process, N <= limit.
        """
        return data.materialise(
            self.sources[role],
            self.preprocess(role),
            self.image_shape,
            limit,
            self.config.data.max_bad_images,
        )

    def batches(self, role: str, limit: int, start: int) -> Iterator[dict[str, Any]]:
        """Batches of at most `limit` images spread over a source, from one on."""
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

    def fingerprint(self, role: str) -> str:
        """SHA-256 of some images spread over a source, and of `data.content`'s digest.

        Quick enough for every start: it tells another folder or version of the same
        name, and an image of a folder whose file has another size.
        """
        source = self.sources[role]
        digest = hashlib.sha256(str(len(source)).encode())
        digest.update(data.content.describe(source)["content"].encode())
        digest.update(_digests(*self.images(role, _FINGERPRINT_IMAGES)).tobytes())
        return digest.hexdigest()

    def digests(self, role: str) -> Arrays:
        """SHA-256 of every image as the model sees it: "digests" [N, 32] uint8."""
        everywhere = sharding.replicated(self.mesh)
        gather = jax.jit(lambda variables, rows: rows, out_shardings=everywhere)

        def digest(batch: Mapping[str, np.ndarray]) -> Arrays:
            mine = {key: batch[key] for key in ("labels", "mask")}
            mine["digests"] = _digests(batch["images"], batch["labels"])
            return self.rows(gather, mine)

        name = f"fingerprint of {role}"
        return self.over_batches(name, role, self._store_of(name, role), digest)

    def describe_data(self, role: str) -> dict[str, Any]:
        """Which images a part saw: source, count, size, preprocessing and SHA-256."""
        rows = self.digests(role)
        return {
            "source": self.sources[role].spec,
            "num_images": len(rows["labels"]),
            "num_in_source": len(self.sources[role]),
            "image_shape": list(self.image_shape),
            "preprocess": self.preprocess(role),
            "sha256": hashlib.sha256(rows["digests"].tobytes()).hexdigest(),
        }

    # Functions of the images.

    def map_images(
        self,
        name: str,
        role: str,
        function: RowsFn,
        *rest: Any,
        only_first: Mapping[str, int] = _NOTHING,
        **settings: Any,
    ) -> Arrays:
        """Applies a function to the images of a source, batch by batch.

        Finished batches are read from the store. The function is compiled once.

        Args:
          name: of the part, for progress and store.
          role: key of `sources`.
          function: its arrays have one row an image.
          rest: what the function takes after the labels, weights of another network.
          only_first: key -> number of rows that are kept, for large arrays.
          settings: everything else that decides the result.

        Returns:
          The arrays over all images that could be decoded, with "labels" [N].
        """
        compiled = self.compiled(function)
        store = self._store_of(name, role, only_first=dict(only_first), **settings)

        def make(batch: Mapping[str, np.ndarray]) -> Arrays:
            return self.rows(compiled, batch, *rest)

        return self.over_batches(name, role, store, make, only_first)

    def _store_of(self, name: str, role: str, **settings: Any) -> Store:
        return self.store.within(
            part=name,
            role=role,
            source=self.sources[role].spec,
            content=self.fingerprints[role],
            preprocess=self.preprocess(role),
            **settings,
        )

    def over_batches(
        self,
        name: str,
        role: str,
        store: Store,
        make: Callable[[Mapping[str, np.ndarray]], Arrays],
        only_first: Mapping[str, int] = _NOTHING,
    ) -> Arrays:
        """`map_images` with any function of a batch, and a store for its units."""
        limit = self.limit(role)
        total = -(-limit // self.config.evaluate.batch_size)
        parts = list(itertools.islice(store.units(), total))
        self.show(name, len(parts), total)
        if len(parts) < total:
            for batch in self.batches(role, limit, len(parts)):
                unit = make(batch)
                before = sum(len(part["labels"]) for part in parts)
                for key, number in only_first.items():
                    unit[key] = unit[key][: max(number - before, 0)]
                store.save(len(parts), unit)
                parts.append(unit)
                self.show(name, len(parts), total)
        if not any(len(part["labels"]) for part in parts):
            raise UserError(
                f"{self.sources[role].spec}: none of {limit} images can be decoded."
            )
        return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}

    def compiled(self, function: RowsFn) -> RowsFn:
        """Compiles a `RowsFn`; what it takes beside the images comes after them."""

        def apply(variables: Any, batch: Rows, *rest: Any) -> Rows:
            images = batch["images"].astype(jnp.float32) / 255.0
            logits_fn = models.freeze(self.model, variables, self.image_shape)
            rows = function(logits_fn, images, batch["labels"], *rest)
            return rows | {"labels": batch["labels"], "mask": batch["mask"]}

        return jax.jit(apply, out_shardings=sharding.replicated(self.mesh))

    def rows(self, compiled: RowsFn, batch: Mapping[str, Any], *rest: Any) -> Arrays:
        """What a compiled function makes of a batch's decoded images."""
        rows = compiled(self.variables, sharding.put_batch(batch, self.mesh), *rest)
        host = {key: np.asarray(value) for key, value in rows.items()}
        mask = host.pop("mask")
        return {key: value[mask] for key, value in host.items()}

    # Samples.

    def seeds_fn(self, seed: int) -> seeds.SeedsFn:
        """Where samples begin, as `config.data.seeds` has it."""
        return seeds.seeds_fn(
            self.config.data.seeds,
            seed,
            self.config.data,
            gaussian=self.gaussian,
            source=self.sources.get("seeds"),
        )

    def sample_grid(
        self, path: epath.Path, blocks: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Draws samples, a column a class: title -> (images in [0, 1], labels)."""
        pictures.sample_grid(
            path,
            blocks,
            num_classes=self.config.model.num_classes,
            num_rows=self.config.evaluate.samples.grid_rows,
            class_names=self.sources["test"].class_names,
        )


def _digests(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """SHA-256 of each image [B, H, W, C] uint8 and label [B]: [B, 32] uint8."""
    hashes = [
        hashlib.sha256(image.tobytes() + np.int32(label).tobytes()).digest()
        for image, label in zip(images, labels, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), 32)


def check_finite(what: str, *arrays: np.ndarray) -> None:
    """Refuses NaN and infinite values with a `UserError`."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(
            f"some {what} are NaN or infinite: the network has diverged; choose "
            "another checkpoint."
        )


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


def share(hits: int, number: int) -> dict[str, Any]:
    """A share of images as a figure, with Wilson's interval."""
    return figure(hits / number, metrics.wilson_interval(hits, number), number)


def share_of(hits: np.ndarray) -> dict[str, Any]:
    """As `share`, of [N] bool."""
    return share(int(hits.sum()), len(hits))
